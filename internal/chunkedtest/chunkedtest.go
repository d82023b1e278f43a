// Package chunkedtest makes valid and invalid layers of the format zstd:chunked for tests. It shares
// no code with the encoder, and is slow and simple.
package chunkedtest

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
)

// Layer is a layer as stored.
type Layer struct {
	Blob []byte
	Desc ocispec.Descriptor
	// DiffID is the digest of the tar that was encoded.
	DiffID digest.Digest
}

// Options of Encode. All hooks may be nil.
type Options struct {
	// Chunk is the size of chunks; 0 makes one chunk of each file.
	Chunk int
	// TOC and Split change the tables before they are stored and hashed, so their digests stay correct.
	TOC   func(*chunked.TOC)
	Split func(lines [][]byte) [][]byte
	// Frame changes the frames of a chunk.
	Frame func(name string, frame []byte) []byte
}

// SplitEntry is a line of tar-split.
type SplitEntry struct {
	Type     int    `json:"type"`
	Name     string `json:"name,omitempty"`
	Size     int64  `json:"size,omitempty"`
	Payload  []byte `json:"payload"`
	Position int    `json:"position"`
}

type encoder struct {
	o     Options
	raw   []byte
	blob  bytes.Buffer
	zstd  *zstd.Encoder
	toc   chunked.TOC
	lines [][]byte
}

// Encode makes a layer of a tar.
func Encode(raw []byte, o Options) (*Layer, error) {
	z, err := zstd.NewWriter(nil)
	if err != nil {
		return nil, err
	}
	defer z.Close()
	e := &encoder{o: o, raw: raw, zstd: z, toc: chunked.TOC{Version: chunked.TOCVersion, Entries: []chunked.Entry{}}}
	if err := e.walk(); err != nil {
		return nil, err
	}
	return e.finish()
}

// position counts the bytes that a tar.Reader has read. It has no Seek, so nothing is skipped.
type position struct {
	r *bytes.Reader
	n int
}

func (p *position) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.n += n
	return n, err
}

func (e *encoder) walk() error {
	at := &position{r: bytes.NewReader(e.raw)}
	t := tar.NewReader(at)
	end := 0
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if err := e.segment(e.raw[end:at.n]); err != nil {
			return err
		}
		if err := e.entry(h, e.raw[at.n:at.n+int(h.Size)]); err != nil {
			return err
		}
		end = at.n + int(h.Size)
	}
	return e.segment(e.raw[end:])
}

func (e *encoder) segment(b []byte) error {
	e.blob.Write(e.zstd.EncodeAll(b, nil))
	return e.line(SplitEntry{Type: 2, Payload: b})
}

func (e *encoder) line(s SplitEntry) error {
	s.Position = len(e.lines)
	b, err := json.Marshal(s)
	e.lines = append(e.lines, b)
	return err
}

var types = map[byte]string{
	tar.TypeReg: chunked.TypeReg, tar.TypeLink: chunked.TypeLink, tar.TypeSymlink: chunked.TypeSymlink,
	tar.TypeDir: chunked.TypeDir, tar.TypeChar: chunked.TypeChar, tar.TypeBlock: chunked.TypeBlock,
	tar.TypeFifo: chunked.TypeFIFO,
}

func (e *encoder) entry(h *tar.Header, contents []byte) error {
	if types[h.Typeflag] == "" {
		return fmt.Errorf("%s: type %q", h.Name, h.Typeflag)
	}
	file := chunked.Entry{
		Type: types[h.Typeflag], Name: h.Name, Linkname: h.Linkname, Mode: h.Mode, Size: h.Size, UID: h.Uid, GID: h.Gid,
		ModTime: &h.ModTime,
	}
	if len(contents) == 0 {
		e.toc.Entries = append(e.toc.Entries, file)
		return e.line(SplitEntry{Type: 1, Name: h.Name})
	}
	file.Digest, file.Offset = digest.FromBytes(contents), int64(e.blob.Len())
	step := len(contents)
	if e.o.Chunk > 0 {
		step = min(step, e.o.Chunk)
	}
	var chunks []chunked.Entry
	for off := 0; off < len(contents); off += step {
		b := contents[off:min(off+step, len(contents))]
		c := chunked.Entry{
			Type: chunked.TypeChunk, Name: h.Name, Offset: int64(e.blob.Len()), ChunkOffset: int64(off),
			ChunkSize: int64(len(b)), ChunkDigest: digest.FromBytes(b),
		}
		if len(bytes.Trim(b, "\x00")) == 0 {
			c.ChunkType = chunked.ChunkZeros
		}
		frame := e.zstd.EncodeAll(b, nil)
		if e.o.Frame != nil {
			frame = e.o.Frame(path.Clean(h.Name), frame)
		}
		e.blob.Write(frame)
		chunks = append(chunks, c)
	}
	file.EndOffset = int64(e.blob.Len())
	if len(chunks) > 1 {
		file.ChunkSize, file.ChunkDigest, file.ChunkType = chunks[0].ChunkSize, chunks[0].ChunkDigest,
			chunks[0].ChunkType
	}
	e.toc.Entries = append(append(e.toc.Entries, file), chunks[1:]...)
	return e.line(SplitEntry{Type: 1, Name: h.Name, Size: h.Size, Payload: make([]byte, 8)})
}

// finish writes the tables.
func (e *encoder) finish() (*Layer, error) {
	if e.o.Split != nil {
		e.lines = e.o.Split(e.lines)
	}
	split := append(bytes.Join(e.lines, []byte("\n")), '\n')
	stored := e.zstd.EncodeAll(split, nil)
	e.toc.TarSplitDigest = digest.FromBytes(stored)
	if e.o.TOC != nil {
		e.o.TOC(&e.toc)
	}
	toc, err := json.Marshal(e.toc)
	if err != nil {
		return nil, err
	}
	storedTOC := e.zstd.EncodeAll(toc, nil)
	a := map[string]string{chunked.AnnotationTOCDigest: digest.FromBytes(storedTOC).String()}
	at := e.skippable(storedTOC)
	a[chunked.AnnotationTOCPosition] = fmt.Sprintf("%d:%d:%d:%d", at, len(storedTOC), len(toc), chunked.TOCType)
	at = e.skippable(stored)
	a[chunked.AnnotationTarSplitPosition] = fmt.Sprintf("%d:%d:%d", at, len(stored), len(split))
	return &Layer{
		Blob: e.blob.Bytes(), DiffID: digest.FromBytes(e.raw),
		Desc: ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerZstd, Digest: digest.FromBytes(e.blob.Bytes()),
			Size:        int64(e.blob.Len()),
			Annotations: a,
		},
	}, nil
}

// skippable appends a skippable frame and returns the offset of its payload.
func (e *encoder) skippable(b []byte) int {
	e.blob.WriteString(chunked.SkippableMagic)
	e.blob.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(b))))
	at := e.blob.Len()
	e.blob.Write(b)
	return at
}
