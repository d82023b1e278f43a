package chunked

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
)

var (
	// ErrNotChunked reports a layer without annotated tables, or tables without a proof of the diff ID:
	// another format, or an old version of this one.
	ErrNotChunked = errors.New("the layer is not zstd:chunked with tar-split")
	// ErrInvalid reports tables that contradict each other, the format, or their blob.
	ErrInvalid = errors.New("invalid zstd:chunked layer")
	// ErrTooLarge reports tables or contents above a limit.
	ErrTooLarge = errors.New("limit of zstd:chunked layers exceeded")
)

func invalidf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, ErrInvalid)...)
}

// Limits of one layer. A layer of 180,000 entries has a table of contents of 64 MiB, 5 MiB compressed.
const (
	maxStored   = 32 << 20 // bytes of a compressed table, which is held in memory
	maxTOC      = 64 << 20 // bytes of the uncompressed table of contents; entries are read one by one
	maxTarSplit = 1 << 30  // bytes, uncompressed; it is never in memory as a whole
	maxEntries  = 1 << 20  // in the table of contents, chunks included
	maxContents = 1 << 50  // bytes of all files: callers add up and compare sizes without overflow
	maxLine     = 8 << 20  // bytes of a line of tar-split: one header with all its PAX records, in base64
	maxWindow   = 64 << 20
)

// Source is a blob with random access.
type Source interface {
	// Part returns exactly the bytes [from, to) of the blob, unverified. It may be called concurrently.
	Part(ctx context.Context, from, to int64) ([]byte, error)
}

// Layout gives the places of a layer's tables and their expected digest.
type Layout struct {
	TOC       Position
	TOCDigest digest.Digest
	TarSplit  Position
	Size      int64 // of the blob
}

// ParseLayout reads the annotations of a layer's descriptor. Errors: ErrNotChunked, ErrInvalid, ErrTooLarge.
func ParseLayout(d ocispec.Descriptor) (Layout, error) {
	a := d.Annotations
	if a[AnnotationTOCDigest] == "" || a[AnnotationTOCPosition] == "" || a[AnnotationTarSplitPosition] == "" {
		return Layout{}, fmt.Errorf("annotations: %w", ErrNotChunked)
	}
	l := Layout{TOCDigest: digest.Digest(a[AnnotationTOCDigest]), Size: d.Size}
	if err := l.TOCDigest.Validate(); err != nil {
		return Layout{}, invalidf("annotation %s: %q: %v", AnnotationTOCDigest, a[AnnotationTOCDigest], err)
	}
	toc, err := numbers(a, AnnotationTOCPosition, 4)
	if err != nil {
		return Layout{}, err
	}
	split, err := numbers(a, AnnotationTarSplitPosition, 3)
	if err != nil {
		return Layout{}, err
	}
	if toc[3] != TOCType {
		return Layout{}, fmt.Errorf("table of contents of type %d, expected %d: %w", toc[3], TOCType, ErrNotChunked)
	}
	l.TOC, l.TarSplit = Position{toc[0], toc[1], toc[2]}, Position{split[0], split[1], split[2]}
	return l, errors.Join(l.check("table of contents", l.TOC, maxTOC), l.check("tar-split", l.TarSplit, maxTarSplit))
}

// numbers parses an annotation of n numbers.
func numbers(annotations map[string]string, name string, n int) ([]int64, error) {
	fields := strings.Split(annotations[name], ":")
	if len(fields) != n {
		return nil, invalidf("annotation %s: %.100q, expected %d numbers", name, annotations[name], n)
	}
	var out []int64
	for _, f := range fields {
		v, err := strconv.ParseUint(f, 10, 63)
		if err != nil {
			return nil, invalidf("annotation %s: %.100q: %v", name, annotations[name], err)
		}
		out = append(out, int64(v))
	}
	return out, nil
}

func (l *Layout) check(what string, p Position, maxRaw int64) error {
	switch {
	case p.Length > maxStored:
		return fmt.Errorf("%s of %d bytes, at most %d: %w", what, p.Length, int64(maxStored), ErrTooLarge)
	case p.Raw > maxRaw:
		return fmt.Errorf("%s of %d bytes uncompressed, at most %d: %w", what, p.Raw, maxRaw, ErrTooLarge)
	case p.Length == 0 || p.Raw == 0:
		return invalidf("%s at %s is empty", what, p)
	case p.Offset < SkippableHeaderSize || p.Offset > l.Size-p.Length:
		return invalidf("%s at %s is outside of a blob of %d bytes", what, p, l.Size)
	}
	return nil
}

// Tables are the verified tables of a layer. They are immutable.
type Tables struct {
	// Files are the regular files with contents, in the order of the tar.
	Files []File
	// Stored is the compressed size of both tables in bytes.
	Stored int64

	chunks   []chunk
	tarSplit []byte // compressed
	raw      int64  // uncompressed length of tar-split
}

// File is a regular file with contents.
type File struct {
	Name string // as in the tar
	Size int64  // > 0
	Sum  [32]byte

	first, end int // indexes in Tables.chunks
}

// chunk is a part of a file's contents. Chunks have the same order in the file and in the blob.
type chunk struct {
	from, to int64 // place of the frames in the blob
	size     int64
	zeros    bool // nothing has to be fetched
}

// ReadTables fetches and verifies the tables of a layer. Errors are those of src and ParseLayout.
func ReadTables(ctx context.Context, src Source, l Layout) (*Tables, error) {
	toc, split, err := fetchTables(ctx, src, l)
	if err != nil {
		return nil, err
	}
	if got := l.TOCDigest.Algorithm().FromBytes(toc); got != l.TOCDigest {
		return nil, mismatch("digest of the table of contents", l.TOCDigest, got)
	}
	t, want, err := parseTOC(toc, l)
	if err != nil {
		return nil, err
	}
	if got := want.Algorithm().FromBytes(split); got != want {
		return nil, mismatch("digest of tar-split", want, got)
	}
	t.tarSplit, t.raw, t.Stored = split, l.TarSplit.Raw, l.TOC.Length+l.TarSplit.Length
	return t, nil
}

func mismatch(what string, want, got digest.Digest) error {
	return fmt.Errorf("%w: %w", &blob.MismatchError{What: what, Want: want.String(), Got: got.String()}, ErrInvalid)
}

// fetchTables fetches both tables. One request suffices if they lie together, as in all known layers.
func fetchTables(ctx context.Context, src Source, l Layout) (toc, split []byte, err error) {
	from := min(l.TOC.Offset, l.TarSplit.Offset)
	to := max(l.TOC.Offset+l.TOC.Length, l.TarSplit.Offset+l.TarSplit.Length)
	if to-from <= l.TOC.Length+l.TarSplit.Length+maxGap {
		b, err := src.Part(ctx, from, to)
		if err != nil {
			return nil, nil, err
		}
		if int64(len(b)) != to-from {
			return nil, nil, invalidf("%d bytes of tables, expected %d", len(b), to-from)
		}
		cut := func(p Position) []byte { return b[p.Offset-from : p.Offset-from+p.Length] }
		return cut(l.TOC), cut(l.TarSplit), nil
	}
	if toc, err = src.Part(ctx, l.TOC.Offset, l.TOC.Offset+l.TOC.Length); err != nil {
		return nil, nil, err
	}
	split, err = src.Part(ctx, l.TarSplit.Offset, l.TarSplit.Offset+l.TarSplit.Length)
	return toc, split, err
}

// unpack returns a reader of a table. It fails unless the table has exactly raw bytes.
func unpack(b []byte, raw int64) (*unpacked, error) {
	z, err := zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, err
	}
	return &unpacked{z: z, left: raw}, nil
}

// unpacked reads exactly left bytes.
type unpacked struct {
	z    *zstd.Decoder
	left int64
}

func (t *unpacked) Read(p []byte) (int, error) {
	n, err := t.z.Read(p)
	if int64(n) > t.left {
		return 0, invalidf("a table is longer than its annotation says")
	}
	t.left -= int64(n)
	switch {
	case errors.Is(err, io.EOF) && t.left > 0:
		return n, invalidf("a table is %d bytes shorter than its annotation says", t.left)
	case err != nil && !errors.Is(err, io.EOF):
		return n, invalidf("a table: %v", err)
	}
	return n, err
}

func (t *unpacked) Close() { t.z.Close() }

// parseTOC reads the table of contents entry by entry: as a whole, it may take a hundred times its size.
func parseTOC(stored []byte, l Layout) (*Tables, digest.Digest, error) {
	z, err := unpack(stored, l.TOC.Raw)
	if err != nil {
		return nil, "", err
	}
	defer z.Close()
	p := tocParser{t: &Tables{}, end: min(l.TOC.Offset, l.TarSplit.Offset) - SkippableHeaderSize}
	if err := p.parse(json.NewDecoder(z)); err != nil {
		if !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrTooLarge) && !errors.Is(err, ErrNotChunked) {
			err = invalidf("table of contents: %v", err)
		}
		return nil, "", err
	}
	return p.t, p.split, nil
}

// entry has those fields of an Entry that locate contents. A crafted table could use the others to
// take much memory.
type entry struct {
	Type        string        `json:"type"`
	Name        string        `json:"name"`
	Size        int64         `json:"size"`
	Digest      digest.Digest `json:"digest"`
	Offset      int64         `json:"offset"`
	EndOffset   int64         `json:"endOffset"`
	ChunkSize   int64         `json:"chunkSize"`
	ChunkOffset int64         `json:"chunkOffset"`
	ChunkType   string        `json:"chunkType"`
}

type tocParser struct {
	t       *Tables
	end     int64 // upper limit of the frames of contents
	at      int64 // end of the frames of the last complete file
	last    int64 // end of the frames of the current file; 0 if its chunks are complete
	done    int64 // bytes in the current file's chunks so far
	total   int64 // bytes of all files
	entries int
	split   digest.Digest
	version int
}

func (p *tocParser) parse(d *json.Decoder) error {
	if err := expect(d, '{'); err != nil {
		return err
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return err
		}
		switch key {
		case "version":
			err = d.Decode(&p.version)
		case "tarSplitDigest":
			err = d.Decode(&p.split)
		case "entries":
			err = p.parseEntries(d)
		default:
			err = skipValue(d)
		}
		if err != nil {
			return err
		}
	}
	if err := expect(d, '}'); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF { // reading to the end verifies the length
		return invalidf("table of contents: bytes behind its end (%v)", err)
	}
	if p.version != TOCVersion {
		return fmt.Errorf("table of contents of version %d, expected %d: %w", p.version, TOCVersion, ErrNotChunked)
	}
	if p.split == "" {
		return fmt.Errorf("the table of contents has no digest of tar-split: %w", ErrNotChunked)
	}
	if err := p.split.Validate(); err != nil {
		return invalidf("digest of tar-split %.100q: %v", p.split, err)
	}
	return p.endFile()
}

func expect(d *json.Decoder, want json.Delim) error {
	t, err := d.Token()
	if err == nil && t != want {
		err = invalidf("table of contents: %v, expected %v", t, want)
	}
	return err
}

func skipValue(d *json.Decoder) error {
	var ignored json.RawMessage
	return d.Decode(&ignored)
}

func (p *tocParser) parseEntries(d *json.Decoder) error {
	if p.entries > 0 {
		return invalidf("table of contents: entries twice")
	}
	t, err := d.Token()
	if err != nil || t == nil { // null: a layer without entries
		return err
	}
	if t != json.Delim('[') {
		return invalidf("table of contents: entries are %v, expected an array", t)
	}
	for d.More() {
		var e entry
		if err := d.Decode(&e); err != nil {
			return err
		}
		if p.entries++; p.entries > maxEntries {
			return fmt.Errorf("table of contents: more than %d entries: %w", maxEntries, ErrTooLarge)
		}
		if err := p.entry(&e); err != nil {
			return fmt.Errorf("table of contents: entry %d (%.100q): %w", p.entries-1, e.Name, err)
		}
	}
	return expect(d, ']')
}

func (p *tocParser) entry(e *entry) error {
	if e.Type == TypeChunk {
		return p.chunk(e)
	}
	if err := p.endFile(); err != nil {
		return err
	}
	switch e.Type {
	case TypeReg:
	case TypeDir, TypeLink, TypeSymlink, TypeChar, TypeBlock, TypeFIFO:
		return nil
	default:
		return invalidf("type %.20q", e.Type)
	}
	if e.Size < 0 {
		return invalidf("size %d", e.Size)
	}
	if e.Size == 0 {
		return nil
	}
	if e.Size > maxContents-p.total {
		return fmt.Errorf("files of more than %d bytes: %w", int64(maxContents), ErrTooLarge)
	}
	p.total += e.Size
	f := File{Name: e.Name, Size: e.Size, first: len(p.t.chunks)}
	if e.Digest.Validate() != nil || e.Digest.Algorithm() != digest.SHA256 {
		return invalidf("digest %.100q, expected a SHA-256", e.Digest)
	}
	if _, err := hex.Decode(f.Sum[:], []byte(e.Digest.Encoded())); err != nil {
		return invalidf("digest %q: %v", e.Digest, err)
	}
	if e.Offset < p.at || e.EndOffset <= e.Offset || e.EndOffset > p.end {
		return invalidf("frames from %d to %d, expected them between %d and %d", e.Offset, e.EndOffset, p.at, p.end)
	}
	c := chunk{from: e.Offset, size: e.Size, zeros: e.ChunkType == ChunkZeros}
	if e.ChunkSize != 0 {
		c.size = e.ChunkSize
	}
	if c.size < 0 || c.size > e.Size || e.ChunkOffset != 0 {
		return invalidf("first chunk of %d bytes at %d, of %d", c.size, e.ChunkOffset, e.Size)
	}
	p.t.chunks = append(p.t.chunks, c)
	f.end = len(p.t.chunks)
	p.t.Files = append(p.t.Files, f)
	p.last, p.done = e.EndOffset, c.size
	return nil
}

// chunk adds another chunk to the current file.
func (p *tocParser) chunk(e *entry) error {
	if p.last == 0 {
		return invalidf("a chunk without a file")
	}
	f := &p.t.Files[len(p.t.Files)-1]
	before := &p.t.chunks[len(p.t.chunks)-1]
	switch {
	case e.Name != f.Name:
		return invalidf("a chunk of another file than %.100q", f.Name)
	case e.ChunkOffset != p.done || e.ChunkSize <= 0 || e.ChunkSize > f.Size-p.done:
		return invalidf("chunk of %d bytes at %d, expected one at %d of %d", e.ChunkSize, e.ChunkOffset, p.done, f.Size)
	case e.Offset <= before.from || e.Offset >= p.last:
		return invalidf("frames from %d, expected them between %d and %d", e.Offset, before.from, p.last)
	}
	before.to = e.Offset
	p.done += e.ChunkSize
	p.t.chunks = append(p.t.chunks, chunk{from: e.Offset, size: e.ChunkSize, zeros: e.ChunkType == ChunkZeros})
	f.end = len(p.t.chunks)
	return nil
}

// endFile checks the current file, whose chunks are now complete.
func (p *tocParser) endFile() error {
	if p.last == 0 {
		return nil
	}
	f := &p.t.Files[len(p.t.Files)-1]
	p.t.chunks[f.end-1].to = p.last
	p.at, p.last = p.last, 0
	if p.done != f.Size {
		return invalidf("file %.100q: chunks of %d bytes, expected %d", f.Name, p.done, f.Size)
	}
	return nil
}
