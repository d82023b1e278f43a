package blob

import (
	"context"
	"errors"
	"hash"
	"io"
	"sync"
	"sync/atomic"
)

const (
	// chunkSize is the unit in which the stages of a Reader hand bytes over. It fits the second-level cache of one
	// core, so that the stage that reads a chunk next mostly finds it there.
	chunkSize = 256 << 10
	// depth is how many chunks may wait between two stages. The parser stops for the write of a file, the
	// decompressor does not have to.
	depth = 4
)

// chunk is a buffer that several stages read at the same time. The last one to release it gives it back.
type chunk struct {
	buf  [chunkSize]byte
	n    int
	refs atomic.Int32
}

var chunks = sync.Pool{New: func() any { return new(chunk) }}

func newChunk() *chunk {
	c := chunks.Get().(*chunk)
	c.n = 0
	c.refs.Store(1)
	return c
}

func (c *chunk) bytes() []byte { return c.buf[:c.n] }

func (c *chunk) release() {
	if c.refs.Add(-1) == 0 {
		chunks.Put(c)
	}
}

// hasher hashes chunks in a goroutine of its own, in the order in which they were given.
type hasher struct {
	h    hash.Hash
	in   chan *chunk
	done chan struct{}
}

func newHasher(h hash.Hash) *hasher {
	s := &hasher{h: h, in: make(chan *chunk, depth), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		for c := range s.in {
			s.h.Write(c.bytes())
			c.release()
		}
	}()
	return s
}

// add shares c with the hasher. Hashers never fail, so that this never blocks for ever.
func (s *hasher) add(c *chunk) {
	c.refs.Add(1)
	s.in <- c
}

// close waits for the hash of all that was added.
func (s *hasher) close() {
	close(s.in)
	<-s.done
}

// stream is one direction between two stages: a bounded queue of chunks that ends with an error or io.EOF.
type stream struct {
	ctx context.Context
	ch  chan *chunk
	err error // why ch was closed; io.EOF at the regular end. Set before ch is closed.
}

func newStream(ctx context.Context) *stream {
	return &stream{ctx: ctx, ch: make(chan *chunk, depth)}
}

// send hands c over, or releases it and returns the context's error when nobody wants it any more.
func (s *stream) send(c *chunk) error {
	select {
	case s.ch <- c:
		return nil
	case <-s.ctx.Done():
		c.release()
		return context.Cause(s.ctx)
	}
}

func (s *stream) close(err error) {
	if err == nil {
		err = io.EOF
	}
	s.err = err
	close(s.ch)
}

func (s *stream) next() (*chunk, error) {
	c, ok := <-s.ch
	if !ok {
		return nil, s.err
	}
	return c, nil
}

// reader reads a stream as bytes. It is not safe for concurrent use.
type reader struct {
	s   *stream
	cur *chunk
	pos int
	err error // of the stream, once it was met
}

func (r *reader) fill() error {
	for r.cur == nil || r.pos == r.cur.n {
		if r.cur != nil {
			r.cur.release()
			r.cur = nil
		}
		c, err := r.s.next()
		if err != nil {
			r.err = err
			return err
		}
		r.cur, r.pos = c, 0
	}
	return nil
}

func (r *reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := r.fill(); err != nil {
		return 0, err
	}
	n := copy(p, r.cur.buf[r.pos:r.cur.n])
	r.pos += n
	return n, nil
}

// WriteTo lets io.Copy take whole chunks without a buffer of its own.
func (r *reader) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		if err := r.fill(); errors.Is(err, io.EOF) {
			return total, nil
		} else if err != nil {
			return total, err
		}
		n, err := w.Write(r.cur.buf[r.pos:r.cur.n])
		r.pos += n
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
}

// drop releases what is left, in and behind the current chunk.
func (r *reader) drop() {
	if r.cur != nil {
		r.cur.release()
		r.cur = nil
	}
	for c := range r.s.ch {
		c.release()
	}
}
