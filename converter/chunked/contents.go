package chunked

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
)

// contents opens the contents of files one after another, in the order of the tar.
type contents struct {
	plan  *Plan
	dir   string
	fetch *fetcher
	zstd  *zstd.Decoder

	spool   *os.File
	spooled int64         // bytes in spool
	places  map[int]int64 // places in spool, by index of the file
}

// newContents fetches nothing. The caller closes the result.
func newContents(ctx context.Context, p *Plan, src Source, o Options) (*contents, error) {
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, err
	}
	return &contents{
		plan: p, dir: o.SpoolDir, fetch: newFetcher(ctx, src, p.parts, o.Parallel), zstd: z, places: map[int]int64{},
	}, nil
}

// open returns the contents of a file. The previous file must have been read to its end.
func (c *contents) open(i int) (io.Reader, error) {
	f, from := &c.plan.t.Files[i], c.plan.files[i]
	switch {
	case from.have != nil:
		return io.NewSectionReader(from.have, 0, f.Size), nil
	case from.earlier > 0:
		return io.NewSectionReader(c.spool, c.places[from.earlier-1], f.Size), nil
	}
	r := &fetched{c: c, file: f, chunk: f.first - 1, hash: sha256.New()}
	if from.repeated {
		if c.spool == nil {
			var err error
			if c.spool, err = openSpool(c.dir); err != nil {
				return nil, err
			}
		}
		c.places[i] = c.spooled
		r.spool = true
	}
	return r, nil
}

// openSpool opens an unnamed file, so that nothing is left after a crash.
func openSpool(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	return os.NewFile(uintptr(fd), dir+"/spool"), nil
}

// Close cancels fetching.
func (c *contents) Close() error {
	c.fetch.Close()
	c.zstd.Close()
	if c.spool != nil {
		return c.spool.Close()
	}
	return nil
}

// fetched reads the contents of a file from the blob.
type fetched struct {
	c     *contents
	file  *File
	chunk int // index of the current chunk
	left  int64
	hash  hash.Hash
	spool bool
}

// Read implements io.Reader. io.EOF means that the contents match the table.
func (r *fetched) Read(p []byte) (int, error) {
	for r.left == 0 {
		if r.chunk++; r.chunk == r.file.end {
			return 0, r.verify()
		}
		if err := r.begin(); err != nil {
			return 0, err
		}
	}
	p = p[:min(int64(len(p)), r.left)]
	n := len(p)
	if r.zeros() {
		clear(p)
	} else {
		var err error
		if n, err = r.c.zstd.Read(p); err != nil && !errors.Is(err, io.EOF) {
			return 0, r.failed(err)
		}
		if errors.Is(err, io.EOF) && int64(n) < r.left {
			return 0, r.failed(invalidf("a chunk ends %d bytes early", r.left-int64(n)))
		}
	}
	r.left -= int64(n)
	r.hash.Write(p[:n])
	if r.spool {
		if _, err := r.c.spool.Write(p[:n]); err != nil {
			return 0, fmt.Errorf("spool of contents that occur again: %w", err)
		}
		r.c.spooled += int64(n)
	}
	if r.left == 0 && !r.zeros() {
		return n, r.end()
	}
	return n, nil
}

func (r *fetched) zeros() bool { return r.c.plan.t.chunks[r.chunk].zeros }

// begin starts the next chunk.
func (r *fetched) begin() error {
	c := &r.c.plan.t.chunks[r.chunk]
	r.left = c.size
	if c.zeros {
		return nil
	}
	if err := r.c.zstd.Reset(&frames{r.c.fetch, c.from, c.to}); err != nil {
		return r.failed(err)
	}
	return nil
}

// end verifies that a chunk has no further bytes. It finds a bomb at the first excess byte.
func (r *fetched) end() error {
	var one [1]byte
	for range 100 { // empty frames
		n, err := r.c.zstd.Read(one[:])
		switch {
		case n > 0:
			return r.failed(invalidf("a chunk is longer than its size"))
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return r.failed(err)
		}
	}
	return r.failed(io.ErrNoProgress)
}

// verify compares the contents with their digest. It returns io.EOF if they match.
func (r *fetched) verify() error {
	if got := [32]byte(r.hash.Sum(nil)); got != r.file.Sum {
		return r.failed(&blob.MismatchError{
			What: "SHA-256", Want: hex.EncodeToString(r.file.Sum[:]), Got: hex.EncodeToString(got[:]),
		})
	}
	return io.EOF
}

func (r *fetched) failed(err error) error {
	return fmt.Errorf("contents of %.100q: %w", r.file.Name, err)
}
