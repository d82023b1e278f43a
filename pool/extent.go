package pool

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// extent is the contents of one file or document. Pool.mu guards all fields but the identity. There
// may be millions of extents, so rare properties are kept elsewhere.
type extent struct {
	extentID
	refs     int32 // batches, layers, images, and operations that use it
	images   int32 // how many of refs are images
	firstRun uint32
	synced   bool // the bytes survive what the region survives
	pending  bool // the bytes are not in place yet; see Pool.pending
	failed   bool // the bytes never came
	listed   bool // in Pool.sums and Pool.heads
	added    bool // the image that is being added will hold it
	erased   bool // inodes may be zero already, so the extent cannot come to life again
	damaged  bool // the bytes are not those that were put; the extent is not listed then
	document bool // document of an image, which no file shares: never listed

	// Inodes of regular files with these contents. They live as long as the extent: a kernel may have one
	// in memory, and the bytes that it points to must not become another file's. The first inode is here:
	// key, nid (0 if there is none) and the number of the page where its run begins.
	firstKey daxfs.InodeKey
	firstNid uint64
	others   *inodes
	next     *extent // next in the list of Pool.sums
	died     int64   // order of death, see Pool.dead; 0 while there is a reference
}

// find returns an extent with these contents, or nil. Preconditions: mu is held.
func (p *Pool) find(key sumKey) *extent {
	for e := p.sums[key.short()]; e != nil; e = e.next {
		if e.key() == key && !e.failed {
			return e
		}
	}
	return nil
}

// equal returns all extents with these contents, in the order in which they were listed. Preconditions: mu is held.
func (p *Pool) equal(key sumKey) (all []*extent) {
	for e := p.sums[key.short()]; e != nil; e = e.next {
		if e.key() == key {
			all = append(all, e)
		}
	}
	slices.Reverse(all)
	return all
}

func (e *extent) span() alloc.Span { return alloc.Span{Off: e.off, Len: alloc.RoundUnit(e.size)} }

// sumKey identifies contents: equal digests are equal bytes.
type sumKey struct {
	sum  [32]byte
	size int64
}

func (e *extent) key() sumKey { return sumKey{e.sum, e.size} }

// short is the key of Pool.sums: whole keys would be most of the memory that a pool takes.
func (k sumKey) short() uint64 { return binary.LittleEndian.Uint64(k.sum[:]) }

// headKey finds large contents that begin alike.
type headKey struct {
	head [8]byte
	size int64
}

func (e *extent) headKey() headKey { return headKey{e.head, e.size} }

const (
	// chunk bytes of a large file are read, hashed and written at a time: they fit the core's cache.
	chunk = 256 << 10
	// smallMax is the largest size that is read as a whole before the lookup.
	smallMax = chunk
)

var buffers = sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}

// list makes an extent findable by its contents. Preconditions: mu is held, the sum is set.
func (p *Pool) list(e *extent) {
	k := e.key().short()
	e.next = p.sums[k]
	p.sums[k] = e
	if e.size > smallMax {
		p.heads[e.headKey()] = append(p.heads[e.headKey()], e)
	}
	e.listed = true
}

func (p *Pool) unlist(e *extent) {
	if !e.listed {
		return
	}
	e.listed = false
	k := e.key().short()
	if first := p.sums[k]; first != e {
		for first.next != e {
			first = first.next
		}
		first.next = e.next
	} else if e.next != nil {
		p.sums[k] = e.next
	} else {
		delete(p.sums, k)
	}
	e.next = nil
	if e.size <= smallMax {
		return
	}
	rest := slices.DeleteFunc(p.heads[e.headKey()], func(x *extent) bool { return x == e })
	if len(rest) == 0 {
		delete(p.heads, e.headKey())
	} else {
		p.heads[e.headKey()] = rest
	}
}

// newExtent takes space for an unlisted extent with one reference. Preconditions: mu is held.
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

// unref drops one reference to each extent. An extent without references is freed, or becomes dead if
// inodes point to it: see Dead. If the index is unknown, all extents stay: it may list them.
func (p *Pool) unref(es ...*extent) {
	if p.index.unknown() != nil {
		return
	}
	var free []*extent
	p.mu.Lock()
	for _, e := range es {
		e.refs--
		if e.refs > 0 {
			continue
		}
		if e.hasInodes() {
			p.dead++
			e.died = p.dead
			continue
		}
		p.forgetExtent(e)
		free = append(free, e)
	}
	if len(free) > 0 {
		p.freeing++
	}
	p.mu.Unlock()
	if len(free) > 0 {
		p.release(free)
	}
}

// ref adds a reference, which revives a dead extent. Preconditions: mu is held; the extent is listed.
func (e *extent) ref() {
	e.refs++
	e.died = 0
}

// forgetExtent removes an extent from all maps. Preconditions: mu is held.
func (p *Pool) forgetExtent(e *extent) {
	p.unlist(e)
	delete(p.extents, e.off)
	delete(p.found, e)
	if e.damaged { // written with the change that reuses the space
		p.damaged.Add(-1)
		p.index.noteLast(noted{kindDamaged, damagedKey(e), nil})
	}
}

// release frees the space of forgotten extents, but first clears the bytes, so that nobody writes
// where zeros are still being written. Preconditions: the caller has counted it in freeing.
func (p *Pool) release(es []*extent) {
	spans := make([]alloc.Span, len(es))
	for i, e := range es {
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

// punch returns the memory or disk blocks of a free span to the system. The span is free even if that
// fails: the pool writes every byte that it hands out.
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

// write writes to the region and returns a FullError if the filesystem below is full.
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

// share returns a ready extent with these contents, referenced for the caller. If there is none, it
// calls insert with mu held and lists the result. Lookup and insertion are one step, so of two
// concurrent puts of the same contents one finds the extent of the other.
func (p *Pool) share(ctx context.Context, key sumKey,
	insert func() (*extent, error),
) (e *extent, shared bool, err error) {
	for {
		p.mu.Lock()
		e := p.find(key)
		if e == nil {
			defer p.mu.Unlock()
			if e, err = insert(); err != nil {
				return nil, false, err
			}
			e.sum = key.sum
			p.list(e)
			return e, false, nil
		}
		e.ref()
		ready := p.pending[e]
		p.mu.Unlock()
		ok, err := p.await(ctx, e, ready)
		if ok {
			return e, true, nil
		}
		p.unref(e)
		if err != nil {
			return nil, false, err
		}
	}
}

// await waits until the bytes of an extent are in place or never will be, and reports which.
func (p *Pool) await(ctx context.Context, e *extent, ready chan struct{}) (bool, error) {
	if ready == nil {
		return true, nil
	}
	select {
	case <-ready:
	case <-ctx.Done():
		return false, ctx.Err()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return !e.failed, nil
}

// finish reports to waiting callers how the writing of an extent ended.
func (p *Pool) finish(e *extent, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		e.failed = true
		p.unlist(e)
	}
	if e.pending {
		close(p.pending[e])
		delete(p.pending, e)
		e.pending = false
	}
}

// equalBytes compares the region at off with b. It uses reads, not the mapping: pages of a file that
// this process maps stay in the page cache despite advice, so everything that was ever compared would
// stay.
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
