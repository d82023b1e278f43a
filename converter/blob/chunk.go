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
	// chunkSize is the unit of transfer between the stages of a Reader. It fits a core's second-level
	// cache, so the next stage mostly finds a chunk there.
	chunkSize = 256 << 10
	// depth is the number of chunks that may wait between two stages: the decompressor can continue while
	// the parser waits for a write.
	depth = 4
)

// chunk is a buffer shared by several stages. The last one to release it returns it to the pool.
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

// hasher hashes chunks in its own goroutine, in the order of add.
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

// add shares c with the hasher. A hasher never fails, so add never blocks for ever.
func (s *hasher) add(c *chunk) {
	c.refs.Add(1)
	s.in <- c
}

// close waits until all added chunks are hashed.
func (s *hasher) close() {
	close(s.in)
	<-s.done
}

// stream is a bounded queue of chunks between two stages, which ends with an error or io.EOF.
type stream struct {
	ctx context.Context
	ch  chan *chunk
	err error // why ch was closed, io.EOF at the regular end; set before ch is closed
}

func newStream(ctx context.Context) *stream {
	return &stream{ctx: ctx, ch: make(chan *chunk, depth)}
}

// send passes c on, or releases it and returns the context's cause if ctx is done.
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
	err error // of the stream, once reached
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

// WriteTo lets io.Copy use whole chunks without an additional buffer.
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

// drop releases the current and all remaining chunks.
func (r *reader) drop() {
	if r.cur != nil {
		r.cur.release()
		r.cur = nil
	}
	for c := range r.s.ch {
		c.release()
	}
}
