package chunked

import (
	"context"
	"crypto/sha256"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
)

const (
	// inFlight bounds the bytes of pieces that wait to be compressed or written.
	inFlight = 32 << 20
	// pieceCost is the cost of a piece in addition to its bytes.
	pieceCost = 1 << 10
)

// piece is a part of the tar that becomes one frame.
type piece struct {
	data, frame []byte
	entry       int   // index of the entry with the contents; negative between contents
	offset      int64 // offset of data in the contents
	sum         [sha256.Size]byte
	done        chan struct{} // receives a value when frame and sum are set
}

var pieces = sync.Pool{New: func() any { return &piece{done: make(chan struct{}, 1)} }}

func (p *piece) cost() int64 { return pieceCost + int64(len(p.data)) }

// frame is the place of a piece of contents in the blob.
type frame struct {
	entry        int
	offset, size int64 // in the contents
	start, end   int64 // in the blob
	sum          [sha256.Size]byte
}

func (f *frame) digest() digest.Digest { return digest.NewDigestFromBytes(digest.SHA256, f.sum[:]) }

// pipeline compresses pieces in parallel and writes them in the order of add.
type pipeline struct {
	ctx    context.Context // ends with the first error
	cancel context.CancelCauseFunc
	group  *errgroup.Group
	room   *semaphore.Weighted
	work   chan *piece
	order  chan *piece
	blob   *blobWriter
	frames []frame // of contents; valid once close has returned
}

func newPipeline(ctx context.Context, blob *blobWriter, workers int) *pipeline {
	p := &pipeline{
		room: semaphore.NewWeighted(inFlight), blob: blob,
		work: make(chan *piece, inFlight/pieceCost), order: make(chan *piece, inFlight/pieceCost),
	}
	ctx, p.cancel = context.WithCancelCause(ctx)
	p.group, p.ctx = errgroup.WithContext(ctx)
	for range workers {
		p.group.Go(p.compress)
	}
	p.group.Go(p.write)
	return p
}

// add passes a piece on. The channels have room for all pieces that the semaphore admits.
func (p *pipeline) add(c *piece) error {
	if err := p.room.Acquire(p.ctx, c.cost()); err != nil {
		return context.Cause(p.ctx)
	}
	p.order <- c
	p.work <- c
	return nil
}

// close waits for all pieces. err is the error that stopped the producer, if any. The first error is returned.
func (p *pipeline) close(err error) error {
	if err != nil {
		p.cancel(err)
	}
	close(p.work)
	close(p.order)
	pipeErr := p.group.Wait()
	p.cancel(nil)
	if err != nil {
		return err
	}
	return pipeErr
}

func (p *pipeline) compress() error {
	z := encoders.Get().(*zstd.Encoder)
	defer encoders.Put(z)
	for c := range p.work {
		if p.ctx.Err() != nil {
			return context.Cause(p.ctx)
		}
		c.frame = z.EncodeAll(c.data, c.frame[:0])
		if c.entry >= 0 {
			c.sum = sha256.Sum256(c.data)
		}
		c.done <- struct{}{}
	}
	return nil
}

func (p *pipeline) write() error {
	for c := range p.order {
		select {
		case <-c.done:
		case <-p.ctx.Done():
			return context.Cause(p.ctx)
		}
		start := p.blob.n
		if n, err := p.blob.Write(c.frame); err != nil {
			return err
		} else if n < len(c.frame) {
			return io.ErrShortWrite
		}
		if c.entry >= 0 {
			p.frames = append(p.frames, frame{c.entry, c.offset, int64(len(c.data)), start, p.blob.n, c.sum})
		}
		p.room.Release(c.cost())
		pieces.Put(c)
	}
	return nil
}
