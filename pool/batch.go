package pool

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"sync"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// Batch holds contents from Put until a layer holds them. Put is safe for concurrent use. CommitLayer
// and Discard do not wait: call them after all Puts have returned.
type Batch struct {
	p *Pool

	mu   sync.Mutex
	held []*extent // may contain an extent several times, each with a reference
	done bool
}

// Begin starts a batch. The caller must Discard it in the end; after CommitLayer that does nothing.
func (p *Pool) Begin() *Batch { return &Batch{p: p} }

// Put stores exactly size bytes from r unless the pool has them, and returns their place: Data.Off is
// an offset in the pool. The batch holds them. The rest of their last page is zero. Empty contents
// have no place.
//
// Errors: ErrFull, ErrClosed, io.ErrUnexpectedEOF, those of r and ctx. They leave the batch unchanged.
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
	done := b.done
	if !done {
		b.held = append(b.held, e)
	}
	b.mu.Unlock()
	if done {
		b.p.unref(e)
		return daxfs.Data{}, fmt.Errorf("pool: put into a finished batch: %w", ErrClosed)
	}
	return daxfs.Data{Off: e.off, Size: e.size, Sum: e.sum}, nil
}

func (p *Pool) putSmall(ctx context.Context, size int, r io.Reader) (*extent, error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	body := (*buf)[:size]
	if err := readFull(r, body); err != nil {
		return nil, err
	}
	key := sumKey{sha256.Sum256(body), int64(size)}
	e, shared, err := p.share(ctx, key, func() (*extent, error) {
		e, err := p.newExtent(int64(size))
		if err == nil {
			e.pending = true
			p.pending[e] = make(chan struct{})
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

// maxAlike limits how many extents putLarge compares with. Contents of an extent beyond the limit are
// still found by digest, after they were written.
const maxAlike = 4

// putLarge compares while it reads: as long as an extent of that size has the same bytes, nothing is
// written. From the first difference on, contents are streamed into a new extent. So contents that
// exist need no space, which matters in a full pool.
func (p *Pool) putLarge(ctx context.Context, size int64, r io.Reader) (*extent, error) {
	w := &largeWrite{p: p, size: size, hash: sha256.New()}
	e, err := w.run(ctx, r)
	p.unref(w.like...)
	if err != nil && w.own != nil {
		p.unref(w.own)
	}
	return e, err
}

// largeWrite is one call of putLarge.
type largeWrite struct {
	p    *Pool
	size int64
	hash hash.Hash
	head [8]byte
	like []*extent // extents with the same bytes so far, referenced
	own  *extent   // the new extent, if all of like differ
}

func (w *largeWrite) run(ctx context.Context, r io.Reader) (*extent, error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for at := int64(0); at < w.size; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n := int(min(w.size-at, chunk))
		part := (*buf)[:n]
		if err := readFull(r, part); err != nil {
			return nil, err
		}
		w.hash.Write(part)
		if at == 0 {
			copy(w.head[:], w.hash.Sum(nil))
			w.like = w.p.alike(headKey{w.head, w.size})
		}
		if w.own == nil {
			if err := w.compare(at, part); err != nil {
				return nil, err
			}
		}
		if w.own != nil {
			if err := w.p.write(padded(*buf, n), w.own.off+at); err != nil {
				return nil, err
			}
		}
		at += int64(n)
	}
	if w.own == nil {
		e := w.like[0]
		w.like = w.like[1:]
		return e, nil
	}
	return w.settle(ctx)
}

// compare drops the extents that differ from part at offset at. If none is left, it starts a new
// extent and copies the beginning.
func (w *largeWrite) compare(at int64, part []byte) (err error) {
	var same, other []*extent
	for _, e := range w.like {
		ok, err := w.p.equalBytes(e.off+at, part)
		if err != nil {
			return err
		}
		if ok {
			same = append(same, e)
		} else {
			other = append(other, e)
		}
	}
	if len(same) == 0 {
		if w.own, err = w.p.startLarge(w.size, w.like, at); err != nil {
			return err
		}
	}
	w.like = same
	w.p.unref(other...)
	return nil
}

// settle lists the written extent, unless the same contents exist by now.
func (w *largeWrite) settle(ctx context.Context) (*extent, error) {
	own := w.own
	own.head = w.head
	key := sumKey{size: own.size}
	w.hash.Sum(key.sum[:0])
	e, shared, err := w.p.share(ctx, key, func() (*extent, error) { return own, nil })
	if err != nil {
		return nil, err
	}
	if shared {
		w.p.unref(own)
	}
	return e, nil
}

// alike returns extents whose contents begin alike, referenced: the newest maxAlike.
func (p *Pool) alike(key headKey) []*extent {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*extent
	for _, e := range slices.Backward(p.heads[key]) {
		if len(out) == maxAlike {
			break
		}
		e.ref()
		out = append(out, e)
	}
	return out
}

// startLarge makes an extent whose first at bytes come from the extents in like, which agree there.
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

func readFull(r io.Reader, b []byte) error {
	if _, err := io.ReadFull(r, b); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("pool: contents: %w", err)
	}
	return nil
}

// CommitLayer durably turns the batch's contents into the layer key with the caller's payload. If the
// layer exists it stays unchanged and the batch is discarded. After an error the batch may be
// committed again or discarded.
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

// commitLayer hands the references of a batch to a layer. Preconditions: commit is held.
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
	if err := p.index.putLayer(key, payload, held); err != nil {
		return err
	}
	p.mu.Lock()
	p.layers[key] = held
	p.mu.Unlock()
	return nil
}

// Discard ends a batch and frees contents that nothing else holds.
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
	held := byOffset(b.held)
	b.held = nil
	once := held[:0]
	var again []*extent
	for i, e := range held {
		if i > 0 && e == held[i-1] {
			again = append(again, e)
		} else {
			once = append(once, e)
		}
	}
	b.p.unref(again...)
	return slices.Clip(once), nil
}

func (b *Batch) reopen(held []*extent) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done = false
	b.held = held
}
