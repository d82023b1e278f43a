package chunked

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
)

// Contents finds contents of files by their SHA-256.
type Contents interface {
	// Find returns the contents if it has them. The reader stays valid until the tar is read.
	Find(sum [32]byte, size int64) (io.ReaderAt, bool)
}

// Options control how contents are fetched.
type Options struct {
	// Parallel is the number of concurrent requests, each for at most 4 MiB. 0 means 8.
	Parallel int
	// SpoolDir is the directory of an unnamed file for contents that occur again later. It is created when needed.
	SpoolDir string
}

// Plan says which contents of a layer have to be fetched.
type Plan struct {
	t     *Tables
	files []planned // parallel to Tables.Files
	parts []span

	// Have and Missing are the bytes of distinct contents that were found and that have to be fetched.
	Have, Missing int64
	// Fetch is the number of bytes to fetch from the blob, small gaps included, and Ranges the number of requests.
	Fetch  int64
	Ranges int
}

// Pays reports whether fetching files beats fetching the blob of size blob. It does not if most files are
// missing: containerd fetches the blobs of all layers concurrently, but skips layers one after the other.
func (p *Plan) Pays(blob int64) bool { return p.Fetch <= blob/2 }

// planned is the origin of a file's contents: a reader that has them, an earlier file, or else the blob.
type planned struct {
	have     io.ReaderAt
	earlier  int  // 1 + index of the earlier file
	repeated bool // a later file has the same contents
}

type contentKey struct {
	sum  [32]byte
	size int64
}

// NewPlan looks up all contents of a layer in have.
func NewPlan(t *Tables, have Contents) *Plan {
	p := &Plan{t: t, files: make([]planned, len(t.Files))}
	first := make(map[contentKey]int, len(t.Files))
	var spans []span
	needed := t.Stored
	for i := range t.Files {
		f := &t.Files[i]
		key := contentKey{f.Sum, f.Size}
		if at, ok := first[key]; ok {
			p.files[i] = p.files[at]
			if p.files[at].have == nil {
				p.files[i].earlier, p.files[at].repeated = at+1, true
			}
			continue
		}
		first[key] = i
		if r, ok := have.Find(f.Sum, f.Size); ok {
			p.files[i].have = r
			p.Have += f.Size
			continue
		}
		p.Missing += f.Size
		for _, c := range t.chunks[f.first:f.end] {
			if !c.zeros {
				spans = append(spans, span{c.from, c.to})
				needed += c.to - c.from
			}
		}
	}
	p.parts = cut(join(spans, needed))
	p.Ranges = len(p.parts)
	for _, s := range p.parts {
		p.Fetch += s.to - s.from
	}
	return p
}

// Tar returns the tar of the layer: tar-split with contents filled in, fetched ones verified. Only the
// tar's digest shows whether it is correct. Cancelling ctx ends reads. The caller closes it.
func (p *Plan) Tar(ctx context.Context, src Source, o Options) (io.ReadCloser, error) {
	if o.Parallel == 0 {
		o.Parallel = 8
	}
	z, err := unpack(p.t.tarSplit, p.t.raw)
	if err != nil {
		return nil, err
	}
	r := &replay{plan: p, split: z, lines: bufio.NewScanner(z)}
	r.lines.Buffer(make([]byte, 0, 64<<10), maxLine)
	r.contents, err = newContents(ctx, p, src, o)
	if err != nil {
		z.Close()
		return nil, err
	}
	return r, nil
}

// replay reads the tar of a layer. Close may be called during Read and ends it.
type replay struct {
	mu       sync.Mutex // held by Read, and while Close closes its inputs
	plan     *Plan
	split    *unpacked
	lines    *bufio.Scanner
	contents *contents
	files    int       // number of files begun
	cur      io.Reader // a segment or a file's contents
	segment  bytes.Reader
	err      error
}

// Read implements io.Reader.
func (r *replay) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.err == nil {
		if r.cur == nil {
			r.err = r.next()
			continue
		}
		n, err := r.cur.Read(b)
		switch {
		case errors.Is(err, io.EOF):
			r.cur = nil
		case err != nil:
			r.err = err
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, r.err
}

// Entry types of tar-split.
const (
	splitFile    = 1
	splitSegment = 2
)

// splitEntry is one line of tar-split.
type splitEntry struct {
	Type    int    `json:"type"`
	Name    string `json:"name"`
	NameRaw []byte `json:"name_raw"` // a name that is not UTF-8
	Size    int64  `json:"size"`
	Payload []byte `json:"payload"` // bytes of a segment; for a file a CRC, which proves nothing
}

// next starts the next entry of tar-split. It returns io.EOF at the end.
func (r *replay) next() error {
	if !r.lines.Scan() {
		err := r.lines.Err()
		switch {
		case errors.Is(err, bufio.ErrTooLong):
			return fmt.Errorf("tar-split: an entry of more than %d bytes: %w", maxLine, ErrTooLarge)
		case err != nil:
			return err
		case r.files != len(r.plan.t.Files):
			return invalidf("tar-split has %d files with contents, expected %d", r.files, len(r.plan.t.Files))
		}
		return io.EOF
	}
	var e splitEntry
	if err := json.Unmarshal(r.lines.Bytes(), &e); err != nil {
		return invalidf("tar-split: %v", err)
	}
	switch e.Type {
	case splitSegment:
		r.segment.Reset(e.Payload)
		r.cur = &r.segment
	case splitFile:
		return r.file(&e)
	default:
		return invalidf("tar-split: entry of type %d", e.Type)
	}
	return nil
}

// file starts the contents of a file.
func (r *replay) file(e *splitEntry) error {
	if e.Size == 0 {
		return nil
	}
	name := e.Name
	if len(e.NameRaw) > 0 {
		name = string(e.NameRaw)
	}
	if r.files == len(r.plan.t.Files) {
		return invalidf("tar-split has file %.100q, which the table of contents has not", name)
	}
	f := &r.plan.t.Files[r.files]
	// JSON cannot hold invalid UTF-8, so compare names after replacing it.
	if strings.ToValidUTF8(name, "\uFFFD") != strings.ToValidUTF8(f.Name, "\uFFFD") || e.Size != f.Size {
		return invalidf("tar-split has file %.100q of %d bytes where the table of contents has %.100q of %d",
			name, e.Size, f.Name, f.Size)
	}
	var err error
	r.cur, err = r.contents.open(r.files)
	r.files++
	return err
}

// Close implements io.Closer.
func (r *replay) Close() error {
	r.contents.fetch.cancel() // ends a Read that waits for the registry
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = os.ErrClosed
	r.split.Close()
	return r.contents.Close()
}
