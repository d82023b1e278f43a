package pool

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// Batch holds contents that are being put until a layer holds them. Put is safe for concurrent use; CommitLayer and
// Discard wait for nobody: they are called when all Puts have returned.
type Batch struct {
	p *Pool

	mu   sync.Mutex
	held map[*extent]bool
	done bool
}

// Begin starts a batch. Discard it when done with it, also after CommitLayer, where that does nothing.
func (p *Pool) Begin() *Batch { return &Batch{p: p, held: map[*extent]bool{}} }

// Put stores exactly size bytes from r, or finds them stored already, and returns where they are: Data.Off is an
// address in the pool. The batch holds them. The rest of their last page is zero. Contents of size 0 have no place.
//
// Errors: ErrFull, ErrClosed, those of r (io.ErrUnexpectedEOF if it is shorter) and of ctx. After an error the batch is
// as it was before.
func (b *Batch) Put(ctx context.Context, size int64, r io.Reader) (daxfs.Data, error) {
	if err := ctx.Err(); err != nil {
		return daxfs.Data{}, err
	}
	var e *extent
	var err error
	switch {
	case size < 0:
		return daxfs.Data{}, fmt.Errorf("pool: put of %d bytes: %w", size, ErrInvalid)
	case size == 0:
		return daxfs.Data{}, nil
	case size <= smallMax:
		e, err = b.p.putSmall(ctx, int(size), r)
	default:
		e, err = b.p.putLarge(ctx, size, r)
	}
	if err != nil {
		return daxfs.Data{}, err
	}
	b.mu.Lock()
	done, again := b.done, b.held[e]
	if !done {
		b.held[e] = true
	}
	b.mu.Unlock()
	if done || again {
		b.p.unref(e)
	}
	if done {
		return daxfs.Data{}, fmt.Errorf("pool: put into a finished batch: %w", ErrClosed)
	}
	return daxfs.Data{Off: e.off, Size: e.size, Sum: e.sum}, nil
}

// putSmall reads all of the contents, then looks for them, then writes them.
func (p *Pool) putSmall(ctx context.Context, size int, r io.Reader) (*extent, error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	body := (*buf)[:size]
	if err := readFull(r, body); err != nil {
		return nil, err
	}
	key := sumKey{sumOf(body), int64(size)}
	equal := func(e *extent) (bool, error) { return p.equalBytes(e.off, body) }
	e, shared, err := p.share(ctx, key, equal, func() (*extent, error) {
		e, err := p.newExtent(int64(size))
		if err == nil {
			e.ready = make(chan struct{})
		}
		return e, err
	})
	if err != nil || shared {
		return e, err
	}
	err = p.write(padded(*buf, size), e.off)
	p.finish(e, err)
	if err != nil {
		p.unref(e)
		return nil, err
	}
	return e, nil
}

// putLarge compares while it reads: as long as an extent of that size has had the same bytes, nothing is written. From
// the first difference on the contents are streamed into an extent of their own. So putting what is there already
// needs no space, in a full pool too.
func (p *Pool) putLarge(ctx context.Context, size int64, r io.Reader) (*extent, error) {
	like := p.ofSize(size)
	defer func() { p.unref(like...) }()
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	h := sha256.New()
	var own *extent
	abort := func(err error) (*extent, error) {
		if own != nil {
			p.unref(own)
		}
		return nil, err
	}
	for at := int64(0); at < size; {
		if err := ctx.Err(); err != nil {
			return abort(err)
		}
		n := int(min(size-at, chunk))
		part := (*buf)[:n]
		if err := readFull(r, part); err != nil {
			return abort(err)
		}
		_, _ = h.Write(part) // never fails
		if own == nil {
			same, err := p.stillEqual(like, at, part)
			if err != nil {
				return abort(err)
			}
			if len(same) == 0 {
				own, err = p.startLarge(size, like, at)
				if err != nil {
					return abort(err)
				}
				// The bytes in buf were not written yet; startLarge has buffers of its own.
			}
			p.unref(without(like, same)...)
			like = same
		}
		if own != nil {
			if err := p.write(padded(*buf, n), own.off+at); err != nil {
				return abort(err)
			}
		}
		at += int64(n)
	}
	if own == nil {
		e := like[0]
		like = like[1:]
		return e, nil
	}
	return p.settle(ctx, own, [32]byte(h.Sum(nil)))
}

// settle lists a large extent that was written, unless the same contents were put meanwhile.
func (p *Pool) settle(ctx context.Context, own *extent, sum [32]byte) (*extent, error) {
	equal := func(e *extent) (bool, error) { return p.equalExtents(e.off, own.off, own.size) }
	e, shared, err := p.share(ctx, sumKey{sum, own.size}, equal, func() (*extent, error) { return own, nil })
	if err != nil || shared {
		p.unref(own)
	}
	return e, err
}

// ofSize returns the ready extents of a size, referenced.
func (p *Pool) ofSize(size int64) []*extent {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*extent
	for _, e := range p.bySize[size] {
		if e.ready == nil {
			e.refs++
			out = append(out, e)
		}
	}
	return out
}

// stillEqual returns those of es whose bytes at a place are part.
func (p *Pool) stillEqual(es []*extent, at int64, part []byte) ([]*extent, error) {
	var same []*extent
	for _, e := range es {
		ok, err := p.equalBytes(e.off+at, part)
		if err != nil {
			return nil, err
		}
		if ok {
			same = append(same, e)
		}
	}
	return same, nil
}

// startLarge makes an extent whose first at bytes are those of any of like.
func (p *Pool) startLarge(size int64, like []*extent, at int64) (*extent, error) {
	p.mu.Lock()
	own, err := p.newExtent(size)
	p.mu.Unlock()
	if err != nil || at == 0 {
		return own, err
	}
	if err := p.copyRange(own.off, like[0].off, at); err != nil {
		p.unref(own)
		return nil, err
	}
	return own, nil
}

func (p *Pool) copyRange(to, from, n int64) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for at := int64(0); at < n; at += chunk {
		part := (*buf)[:min(chunk, n-at)]
		if _, err := p.region.ReadAt(part, from+at); err != nil {
			return fmt.Errorf("pool: read %d bytes at %d: %w", len(part), from+at, err)
		}
		if err := p.write(part, to+at); err != nil {
			return err
		}
	}
	return nil
}

// padded returns the first n bytes of buf and zeros up to the end of the page.
func padded(buf []byte, n int) []byte {
	full := int(alloc.RoundUnit(int64(n)))
	clear(buf[n:full])
	return buf[:full]
}

func without(es, gone []*extent) []*extent {
	keep := map[*extent]bool{}
	for _, e := range gone {
		keep[e] = true
	}
	var out []*extent
	for _, e := range es {
		if !keep[e] {
			out = append(out, e)
		}
	}
	return out
}

func readFull(r io.Reader, b []byte) error {
	if _, err := io.ReadFull(r, b); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("pool: contents: %w", err)
	}
	return nil
}

// CommitLayer makes the batch's contents the layer key with a payload of the caller's, durably. If there is such a
// layer already it stays as it is and the batch is discarded. After an error the batch may be committed again or
// discarded.
func (b *Batch) CommitLayer(ctx context.Context, key string, payload []byte) error {
	if err := checkKey(key); err != nil {
		return fmt.Errorf("pool: layer: %w", err)
	}
	p := b.p
	p.commit.Lock()
	defer p.commit.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	held, err := b.finish()
	if err != nil {
		return err
	}
	if err := p.commitLayer(key, payload, held); err != nil {
		b.reopen(held)
		return fmt.Errorf("pool: layer %q: %w", key, err)
	}
	return nil
}

// commitLayer turns the references of a batch into a layer's. Preconditions: commit is held.
func (p *Pool) commitLayer(key string, payload []byte, held []*extent) error {
	p.mu.Lock()
	_, exists := p.layers[key]
	closed := p.closed
	p.mu.Unlock()
	if closed {
		return fmt.Errorf("pool: %w", ErrClosed)
	}
	if exists {
		p.unref(held...)
		return nil
	}
	if err := p.sync(held); err != nil {
		return err
	}
	if err := p.index.putLayer(key, payload, ids(held)); err != nil {
		return err
	}
	p.mu.Lock()
	p.layers[key] = held
	p.mu.Unlock()
	return nil
}

// Discard ends a batch and frees what nobody else holds.
func (b *Batch) Discard() {
	if held, err := b.finish(); err == nil {
		b.p.unref(held...)
	}
}

func (b *Batch) finish() ([]*extent, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.done {
		return nil, fmt.Errorf("pool: batch: %w", ErrClosed)
	}
	b.done = true
	held := make([]*extent, 0, len(b.held))
	for e := range b.held {
		held = append(held, e)
	}
	b.held = nil
	return byOffset(held), nil
}

func (b *Batch) reopen(held []*extent) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done = false
	b.held = make(map[*extent]bool, len(held))
	for _, e := range held {
		b.held[e] = true
	}
}
