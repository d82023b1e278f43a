package pool

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Choice is a yes/no setting of a new pool that may also be left to the kind of the region.
type Choice int

// The choices. Auto decides by the kind of the region.
const (
	Auto Choice = iota
	Yes
	No
)

func (c Choice) or(auto bool) bool { return c == Yes || c == Auto && auto }

// Options are the rarely changed settings of a pool. The zero value is right for production. Create
// and Reset read Device, DAX, Windows and Slots; an existing pool keeps its own values.
type Options struct {
	// Force lets Create and Reset overwrite a region with foreign contents and the index of another pool.
	Force bool
	// Device says that kernels read the pool through a block device: a loop device, or a disk of a virtual
	// machine. Auto means no for files on a disk filesystem and for hugetlbfs.
	Device Choice
	// DAX says that a kernel, this one or another, mounts the pool with DAX: each extent then belongs to
	// one inode. Auto takes the answer from the region.
	DAX Choice
	// Windows gives every image a window for daxfs.ko besides its slot. Auto means yes for memory that
	// other kernels may reach by address: pmem, devdax, dmabuf and phys.
	Windows Choice
	// Slots limits how many images can be added in one epoch; 0 derives the limit from the region's size.
	Slots int
	// Warn receives problems that do not make an operation fail, such as space that could not be returned
	// to the system. Several goroutines may call it. Nil drops the warnings.
	Warn func(error)
}

// Pool is an open pool. All methods are safe for concurrent use; Close must be called last.
//
// Lock order: Pool.commit, then Batch.mu, then Pool.mu. Contents are read, written, compared and
// synced without mu. The index, the tree area and the slots change only under commit.
type Pool struct {
	region region.Region
	index  *index
	warn   func(error)

	// commit serialises changes of the index, the tree area and the header.
	commit sync.Mutex
	header header         // the newest header in the region
	stale  map[int][]byte // slots in the index that could not be published yet
	tree   treeArea
	erase  map[int]alloc.Span // slots of removed images, with the span that must be erased
	// retired holds replaced documents until no entry refers to them.
	retired        []*extent
	unannounced    bool      // an entry changed, and no generation announces it yet
	hidden         bool      // the catalogue lists no image: see unleasedPool
	leases         Leases    // nil if there are no readers to ask
	unwrittenEpoch *[16]byte // UUID of an epoch whose live tree could not be written yet

	mu      sync.Mutex
	closed  bool
	space   *alloc.Space
	empty   *extent // stands for the contents of empty files
	extents map[int64]*extent
	sums    map[uint64]*extent    // by the first bytes of the sum; each is the first of a list
	heads   map[headKey][]*extent // large extents only
	// pending holds extents without their bytes. A channel closes once these are there or never will be.
	pending map[*extent]chan struct{}
	// found holds the sum read from each extent that a scrub of this process found damaged.
	found   map[*extent][sha256.Size]byte
	layers  map[string][]*extent
	images  map[string]*image
	adding  map[string]chan struct{} // images that are being added; closed when done
	dead    int64                    // number of extents that died so far; orders them by age
	freeing int                      // calls that have dropped extents but not freed their space yet

	damaged atomic.Int64 // number of damaged extents, nearly always 0
}

// Create makes an empty pool in an unused region, with a new index, and opens it. The caller owns the
// region, which must outlive the pool.
//
// Errors: ErrForeign if Force is not set and either the first or last 2 MiB of the region are not zero
// or an index exists; ErrBusy if another process has either open or, even with Force, if the region is
// mounted.
func Create(r region.Region, indexPath string, o Options) (*Pool, error) {
	if err := lock(r); err != nil {
		return nil, err
	}
	if !o.Force {
		if err := checkEmpty(r); err != nil {
			return nil, err
		}
		if st, err := os.Stat(indexPath); err == nil && st.Size() > 0 {
			return nil,
				fmt.Errorf("pool: index %q exists: %w; it belongs to a pool that was wiped or to another",
					indexPath, ErrForeign)
		}
	}
	return format(r, indexPath, o)
}

// Reset makes an empty pool in a region that Open found wiped, and replaces the index: nothing in the
// old index is trusted. Errors are those of Create, except that it accepts an old index and a damaged
// header.
func Reset(r region.Region, indexPath string, o Options) (*Pool, error) {
	if err := lock(r); err != nil {
		return nil, err
	}
	if !o.Force {
		hs, err := readHeaders(r)
		if err == nil {
			return nil, fmt.Errorf("pool: reset: the region holds pool %x: %w", hs[0].id, ErrForeign)
		}
		if errors.Is(err, ErrVersion) {
			return nil, fmt.Errorf("pool: reset: region %q: %w", r.Info().Path, err)
		}
		if err := checkEmpty(r); err != nil && !hasMagic(r) {
			return nil, err
		}
	}
	return format(r, indexPath, o)
}

// Open opens a pool as its only owner. The caller owns the region, which must outlive the pool.
//
// Errors: ErrWiped if the region has no pool header or is older than the index; ErrForeign if the index
// is older or of another pool, if another version of this program made the pool, or if the region holds
// something else; ErrBusy if another process owns it; ErrCorrupt.
func Open(r region.Region, indexPath string, o Options) (*Pool, error) {
	return open(r, indexPath, o, false)
}

// Grow opens a pool whose region has become larger, and extends the pool to the whole region. No
// kernel may have the pool mounted, because a mount remembers the old size. A crash leaves the old or
// the new size.
//
// Errors are those of Open; ErrBusy if the region is mounted; region.ErrSize if it is too large.
func Grow(r region.Region, indexPath string, o Options) (*Pool, error) {
	return open(r, indexPath, o, true)
}

func open(r region.Region, indexPath string, o Options, grow bool) (*Pool, error) {
	if err := lock(r); err != nil {
		return nil, err
	}
	hs, err := readHeaders(r)
	if errors.Is(err, ErrVersion) {
		return nil,
			fmt.Errorf("pool: region %q: %w; use the version that made it, or destroy it with force",
				r.Info().Path, err)
	}
	if err != nil {
		if ferr := checkEmpty(r); ferr != nil && !hasMagic(r) {
			return nil, ferr
		}
		return nil, fmt.Errorf("pool: %w", wipedError(err))
	}
	h := hs[0]
	if err := fit(h, r, grow); err != nil {
		return nil, err
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

// fit compares the sizes of a pool and its region. With grow it extends the pool to the region's size.
func fit(h *header, r region.Region, grow bool) error {
	switch size := r.Size(); {
	case size == h.size:
		return nil
	case size < h.size:
		return fmt.Errorf("pool: has %d bytes, the region has %d, was it cut off: %w", h.size, size, ErrCorrupt)
	case size > MaxSize:
		return fmt.Errorf("pool: region of %d bytes, block addresses reach %d: %w", size,
			int64(MaxSize), region.ErrSize)
	case !grow:
		return fmt.Errorf("pool: has %d bytes, the region has %d: %w; was it made larger? `daxfs pool grow` gives "+
			"the pool all of it", h.size, size, region.ErrSize)
	default:
		if err := region.InUse(r); err != nil {
			return fmt.Errorf("pool: make it larger: %w", err)
		}
		h.size, h.geo.Blocks = size, geometry(size, h.geo.Slots, h.geo.PerBlock).Blocks
		return nil
	}
}

func newPool(r region.Region, x *index, o Options) *Pool {
	p := &Pool{
		region: r, index: x, warn: o.Warn, stale: map[int][]byte{}, erase: map[int]alloc.Span{},
		layers: map[string][]*extent{}, images: map[string]*image{}, adding: map[string]chan struct{}{},
	}
	if p.warn == nil {
		p.warn = func(error) {}
	}
	p.forgetExtents()
	return p
}

// forgetExtents empties everything that memory holds about extents.
func (p *Pool) forgetExtents() {
	p.empty = &extent{refs: 1, synced: true}
	p.extents, p.sums, p.heads = map[int64]*extent{}, map[uint64]*extent{}, map[headKey][]*extent{}
	p.pending, p.found = map[*extent]chan struct{}{}, map[*extent][sha256.Size]byte{}
}

// durable tells whether the index must be synced to disk. A region that ends with the kernel needs no
// sync: the page cache with the index ends with the same kernel.
func durable(r region.Region) bool {
	return !r.Info().Traits().Volatile
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

// probeArea is how much of the beginning and the end of an unused region must be zero. Partition
// tables, filesystems and namespace labels lie there.
const probeArea = 2 << 20

func checkEmpty(r region.Region) error {
	buf := make([]byte, probeArea)
	for _, off := range [2]int64{0, r.Size() - probeArea} {
		if n, err := r.ReadAt(buf, off); n < len(buf) {
			return fmt.Errorf("pool: read %d bytes at %d: %w", len(buf), off, err)
		}
		if !isZero(buf) {
			what := cmp.Or(region.Identify(r, r.Size()), "data")
			if hasMagic(r) {
				what = "a pool"
			}
			return fmt.Errorf("pool: region %q holds %s at %d: %w; to destroy it use force", r.Info().Path, what,
				off, ErrForeign)
		}
	}
	return nil
}

func hasMagic(r region.Region) bool {
	b := make([]byte, 3*headerSize)
	_, _ = r.ReadAt(b, 0) // bytes that cannot be read are not the magic number
	for at := 0; at < len(b); at += headerSize {
		if string(b[at:at+8]) == magic {
			return true
		}
	}
	return false
}

// newHeader decides every setting that a pool keeps for ever.
func newHeader(r region.Region, o Options) (header, error) {
	info, size := r.Info(), r.Size()
	if size > MaxSize {
		return header{},
			fmt.Errorf("pool: region of %d bytes, block addresses reach %d: %w", size, int64(MaxSize), region.ErrSize)
	}
	h := header{size: size, dax: o.DAX.or(info.DAX), windows: o.Windows.or(info.Traits().ByAddress)}
	device := h.dax || o.Device.or(info.Kind != region.KindFile && info.Kind != region.KindHugetlbfs)
	perBlock, slots := daxfs.SlotsPerBlock, o.Slots
	per := int64(slotShare)
	if device {
		perBlock, per = 1, deviceSlotShare
	}
	if slots == 0 {
		slots = int(min(max(size/per, minSlots), daxfs.MaxSlots))
	}
	h.geo = geometry(size, slots, perBlock)
	if err := h.geo.Validate(); err != nil {
		return header{}, fmt.Errorf("pool: %w: %w", err, ErrInvalid)
	}
	rand.Read(h.id[:]) //nolint:errcheck // never fails
	return h, nil
}

const (
	// slotShare is how many bytes of pool there are for each slot, which takes about 400 bytes. The slot
	// of a removed image is not used again in the epoch.
	slotShare = 32 << 10
	// deviceSlotShare replaces slotShare in pools where each slot has a block of its own.
	deviceSlotShare = 512 << 10
	minSlots        = 64
)

// format makes an empty pool. A crash during format leaves a wiped region.
func format(r region.Region, indexPath string, o Options) (*Pool, error) {
	if err := region.InUse(r); err != nil {
		return nil, fmt.Errorf("pool: make it anew: %w", err)
	}
	h, err := newHeader(r, o)
	if err != nil {
		return nil, err
	}
	clearTo := max(h.lowStart(), probeArea)
	if r.Info().Sparse {
		clearTo = r.Size()
	}
	if err := r.Punch(0, clearTo); err != nil {
		return nil, fmt.Errorf("pool: clear: %w", err)
	}
	// The magic number without a valid header marks a pool that is only half made.
	half := h.encode()
	half[headerSize-1] ^= 0xff
	if _, err := r.WriteAt(half, headerOff(0)); err != nil {
		return nil, fmt.Errorf("pool: clear: %w", err)
	}
	if err := r.Sync(0, clearTo); err != nil {
		return nil, fmt.Errorf("pool: clear: %w", err)
	}
	// Check this before the old index goes.
	if err := readBack(r, half, headerOff(0)); err != nil {
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
	p.header = h
	err = func() error {
		uuid := newUUID()
		if err := x.format(h.id, 1, uuid, h.firstChunk()); err != nil {
			return err
		}
		// The header comes last: it makes the pool exist.
		return p.startEpoch(1, uuid)
	}()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("pool: format: %w", err), x.close())
	}
	return p, nil
}

// readBack proves that a region keeps what is written to it. Persistent memory that a virtual machine
// maps read-only accepts every write without an error and drops it.
func readBack(r region.Region, written []byte, off int64) error {
	got := make([]byte, len(written))
	if _, err := r.ReadAt(got, off); err != nil {
		return fmt.Errorf("read back what was written at %d: %w", off, err)
	}
	if !bytes.Equal(got, written) {
		return fmt.Errorf("region %q does not keep what is written at %d: %w; a virtual machine may have it read-only",
			r.Info().Path, off, ErrReadOnly)
	}
	return nil
}

func newUUID() (id [16]byte) {
	rand.Read(id[:]) //nolint:errcheck // never fails
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return id
}

// lowStart is the first offset for chunks of the tree area, window segments and extents.
func (h *header) lowStart() int64 { return (h.geo.TreeStart() + alloc.Align - 1) &^ (alloc.Align - 1) }

// firstChunk is the tree area of a new epoch: the rest of the last 2 MiB that hold slots.
func (h *header) firstChunk() treeArea {
	at := h.geo.TreeStart()
	if h.lowStart() == at {
		return treeArea{}
	}
	return treeArea{chunks: []alloc.Span{{Off: at, Len: h.lowStart() - at}}, next: at}
}

// startEpoch writes an empty live tree and a header of generation gen that describes it. The index
// describes it already.
// Preconditions: nothing of the pool is mounted; commit is held, or p is not shared yet.
func (p *Pool) startEpoch(gen uint64, uuid [16]byte) error {
	p.header.geo.UUID = uuid
	p.header.used = 0
	if err := p.region.Punch(tableOff, p.header.geo.Head-tableOff); err != nil {
		return fmt.Errorf("clear the slot table: %w", err)
	}
	if err := daxfs.FormatLive(p.region, p.header.geo); err != nil {
		return err
	}
	if err := p.region.Sync(0, p.header.lowStart()); err != nil {
		return fmt.Errorf("sync the live tree: %w", err)
	}
	p.tree = p.header.firstChunk()
	var extents []alloc.Span
	metaEnd := p.header.size
	for _, e := range p.extents {
		extents = append(extents, e.span())
		metaEnd = min(metaEnd, e.off)
	}
	if p.region.Info().Sparse { // space of the last epoch's runs and segments
		at := p.header.geo.TreeStart()
		p.punch(alloc.Span{Off: at, Len: metaEnd - at})
	}
	var err error
	if p.space, err = alloc.New(p.header.lowStart(), p.header.size, p.reserve(), nil, extents); err != nil {
		return err
	}
	return p.writeHeader(gen)
}

// reserve is the space that extents leave to metadata. Metadata took about 3 % of the measured images.
func (p *Pool) reserve() int64 { return p.header.size / 32 &^ (alloc.Align - 1) }

// load rebuilds the state in memory from the index. Extents are those that holders list and those that
// inodes of runs point to; all other space is free.
func (p *Pool) load(h *header) error {
	c, err := p.index.load(h.size)
	if err != nil {
		return err
	}
	switch {
	case c.empty:
		return fmt.Errorf("pool: region holds pool %x, the index %q is empty: %w", h.id, p.index.path, ErrForeign)
	case c.id != h.id:
		return fmt.Errorf("pool: region holds pool %x, the index %q is of pool %x: %w", h.id, p.index.path,
			c.id, ErrForeign)
	case h.generation > c.gen:
		return fmt.Errorf("pool: region is at generation %d, the index %q at %d, it is an older copy: %w", h.generation,
			p.index.path, c.gen, ErrForeign)
	case h.generation+1 < c.gen:
		return fmt.Errorf("pool: region is at generation %d, the index %q at %d, the region is an older copy: %w",
			h.generation, p.index.path, c.gen, ErrWiped)
	}
	p.header = *h
	if err := cmp.Or(p.adopt(c), p.adoptDamaged()); err != nil {
		return fmt.Errorf("pool: index %q: %w: %w", p.index.path, ErrCorrupt, err)
	}
	// Each opening gets its own generation, which exposes copies of index or region from in between.
	gen := h.generation + 1
	if err := p.index.setGeneration(gen); err != nil {
		return err
	}
	if c.uuid != h.geo.UUID {
		// The index began an epoch, so nothing was mounted then. The region may or may not describe it.
		if err := p.startEpoch(gen, c.uuid); err != nil {
			return fmt.Errorf("pool: begin an epoch: %w", err)
		}
	} else if err := p.repair(gen); err != nil {
		return fmt.Errorf("pool: bring the live tree in line with the index: %w", err)
	}
	if p.region.Info().Sparse {
		for _, s := range p.space.Gaps() { // a crash left data there
			p.punch(s)
		}
	}
	return nil
}

// adopt fills the maps and the allocator from the contents of the index.
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
	var segs []alloc.Span
	slots := map[int]bool{}
	for key, m := range c.images {
		used, err := hold(c.used[key])
		if err != nil {
			return fmt.Errorf("image %q: %w", key, err)
		}
		if slots[m.Slot] || m.Slot < 0 || m.Slot >= p.header.geo.Slots {
			return fmt.Errorf("image %q is at slot %d of %d, or is not alone there", key, m.Slot, p.header.geo.Slots)
		}
		slots[m.Slot] = true
		p.header.used = max(p.header.used, m.Slot+1)
		for _, e := range used {
			e.images++
			if m.Segment > 0 && (e.off < m.Window+m.Segment || e.span().End() > m.Window+m.WindowSize) {
				return fmt.Errorf("image %q: extent %d+%d is outside of its window", key, e.off, e.size)
			}
		}
		p.images[key] = &image{storedImage: m, used: used}
		if m.Segment > 0 {
			segs = append(segs, alloc.Span{Off: m.Window, Len: m.Segment})
		}
	}
	for slot := range c.erase {
		if slots[slot] || slot >= p.header.geo.Slots {
			return fmt.Errorf("slot %d is to be erased and holds an image, or is none", slot)
		}
		p.header.used = max(p.header.used, slot+1)
	}
	p.erase, p.tree = c.erase, c.tree
	if err := p.adoptRuns(c.runs); err != nil {
		return err
	}
	for _, m := range p.images {
		if err := p.adoptDocument(m); err != nil {
			return err
		}
	}
	var extents []alloc.Span
	for _, e := range p.extents {
		extents = append(extents, e.span())
	}
	low := p.header.lowStart()
	for _, s := range p.tree.chunks {
		if at := max(s.Off, low); at < s.End() {
			segs = append(segs, alloc.Span{Off: at, Len: s.End() - at})
		}
	}
	p.space, err = alloc.New(low, p.header.size, p.reserve(), segs, extents)
	return err
}

// adoptRuns gives extents their inodes. An extent that only inodes refer to is dead.
func (p *Pool) adoptRuns(runs map[int64][]runInode) error {
	// Go by offset, so that the inodes of a key have the same order each time.
	for _, run := range slices.Sorted(maps.Keys(runs)) {
		for _, in := range runs[run] {
			e := p.empty
			if in.size > 0 {
				e = p.extents[in.off]
			}
			if e == nil {
				e = &extent{extentID: extentID{off: in.off, size: in.size}, synced: true, erased: true}
				p.dead++
				e.died = p.dead
				p.extents[in.off] = e
			}
			if e.size != in.size {
				return fmt.Errorf("run at %d: inode %d of %d bytes at %d, which has %d", run, in.nid,
					in.size, in.off, e.size)
			}
			e.addInode(sharedInode{key: in.key, nid: in.nid, run: run})
		}
	}
	return nil
}

// repair brings slots and slot table in line with the index. A crash can leave an image that is not
// published yet, or a removed one that is not erased.
func (p *Pool) repair(gen uint64) error {
	l, err := daxfs.OpenLive(p.region, p.header.size)
	if err != nil {
		return err
	}
	have := l.Geometry()
	grown := have.Blocks < p.header.geo.Blocks // by this process, or by one that was interrupted
	if grown {
		have.Blocks = p.header.geo.Blocks
	}
	if have != p.header.geo {
		return fmt.Errorf("live tree %+v, the header says %+v: %w", l.Geometry(), p.header.geo, ErrCorrupt)
	}
	for _, m := range p.images {
		have := make([]byte, daxfs.SlotSize)
		if _, err := p.region.ReadAt(have, p.header.geo.SlotOff(m.Slot)); err != nil {
			return err
		}
		entry := make([]byte, entrySize)
		if _, err := p.region.ReadAt(entry, entryOff(m.Slot)); err != nil {
			return err
		}
		if !bytes.Equal(have, m.slot) || !bytes.Equal(entry, p.entry(m)) {
			p.stale[m.Slot] = m.slot
		}
	}
	if err := p.publishStale(); err != nil {
		return err
	}
	if err := p.eraseRemoved(); err != nil {
		p.warn(fmt.Errorf("pool: erase removed images: %w", err)) // a full disk must not keep the pool closed
	}
	if err := p.writeHeader(gen); err != nil || !grown {
		return err
	}
	// The superblock comes last: it must never count blocks that the header does not.
	if err := daxfs.GrowLive(p.region, p.header.geo); err != nil {
		return err
	}
	return p.region.Sync(0, daxfs.BlockSize)
}

// writeHeader announces a generation to readers. It overwrites the second newest header; the newest
// stays whole. Preconditions: commit is held, or p is not shared yet.
func (p *Pool) writeHeader(gen uint64) error {
	h := p.header
	h.generation = gen
	off := headerOff(gen)
	if _, err := p.region.WriteAt(h.encode(), off); err != nil {
		return fmt.Errorf("pool: write generation %d: %w", gen, err)
	}
	if err := p.region.Sync(off, headerSize); err != nil {
		return fmt.Errorf("pool: sync generation %d: %w", gen, err)
	}
	p.header.generation = gen
	return nil
}

// sync makes extents and spans durable. One call covers all: a file is synced as a whole anyway.
func (p *Pool) sync(es []*extent, spans ...alloc.Span) error {
	lo, hi := p.region.Size(), int64(0)
	for _, s := range spans {
		if s.Len > 0 {
			lo, hi = min(lo, s.Off), max(hi, s.End())
		}
	}
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

// ID returns the random ID that the pool got when it was made.
func (p *Pool) ID() [16]byte { return p.header.id }

// UUID returns the UUID in the superblock of the live tree. Each epoch has its own.
func (p *Pool) UUID() [16]byte {
	p.commit.Lock()
	defer p.commit.Unlock()
	return p.header.geo.UUID
}

// Geometry returns the geometry of the live tree.
func (p *Pool) Geometry() daxfs.Geometry {
	p.commit.Lock()
	defer p.commit.Unlock()
	return p.header.geo
}

// Windows tells whether images have windows for daxfs.ko.
func (p *Pool) Windows() bool { return p.header.windows }

// DAX tells whether each extent belongs to one inode: see Options.
func (p *Pool) DAX() bool { return p.header.dax }

// SetRecord durably stores a small record of the caller; a nil value removes it. The pool does not
// interpret records. Errors: ErrInvalid for an empty kind or key.
func (p *Pool) SetRecord(kind, key string, value []byte) error {
	if kind == "" || key == "" {
		return fmt.Errorf("pool: record %q of kind %q: %w", key, kind, ErrInvalid)
	}
	p.commit.Lock()
	defer p.commit.Unlock()
	return p.index.setRecord(kind, key, value)
}

// NoteRecord queues a record. The next change of the index, or FlushRecords, writes it and makes both
// durable at once. Until then Records does not return it. Errors are those of SetRecord.
func (p *Pool) NoteRecord(kind, key string, value []byte) error {
	if kind == "" || key == "" {
		return fmt.Errorf("pool: record %q of kind %q: %w", key, kind, ErrInvalid)
	}
	p.index.noteLast(noted{kind, key, value})
	return nil
}

// FlushRecords makes the records passed to NoteRecord durable.
func (p *Pool) FlushRecords() error {
	p.commit.Lock()
	defer p.commit.Unlock()
	return p.index.flush()
}

// Records returns all records of a kind.
func (p *Pool) Records(kind string) (map[string][]byte, error) { return p.index.records(kind) }

// Close gives up the index; the caller closes the region. Unfinished batches and images are lost.
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
	return errors.Join(p.index.flush(), p.index.close())
}

func byOffset(es []*extent) []*extent {
	slices.SortFunc(es, func(a, b *extent) int { return cmp.Compare(a.off, b.off) })
	return es
}
