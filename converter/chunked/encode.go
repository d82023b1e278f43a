package chunked

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"runtime"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// ErrUnsuitable is wrapped if a tar has something that a table of contents cannot express or
// containers/storage refuses to read. Such a layer stays unchanged.
var ErrUnsuitable = errors.New("not suitable for zstd:chunked")

// maxEncodedTOC bounds the decompressed table of contents, in bytes. It is the limit of containers/storage.
const maxEncodedTOC = 150 << 20

// Encoded describes a blob that Encode wrote.
type Encoded struct {
	Digest digest.Digest // of the blob
	Size   int64         // of the blob, in bytes
	// DiffID is the digest of the decompressed blob, which equals the tar built from tar-split and contents.
	DiffID digest.Digest
	// Annotations are those for the layer's descriptor.
	Annotations map[string]string
	// Files is the number of files with contents.
	Files int
}

// Encode reads the tar of a layer to its end and writes it to w as zstd:chunked. workers is the number of
// compressing goroutines, each with about 50 MiB of memory; 0 means one for each core. The output does not
// depend on workers. The caller compares the DiffID with that of the configuration before it uses the blob.
//
// Errors of r, w and ctx are wrapped. An error of the tar itself wraps ErrUnsuitable.
func Encode(ctx context.Context, w io.Writer, r io.Reader, workers int) (*Encoded, error) {
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	blob := &blobWriter{w: w, h: sha256.New()}
	split := newTable()
	p := newPipeline(ctx, blob, workers)
	s := &scanner{ctx: p.ctx, src: &source{r: r}, out: p, split: split, diffID: sha256.New()}
	entries, err := s.run()
	if pipeErr := p.close(err); pipeErr != nil {
		return nil, pipeErr
	}
	toc := newTable()
	if err := split.Close(); err != nil {
		return nil, err
	}
	t := TOC{
		Version: TOCVersion, Entries: place(entries, p.frames),
		TarSplitDigest: digest.FromBytes(split.out.Bytes()),
	}
	if err := json.NewEncoder(toc).Encode(t); err != nil {
		return nil, fmt.Errorf("table of contents: %w", err)
	}
	if err := toc.Close(); err != nil {
		return nil, err
	}
	if toc.raw > maxEncodedTOC {
		return nil,
			fmt.Errorf("%w: its table of contents has %d bytes, expected at most %d", ErrUnsuitable, toc.raw,
				maxEncodedTOC)
	}
	return finish(blob, toc, split, &Encoded{DiffID: digest.NewDigest(digest.SHA256, s.diffID), Files: s.files})
}

// finish writes the tables and the footer.
func finish(blob *blobWriter, toc, split *table, e *Encoded) (*Encoded, error) {
	f := Footer{Type: TOCType}
	f.TOC = Position{blob.n + skippableHeaderSize, int64(toc.out.Len()), toc.raw}
	f.TarSplit = Position{f.TOC.Offset + f.TOC.Length + skippableHeaderSize, int64(split.out.Len()), split.raw}
	e.Annotations = map[string]string{
		AnnotationTOCDigest:        digest.FromBytes(toc.out.Bytes()).String(),
		AnnotationTOCPosition:      fmt.Sprintf("%s:%d", f.TOC, f.Type),
		AnnotationTarSplitPosition: f.TarSplit.String(),
	}
	for _, payload := range [][]byte{toc.out.Bytes(), split.out.Bytes(), f.encode()} {
		if err := blob.skippable(payload); err != nil {
			return nil, err
		}
	}
	e.Digest, e.Size = digest.NewDigest(digest.SHA256, blob.h), blob.n
	return e, nil
}

// place sets the places of the entries' contents and adds entries for further chunks.
func place(entries []Entry, frames []frame) []Entry {
	further := 0
	for _, f := range frames {
		if f.offset > 0 {
			further++
		}
	}
	placed := make([]Entry, 0, len(entries)+further)
	for i, e := range entries {
		n := 0
		for n < len(frames) && frames[n].entry == i {
			n++
		}
		own := frames[:n]
		frames = frames[n:]
		if n > 0 {
			e.Offset, e.EndOffset = own[0].start, own[n-1].end
		}
		if n == 1 {
			e.Digest = own[0].digest()
		}
		if n > 1 {
			e.ChunkSize, e.ChunkDigest = own[0].size, own[0].digest()
			own = own[1:]
		} else {
			own = nil
		}
		placed = append(placed, e)
		for _, f := range own {
			placed = append(placed, Entry{
				Type: TypeChunk, Name: e.Name, Offset: f.start,
				ChunkOffset: f.offset, ChunkSize: f.size, ChunkDigest: f.digest(),
			})
		}
	}
	return placed
}

// level is the level of containers/storage minus one. It compresses three times as fast; compressing
// whole files instead of 64 KiB chunks makes up for the loss.
const level = zstd.SpeedBetterCompression

// blobWriter counts and hashes what it writes.
type blobWriter struct {
	w io.Writer
	h hash.Hash
	n int64
}

func (b *blobWriter) Write(p []byte) (int, error) {
	n, err := b.w.Write(p)
	b.h.Write(p[:n])
	b.n += int64(n)
	return n, err
}

func (b *blobWriter) skippable(payload []byte) error {
	if _, err := b.Write(skippableHeader(len(payload))); err != nil {
		return err
	}
	_, err := b.Write(payload)
	return err
}
