package pool

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"

	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// extent is the contents of one file. All fields but the identity are guarded by Pool.mu, except as noted.
type extent struct {
	extentID
	refs   int  // batches, layers, images, and operations that look at it
	images int  // those of refs that are images
	synced bool // the bytes survive what the region survives
	// ready is closed when the bytes are in place or failed is set; nil if they always were.
	ready  chan struct{}
	failed bool
	listed bool // in Pool.sums and Pool.bySize
}

func (e *extent) span() alloc.Span { return alloc.Span{Off: e.off, Len: alloc.RoundUnit(e.size)} }

// sumKey finds extents that are probably equal. Bytes are compared before one is shared.
type sumKey struct {
	sum  [32]byte
	size int64
}

func (e *extent) key() sumKey { return sumKey{e.sum, e.size} }

const (
	// chunk is how much of a large file is in flight: it is read, hashed and written while in the cache of the core.
	chunk = 256 << 10
	// smallMax is the largest size that is read as a whole before it is looked up.
	smallMax = chunk
)

var buffers = sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}

func sumOf(b []byte) [32]byte { return sha256.Sum256(b) }

// list makes an extent known to those that look for its contents. Preconditions: mu is held, the sum is set.
func (p *Pool) list(e *extent) {
	p.sums[e.key()] = append(p.sums[e.key()], e)
	if e.size > smallMax {
		p.bySize[e.size] = append(p.bySize[e.size], e)
	}
	e.listed = true
}

func (p *Pool) unlist(e *extent) {
	if !e.listed {
		return
	}
	e.listed = false
	drop(p.sums, e.key(), e)
	if e.size > smallMax {
		drop(p.bySize, e.size, e)
	}
}

func drop[K comparable](m map[K][]*extent, k K, e *extent) {
	// A new slice: others range over the old one without the lock.
	rest := slices.DeleteFunc(slices.Clone(m[k]), func(x *extent) bool { return x == e })
	if len(rest) == 0 {
		delete(m, k)
		return
	}
	m[k] = rest
}

// newExtent takes space for size bytes. The extent has one reference and is not listed. Preconditions: mu is held.
func (p *Pool) newExtent(size int64) (*extent, error) {
	if p.closed {
		return nil, fmt.Errorf("pool: %w", ErrClosed)
	}
	n := alloc.RoundUnit(size)
	off, ok := p.space.Extent(n)
	if !ok {
		free, longest := p.space.Free()
		return nil, &FullError{What: "extent", Need: n, Have: longest, Free: free}
	}
	e := &extent{extentID: extentID{off: off, size: size}, refs: 1}
	p.extents[off] = e
	return e, nil
}

// unref gives up one reference to each extent and frees those that have none left: first the bytes, then the space, so
// that nobody writes where zeros are still being written. If nobody knows what the index holds they stay: it may list them.
func (p *Pool) unref(es ...*extent) {
	if p.index.unknown() != nil {
		return
	}
	var dead []*extent
	p.mu.Lock()
	for _, e := range es {
		e.refs--
		if e.refs > 0 {
			continue
		}
		p.unlist(e)
		delete(p.extents, e.off)
		dead = append(dead, e)
	}
	if len(dead) > 0 {
		p.freeing++
	}
	p.mu.Unlock()
	if len(dead) == 0 {
		return
	}
	spans := make([]alloc.Span, len(dead))
	for i, e := range dead {
		spans[i] = e.span()
	}
	for _, s := range joined(spans) {
		p.punch(s)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.freeing--
	for _, s := range spans {
		p.space.FreeExtent(s.Off, s.Len)
	}
}

// punch returns the space below a free span to the system. If that fails the span is free all the same: the pool
// writes every byte that it hands out, whatever was there.
func (p *Pool) punch(s alloc.Span) {
	if err := p.region.Punch(s.Off, s.Len); err != nil {
		p.warn(fmt.Errorf("pool: free %d bytes at %d: %w", s.Len, s.Off, err))
	}
}

// joined sorts spans and joins neighbours.
func joined(spans []alloc.Span) []alloc.Span {
	spans = slices.Clone(spans)
	slices.SortFunc(spans, func(a, b alloc.Span) int { return cmp.Compare(a.Off, b.Off) })
	out := spans[:0]
	for _, s := range spans {
		if n := len(out); n > 0 && out[n-1].End() == s.Off {
			out[n-1].Len += s.Len
			continue
		}
		out = append(out, s)
	}
	return out
}

// write writes to the region and tells a full filesystem below it from other failures.
func (p *Pool) write(b []byte, off int64) error {
	_, err := p.region.WriteAt(b, off)
	if errors.Is(err, syscall.ENOSPC) {
		return &FullError{What: "extent", Need: int64(len(b)), Err: err}
	}
	if err != nil {
		return fmt.Errorf("pool: write %d bytes at %d: %w", len(b), off, err)
	}
	return nil
}

// share returns a ready extent with these contents, referenced for the caller. If there is none, it lists the one that
// insert returns, which is called with mu held: lookup and insertion are one step, so that of two that put the same
// contents at the same time one finds the other's. compare tells whether an extent's bytes are the wanted ones.
func (p *Pool) share(ctx context.Context, key sumKey, compare func(*extent) (bool, error), insert func() (*extent, error)) (e *extent, shared bool, err error) {
	var tried []*extent
	for {
		p.mu.Lock()
		var next *extent
		for _, e := range p.sums[key] {
			if !slices.Contains(tried, e) {
				next = e
				break
			}
		}
		if next == nil {
			defer p.mu.Unlock()
			if e, err = insert(); err != nil {
				return nil, false, err
			}
			e.sum = key.sum
			p.list(e)
			return e, false, nil
		}
		next.refs++
		ready := next.ready
		p.mu.Unlock()
		ok, err := p.matches(ctx, next, ready, compare)
		if ok {
			return next, true, nil
		}
		p.unref(next)
		if err != nil {
			return nil, false, err
		}
		tried = append(tried, next)
	}
}

func (p *Pool) matches(ctx context.Context, e *extent, ready chan struct{}, compare func(*extent) (bool, error)) (bool, error) {
	if ready != nil {
		select {
		case <-ready:
		case <-ctx.Done():
			return false, ctx.Err()
		}
		p.mu.Lock()
		failed := e.failed
		p.mu.Unlock()
		if failed {
			return false, nil
		}
	}
	return compare(e)
}

// finish tells those that wait for an extent how its writing went.
func (p *Pool) finish(e *extent, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		e.failed = true
		p.unlist(e)
	}
	if e.ready != nil {
		close(e.ready)
		e.ready = nil
	}
}

// equalBytes compares the region at off with b. It reads instead of looking at the mapping, because pages of a file that
// this process maps stay in the page cache whatever the kernel is advised: all that was ever found equal would.
func (p *Pool) equalBytes(off int64, b []byte) (equal bool, err error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for len(b) > 0 {
		n := min(len(b), chunk)
		if _, err := p.region.ReadAt((*buf)[:n], off); err != nil {
			return false, fmt.Errorf("pool: read %d bytes at %d: %w", n, off, err)
		}
		if !bytes.Equal((*buf)[:n], b[:n]) {
			return false, nil
		}
		b, off = b[n:], off+int64(n)
	}
	return true, nil
}

// equalExtents compares two ranges of the region.
func (p *Pool) equalExtents(a, b, n int64) (equal bool, err error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for at := int64(0); at < n; at += chunk {
		part := (*buf)[:min(chunk, n-at)]
		if _, err := p.region.ReadAt(part, a+at); err != nil {
			return false, fmt.Errorf("pool: read %d bytes at %d: %w", len(part), a+at, err)
		}
		if ok, err := p.equalBytes(b+at, part); !ok || err != nil {
			return false, err
		}
	}
	return true, nil
}
