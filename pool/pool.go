package pool

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Options are the rarely changed settings of a pool. The zero value is right for production.
type Options struct {
	// Force makes Create and Reset take a region with foreign contents, and an index of another pool.
	Force bool
	// Warn is told of what went wrong without making an operation fail, such as space that could not be returned to the
	// system. It may be called by several goroutines. Nil drops the warnings.
	Warn func(error)
}

// Pool is an open pool. All methods are safe for concurrent use; Close must be called last.
//
// Lock order: Pool.commit, then Batch.mu, then Pool.mu. Contents are read, written, compared and synced without mu;
// the index and the catalogue change only under commit.
type Pool struct {
	region region.Region
	index  *index
	warn   func(error)

	// commit serialises what changes the index and the header.
	commit sync.Mutex
	header header // the newest that was written
	stale  bool   // the catalogue is behind the index, because writing it failed

	mu      sync.Mutex
	closed  bool
	space   *alloc.Space
	extents map[int64]*extent
	sums    map[sumKey][]*extent
	bySize  map[int64][]*extent // large ones
	layers  map[string][]*extent
	images  map[string]*image
	adding  map[string]chan struct{} // images that are being added; closed when done
	freeing int                      // calls that have dropped extents but not yet freed their space
}

// Create makes an empty pool in a region that holds nothing, with a new index, and opens it. The region stays the
// caller's: it must outlive the pool.
//
// Errors: ErrForeign if the first or last 2 MiB of the region are not zero, or there is an index already, and Force is
// not set; ErrBusy if another process has either open, or, whatever Force says, if something is mounted from the region.
func Create(r region.Region, indexPath string, o Options) (*Pool, error) {
	if err := lock(r); err != nil {
		return nil, err
	}
	if !o.Force {
		if err := checkEmpty(r); err != nil {
			return nil, err
		}
		if st, err := os.Stat(indexPath); err == nil && st.Size() > 0 {
			return nil, fmt.Errorf("pool: index %q exists: %w; it belongs to a pool that was wiped or to another", indexPath, ErrForeign)
		}
	}
	return format(r, indexPath, o)
}

// Reset makes an empty pool of a region that Open found to be wiped, and of its index: nothing that the old index says
// is trusted. Errors are those of Create; an old index is none, and a damaged pool header is none either.
func Reset(r region.Region, indexPath string, o Options) (*Pool, error) {
	if err := lock(r); err != nil {
		return nil, err
	}
	if !o.Force {
		hs, err := readHeaders(r)
		if err == nil {
			return nil, fmt.Errorf("pool: reset: the region holds pool %x: %w", hs[0].id, ErrForeign)
		}
		if errors.Is(err, errVersion) {
			return nil, fmt.Errorf("pool: reset: region %q: %w: %w", r.Info().Path, ErrForeign, err)
		}
		if err := checkEmpty(r); err != nil && !hasMagic(r) {
			return nil, err
		}
	}
	return format(r, indexPath, o)
}

// Open opens a pool as its only owner. The region stays the caller's: it must outlive the pool.
//
// Errors: ErrWiped if the region has no pool header, ErrForeign if it has that of a pool with another or an older
// index, or that of another version of this program, or holds something else; ErrBusy if another process owns it; ErrCorrupt.
func Open(r region.Region, indexPath string, o Options) (*Pool, error) {
	if err := lock(r); err != nil {
		return nil, err
	}
	hs, err := readHeaders(r)
	if errors.Is(err, errVersion) {
		return nil, fmt.Errorf("pool: region %q: %w: %w; use the version that made it, or destroy it with force", r.Info().Path, ErrForeign, err)
	}
	if err != nil {
		if ferr := checkEmpty(r); ferr != nil && !hasMagic(r) {
			return nil, ferr
		}
		return nil, fmt.Errorf("pool: %w: %w", ErrWiped, err)
	}
	h := hs[0]
	if h.size != r.Size() {
		return nil, fmt.Errorf("pool: has %d bytes, the region has %d: %w", h.size, r.Size(), ErrCorrupt)
	}
	if _, err := os.Stat(indexPath); err != nil {
		return nil, fmt.Errorf("pool: region holds pool %x, but its index: %w: %w", h.id, ErrForeign, err)
	}
	x, err := openIndex(indexPath, durable(r))
	if err != nil {
		return nil, err
	}
	p := newPool(r, x, o)
	if err := p.load(h); err != nil {
		return nil, errors.Join(err, x.close())
	}
	return p, nil
}

func newPool(r region.Region, x *index, o Options) *Pool {
	p := &Pool{
		region: r, index: x, warn: o.Warn,
		extents: map[int64]*extent{}, sums: map[sumKey][]*extent{}, bySize: map[int64][]*extent{},
		layers: map[string][]*extent{}, images: map[string]*image{}, adding: map[string]chan struct{}{},
	}
	if p.warn == nil {
		p.warn = func(error) {}
	}
	return p
}

// durable tells whether the index must be synced to disk: not if the region ends with the kernel whose page cache holds
// the index.
func durable(r region.Region) bool {
	switch r.Info().Kind {
	case region.KindTmpfs, region.KindHugetlbfs, region.KindDMABuf:
		return false
	}
	return true
}

func lock(r region.Region) error {
	if r.Size() < region.MinSize || r.Size()%alloc.Align != 0 {
		return fmt.Errorf("pool: region of %d bytes: %w", r.Size(), region.ErrSize)
	}
	if l, ok := r.(region.Locker); ok {
		if err := l.Lock(); err != nil {
			return fmt.Errorf("pool: %w", err)
		}
	}
	return nil
}

// checkEmpty looks at the first and the last 2 MiB: partition tables, filesystems and namespace labels are there.
func checkEmpty(r region.Region) error {
	buf := make([]byte, headArea)
	for _, off := range [2]int64{0, r.Size() - headArea} {
		if n, err := r.ReadAt(buf, off); n < len(buf) {
			return fmt.Errorf("pool: read %d bytes at %d: %w", len(buf), off, err)
		}
		if !isZero(buf) {
			what := cmp.Or(region.Identify(r, r.Size()), "data")
			if hasMagic(r) {
				what = "a pool"
			}
			return fmt.Errorf("pool: region %q holds %s at %d: %w; to destroy it use force", r.Info().Path, what, off, ErrForeign)
		}
	}
	return nil
}

func hasMagic(r region.Region) bool {
	b := make([]byte, headerSize+8)
	_, _ = r.ReadAt(b, 0) // what can not be read is not the magic
	return string(b[:8]) == magic || string(b[headerSize:]) == magic
}

// format makes an empty pool. A crash inside of it leaves a wiped region.
func format(r region.Region, indexPath string, o Options) (*Pool, error) {
	if err := region.InUse(r); err != nil {
		return nil, fmt.Errorf("pool: make it anew: %w", err)
	}
	clearTo := int64(headArea)
	if r.Info().Sparse {
		clearTo = r.Size()
	}
	if err := r.Punch(0, clearTo); err != nil {
		return nil, fmt.Errorf("pool: clear: %w", err)
	}
	// The catalogue gets its blocks now: on a disk that is full later, removing an image must not need any.
	if _, err := r.WriteAt(make([]byte, headArea), 0); err != nil {
		return nil, fmt.Errorf("pool: clear: %w", err)
	}
	if err := r.Sync(0, clearTo); err != nil {
		return nil, fmt.Errorf("pool: clear: %w", err)
	}
	if err := removeIndex(indexPath); err != nil {
		return nil, fmt.Errorf("pool: old index: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(indexPath), 0o700); err != nil {
		return nil, fmt.Errorf("pool: index: %w", err)
	}
	x, err := openIndex(indexPath, durable(r))
	if err != nil {
		return nil, err
	}
	p := newPool(r, x, o)
	err = func() error {
		var id [16]byte
		rand.Read(id[:]) //nolint:errcheck // never fails
		if err := x.format(id, 1); err != nil {
			return err
		}
		// The header comes last: with it the pool exists.
		p.header = header{id: id, generation: 0, size: r.Size()}
		if err := p.writeCatalogue(1, nil); err != nil {
			return err
		}
		p.space, err = alloc.New(headArea, r.Size(), segmentReserve(r.Size()), nil, nil)
		return err
	}()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("pool: format: %w", err), x.close())
	}
	return p, nil
}

// segmentReserve is what extents leave to segments: metadata is about 3 % of the images that were measured.
func segmentReserve(size int64) int64 { return max(alloc.Align, size/32) }

// load rebuilds everything in memory from the index: extents are what holders list, and the rest is free.
func (p *Pool) load(h *header) error {
	c, err := p.index.load(h.size)
	if err != nil {
		return err
	}
	switch {
	case c.empty:
		return fmt.Errorf("pool: region holds pool %x, the index %q is empty: %w", h.id, p.index.path, ErrForeign)
	case c.id != h.id:
		return fmt.Errorf("pool: region holds pool %x, the index %q is of pool %x: %w", h.id, p.index.path, c.id, ErrForeign)
	case h.generation > c.gen:
		return fmt.Errorf("pool: region is at generation %d, the index %q at %d, it is an older copy: %w", h.generation, p.index.path, c.gen, ErrForeign)
	case h.generation+1 < c.gen:
		return fmt.Errorf("pool: region is at generation %d, the index %q at %d, the region is an older copy: %w", h.generation, p.index.path, c.gen, ErrWiped)
	}
	if err := p.adopt(c); err != nil {
		return fmt.Errorf("pool: index %q: %w: %w", p.index.path, ErrCorrupt, err)
	}
	p.header = *h
	// Each opening is a generation of its own: that tells copies of the index or the region that were taken in between.
	gen := h.generation + 1
	if err := p.index.setGeneration(gen); err != nil {
		return err
	}
	if err := p.writeCatalogue(gen, p.imageList()); err != nil {
		return err
	}
	if p.region.Info().Sparse {
		for _, s := range p.space.Gaps() { // what a crash left below free space
			p.punch(s)
		}
	}
	return nil
}

// adopt fills the maps and the allocator from the index's contents.
func (p *Pool) adopt(c *contents) error {
	hold := func(list []extentID) ([]*extent, error) {
		out := make([]*extent, 0, len(list))
		for _, id := range list {
			e := p.extents[id.off]
			if e == nil {
				e = &extent{extentID: id, synced: true}
				p.extents[id.off] = e
				p.list(e)
			}
			if e.extentID != id {
				return nil, fmt.Errorf("extent at %d is listed as %d bytes and as %d", id.off, e.size, id.size)
			}
			e.refs++
			out = append(out, e)
		}
		return out, nil
	}
	var err error
	for key, list := range c.layers {
		if p.layers[key], err = hold(list); err != nil {
			return fmt.Errorf("layer %q: %w", key, err)
		}
	}
	var segs, extents []alloc.Span
	for key, m := range c.images {
		used, err := hold(c.used[key])
		if err != nil {
			return fmt.Errorf("image %q: %w", key, err)
		}
		for _, e := range used {
			e.images++
			if e.off < m.Off+m.Seg || e.span().End() > m.Off+m.Size {
				return fmt.Errorf("image %q: extent %d+%d is outside of its window", key, e.off, e.size)
			}
		}
		p.images[key] = &image{Image: m, used: used}
		segs = append(segs, alloc.Span{Off: m.Off, Len: m.Seg})
	}
	for _, e := range p.extents {
		extents = append(extents, e.span())
	}
	size := p.region.Size()
	p.space, err = alloc.New(headArea, size, segmentReserve(size), segs, extents)
	return err
}

// writeCatalogue makes a generation visible to readers: its catalogue first, then the header that points to it. It goes
// over the generation before the newest one, which stays whole. Preconditions: commit is held, or p is not shared yet.
func (p *Pool) writeCatalogue(gen uint64, images []Image) error {
	h := header{id: p.header.id, generation: gen, size: p.header.size}
	b := encodeCatalogue(images)
	h.count, h.sum = uint32(len(images)), crcOf(b)
	for _, w := range []struct {
		off int64
		b   []byte
	}{{catalogueOff(gen), b}, {headerOff(gen), h.encode()}} {
		if len(w.b) == 0 {
			continue
		}
		if _, err := p.region.WriteAt(w.b, w.off); err != nil {
			return fmt.Errorf("pool: write generation %d: %w", gen, err)
		}
		if err := p.region.Sync(w.off, int64(len(w.b))); err != nil {
			return fmt.Errorf("pool: sync generation %d: %w", gen, err)
		}
	}
	// The id never changes: ID reads it without commit.
	p.header.generation, p.header.count, p.header.sum = h.generation, h.count, h.sum
	return nil
}

// sync makes the bytes of extents durable. One call covers all: a file is synced as a whole anyway.
func (p *Pool) sync(es []*extent) error {
	lo, hi := p.region.Size(), int64(0)
	p.mu.Lock()
	for _, e := range es {
		if !e.synced {
			lo, hi = min(lo, e.off), max(hi, e.span().End())
		}
	}
	p.mu.Unlock()
	if hi <= lo {
		return nil
	}
	if err := p.region.Sync(lo, hi-lo); err != nil {
		return fmt.Errorf("sync %d bytes at %d: %w", hi-lo, lo, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range es {
		e.synced = true
	}
	return nil
}

// Region returns the region below the pool.
func (p *Pool) Region() region.Region { return p.region }

// ID is the random name that the pool got when it was made.
func (p *Pool) ID() [16]byte { return p.header.id }

// Close ends the ownership of the index. The region is the caller's to close. Batches and images that are not finished
// are lost.
func (p *Pool) Close() error {
	p.commit.Lock()
	defer p.commit.Unlock()
	p.mu.Lock()
	closed := p.closed
	p.closed = true
	p.mu.Unlock()
	if closed {
		return nil
	}
	return p.index.close()
}

func byOffset(es []*extent) []*extent {
	slices.SortFunc(es, func(a, b *extent) int { return cmp.Compare(a.off, b.off) })
	return es
}

func ids(es []*extent) []extentID {
	out := make([]extentID, len(es))
	for i, e := range es {
		out[i] = e.extentID
	}
	return out
}
