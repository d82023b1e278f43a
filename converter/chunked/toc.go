package chunked

import (
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
)

// Annotations of a layer's descriptor that locate and authenticate the tables in the blob.
const (
	// AnnotationTOCDigest holds the digest of the compressed table of contents, the root of all trust.
	AnnotationTOCDigest = "io.github.containers.zstd-chunked.manifest-checksum"
	// AnnotationTOCPosition holds "offset:length:uncompressed length:TOCType" of the table of contents.
	AnnotationTOCPosition = "io.github.containers.zstd-chunked.manifest-position"
	// AnnotationTarSplitPosition holds "offset:length:uncompressed length" of tar-split.
	AnnotationTarSplitPosition = "io.github.containers.zstd-chunked.tarsplit-position"
	// AnnotationTarSplitDigest was written by old versions of containers/storage. Nobody reads it: the
	// table of contents holds the digest.
	AnnotationTarSplitDigest = "io.github.containers.zstd-chunked.tarsplit-checksum"
)

const (
	// TOCVersion is the only version of a table of contents.
	TOCVersion = 1
	// TOCType is the only type of a table of contents in zstd:chunked.
	TOCType = 1
)

// The footer is the payload of a blob's last frame: the numbers of Footer in order, 8 bytes each,
// little endian, then FooterMagic. It makes a blob self-contained. Readers use the annotations, which
// the manifest already holds.
const (
	FooterSize  = 64
	FooterMagic = "GNUlInUx"
)

// SkippableMagic starts a frame that zstd decoders skip. The payload's length (4 bytes, little endian)
// and the payload follow.
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
	// TypeChunk is a further part of the preceding TypeReg entry. It has only Type, Name and the chunk fields.
	TypeChunk = "chunk"
)

// Types of chunks.
const (
	ChunkData  = ""
	ChunkZeros = "zeros" // all zeros; the blob contains the frame nevertheless
)

// TOC is the table of contents of a layer, in JSON.
type TOC struct {
	Version int     `json:"version"`
	Entries []Entry `json:"entries"`
	// TarSplitDigest is the digest of the compressed tar-split.
	TarSplitDigest digest.Digest `json:"tarSplitDigest,omitempty"`
}

// Entry is an entry of the tar, in the order of the tar, or another chunk of the preceding file.
type Entry struct {
	Type     string `json:"type"`
	Name     string `json:"name"` // as in the tar, with a leading "./" and a trailing "/"
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
	// Xattrs holds values in base64.
	Xattrs map[string]string `json:"xattrs,omitempty"`

	// Digest is the SHA-256 of the contents, or empty if there are none.
	Digest digest.Digest `json:"digest,omitempty"`
	// Offset is the start in the blob of the frames of the contents, or of this chunk. EndOffset is the
	// end of the whole file's frames; chunks have none.
	Offset    int64 `json:"offset,omitempty"`
	EndOffset int64 `json:"endOffset,omitempty"`

	// The chunk fields are present if the file has several chunks. The TypeReg entry is the first chunk.
	ChunkSize   int64         `json:"chunkSize,omitempty"`
	ChunkOffset int64         `json:"chunkOffset,omitempty"`
	ChunkDigest digest.Digest `json:"chunkDigest,omitempty"`
	ChunkType   string        `json:"chunkType,omitempty"`
}

// Position is the place of a table in a blob, in bytes.
type Position struct {
	Offset int64 // of the payload of the skippable frame
	Length int64
	Raw    int64 // uncompressed length
}

// String returns the position in the form of an annotation.
func (p Position) String() string { return fmt.Sprintf("%d:%d:%d", p.Offset, p.Length, p.Raw) }

// Footer locates the tables.
type Footer struct {
	TOC      Position
	Type     int64
	TarSplit Position
}
