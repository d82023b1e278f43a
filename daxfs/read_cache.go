package daxfs

import (
	"errors"
	"fmt"
	"io"
	"sync"
)

// ReadCache is a reader of an image that caches up to 1 MiB of recently read chunks. A walk through an
// image reads small pieces of metadata that lie together: with a ReadCache most reads cost no system call.
//
// It is safe for concurrent use. The image must not change.
type ReadCache struct {
	r    io.ReaderAt
	size int64

	mu   sync.Mutex
	slot [16]struct {
		off int64
		b   []byte
	}
}

const cacheChunk = 64 << 10

// NewReadCache returns a cache for an image of size bytes.
func NewReadCache(r io.ReaderAt, size int64) *ReadCache { return &ReadCache{r: r, size: size} }

// ReadAt implements io.ReaderAt. Reads of a chunk or more bypass the cache.
func (c *ReadCache) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("daxfs: negative offset %d", off)
	}
	if len(p) >= cacheChunk {
		return c.r.ReadAt(p, off)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for n < len(p) {
		if off >= c.size {
			return n, io.EOF
		}
		b, err := c.chunk(off)
		if err != nil {
			return n, err
		}
		k := copy(p[n:], b)
		n += k
		off += int64(k)
	}
	return n, nil
}

// chunk returns the cached bytes from off (< size) to the end of its chunk. Preconditions: mu is held.
func (c *ReadCache) chunk(off int64) ([]byte, error) {
	start := off &^ (cacheChunk - 1)
	s := &c.slot[start/cacheChunk%int64(len(c.slot))]
	if len(s.b) == 0 || s.off != start {
		n := int(min(cacheChunk, c.size-start))
		if s.b == nil {
			s.b = make([]byte, cacheChunk)
		}
		s.b = s.b[:n]
		if k, err := c.r.ReadAt(s.b, start); k < n {
			s.b = s.b[:0]
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		s.off = start
	}
	return s.b[off-start:], nil
}
