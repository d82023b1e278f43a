package chunked

import (
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
)

// Annotations of a layer's descriptor, by which readers find the tables in the blob and trust them.
const (
	// AnnotationTOCDigest has the digest of the table of contents as it is stored, compressed. All trust begins there.
	AnnotationTOCDigest = "io.github.containers.zstd-chunked.manifest-checksum"
	// AnnotationTOCPosition has "offset:length:uncompressed length:type" of the table of contents. The type is
	// TOCType.
	AnnotationTOCPosition = "io.github.containers.zstd-chunked.manifest-position"
	// AnnotationTarSplitPosition has "offset:length:uncompressed length" of tar-split.
	AnnotationTarSplitPosition = "io.github.containers.zstd-chunked.tarsplit-position"
	// AnnotationTarSplitDigest was written by old versions of containers/storage. Nobody reads it: the digest stands in
	// the table of contents.
	AnnotationTarSplitDigest = "io.github.containers.zstd-chunked.tarsplit-checksum"
)

const (
	// TOCVersion is the only version of a table of contents that there is.
	TOCVersion = 1
	// TOCType is the only type of a table of contents that zstd:chunked has.
	TOCType = 1
)

// The footer is the payload of the last frame of a blob: numbers of 8 bytes, little endian, in the order of Footer, and
// then FooterMagic. It makes a blob complete in itself. Readers use the annotations, which are in the manifest already.
const (
	FooterSize  = 64
	FooterMagic = "GNUlInUx"
)

// SkippableMagic begins a frame that zstd decoders skip. Four bytes of length, little endian, and the payload follow.
const (
	SkippableMagic      = "\x50\x2a\x4d\x18"
	SkippableHeaderSize = 8
)

// Types of entries.
const (
	TypeReg     = "reg"
	TypeLink    = "hardlink"
	TypeSymlink = "symlink"
	TypeDir     = "dir"
	TypeChar    = "char"
	TypeBlock   = "block"
	TypeFIFO    = "fifo"
	// TypeChunk is a further part of the contents of the TypeReg entry before it. It has only Type, Name and the fields
	// about chunks.
	TypeChunk = "chunk"
)

// Types of chunks.
const (
	ChunkData  = ""
	ChunkZeros = "zeros" // all zeros; the frame is there nevertheless
)

// TOC is the table of contents of a layer, in JSON.
type TOC struct {
	Version int     `json:"version"`
	Entries []Entry `json:"entries"`
	// TarSplitDigest is the digest of tar-split as it is stored, compressed.
	TarSplitDigest digest.Digest `json:"tarSplitDigest,omitempty"`
}

// Entry is an entry of the tar, in the order of the tar, or a further chunk of the file before it.
type Entry struct {
	Type     string `json:"type"`
	Name     string `json:"name"` // as in the tar, "./" and a "/" at the end included
	Linkname string `json:"linkName,omitempty"`
	Mode     int64  `json:"mode,omitempty"`
	Size     int64  `json:"size,omitempty"`
	UID      int    `json:"uid,omitempty"`
	GID      int    `json:"gid,omitempty"`

	ModTime    *time.Time `json:"modtime,omitempty"`
	AccessTime *time.Time `json:"accesstime,omitempty"`
	ChangeTime *time.Time `json:"changetime,omitempty"`

	DevMajor int64 `json:"devMajor,omitempty"`
	DevMinor int64 `json:"devMinor,omitempty"`
	// Xattrs has values in base64.
	Xattrs map[string]string `json:"xattrs,omitempty"`

	// Digest is the SHA-256 of the contents; none where they are empty.
	Digest digest.Digest `json:"digest,omitempty"`
	// Offset is where in the blob the frames of the contents begin, or those of this chunk. EndOffset is where those of
	// the whole file end; chunks have none.
	Offset    int64 `json:"offset,omitempty"`
	EndOffset int64 `json:"endOffset,omitempty"`

	// The fields about chunks are there if the file has more than one. The TypeReg entry is the first chunk itself.
	ChunkSize   int64         `json:"chunkSize,omitempty"`
	ChunkOffset int64         `json:"chunkOffset,omitempty"`
	ChunkDigest digest.Digest `json:"chunkDigest,omitempty"`
	ChunkType   string        `json:"chunkType,omitempty"`
}

// Position is where a table lies in a blob. All numbers are bytes.
type Position struct {
	Offset int64 // of the payload of the skippable frame
	Length int64
	Raw    int64 // the length once it is decompressed
}

// String is the position as annotations have it.
func (p Position) String() string { return fmt.Sprintf("%d:%d:%d", p.Offset, p.Length, p.Raw) }

// Footer says where the tables are.
type Footer struct {
	TOC      Position
	Type     int64
	TarSplit Position
}
