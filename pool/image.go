package pool

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"time"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// image is an image in memory, with the extents that it holds.
type image struct {
	*storedImage
	used    []*extent
	doc     *extent // its document, or nil
	leaving bool    // being removed
}

// AddImage adds the image key, a tree over contents in this pool: Put returned every Data in the tree,
// and a layer, an image or an open batch holds it. On return the image is durable, published at its
// slot and in the catalogue, and holds the contents itself. If the image exists, AddImage returns it
// and ignores the tree. The only option that may be set is Take.
//
// On memory that kernels read through a block device, the process that has it mounted must drop the
// kernel's cache of it before it looks at the slot.
//
// Errors: ErrFull, with nothing added; ErrNotFound for missing contents; ErrInvalid; daxfs.NewPlan's.
func (p *Pool) AddImage(ctx context.Context, key string, root *daxfs.Node, opt daxfs.Options) (Image, error) {
	if err := checkKey(key); err != nil {
		return Image{}, fmt.Errorf("pool: image: %w", err)
	}
	m, done, err := p.startAdding(ctx, key)
	if err != nil || done == nil {
		return m, err
	}
	defer done()
	m, err = p.addImage(ctx, key, root, opt)
	if err != nil {
		return Image{}, fmt.Errorf("pool: image %q: %w", key, err)
	}
	return m, nil
}

// startAdding returns the image if it exists, after waiting for another call that adds it. Otherwise
// done is set: the caller adds the image, then calls done.
func (p *Pool) startAdding(ctx context.Context, key string) (m Image, done func(), err error) {
	for {
		p.mu.Lock()
		if have := p.images[key]; have != nil {
			leaving := have.leaving
			p.mu.Unlock()
			if err := p.republish(); err != nil || !leaving {
				return have.Image, nil, err
			}
			continue // republish has waited until it had left, or stayed
		}
		other, busy := p.adding[key]
		if !busy {
			mine := make(chan struct{})
			p.adding[key] = mine
			p.mu.Unlock()
			return Image{}, func() {
				p.mu.Lock()
				delete(p.adding, key)
				p.mu.Unlock()
				close(mine)
			}, nil
		}
		p.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return Image{}, nil, ctx.Err()
		}
	}
}

func (p *Pool) addImage(ctx context.Context, key string, root *daxfs.Node, opt daxfs.Options) (Image, error) {
	if opt != (daxfs.Options{Take: opt.Take}) {
		return Image{},
			fmt.Errorf("options %+v, expected none: images of a pool have no label and no digest table: %w",
				opt, ErrInvalid)
	}
	plan, err := daxfs.NewLivePlan(root, opt, p.header.windows)
	if err != nil {
		return Image{}, err
	}
	used, err := p.hold(plan)
	if err != nil {
		return Image{}, err
	}
	defer p.unref(used...)
	p.commit.Lock()
	defer p.commit.Unlock()
	if err := ctx.Err(); err != nil {
		return Image{}, err
	}
	p.mu.Lock()
	err = p.finishEpoch(p.header.generation + 1)
	p.mu.Unlock()
	if err != nil {
		return Image{}, err
	}
	a := &addition{p: p, plan: plan, before: p.tree, used: make([]*extent, 0, len(used))}
	defer a.finish()
	a.m = &storedImage{Image: Image{Key: key, Slot: p.header.used, UUID: plan.UUID(), Created: time.Now().UTC()}}
	if err := a.run(); err != nil {
		return Image{}, errors.Join(err, a.undo())
	}
	if err := p.publish(p.images[key]); err != nil {
		// An image that cannot be removed stays: the index has it, and publishStale publishes it later.
		return Image{}, errors.Join(err, p.removeImage(key))
	}
	return a.m.Image, nil
}

// addition is one call of AddImage. Preconditions of all methods: commit is held.
type addition struct {
	p      *Pool
	plan   *daxfs.LivePlan
	m      *storedImage
	used   []*extent // what the image will hold, referenced and marked
	run0   int64     // where the run is
	before treeArea  // before this image
	after  treeArea  // after it; unset until it took something
	done   bool      // the index has the image
}

// finish clears the added marks of the extents.
func (a *addition) finish() {
	a.p.mu.Lock()
	defer a.p.mu.Unlock()
	for _, e := range a.used {
		e.added = false
	}
}

// run does everything up to the change of the index. What follows only makes the image visible.
func (a *addition) run() error {
	p, m := a.p, a.m
	if m.Slot >= p.header.geo.Slots {
		return &FullError{What: fullSlot, Need: 1, Free: int64(p.header.geo.Slots)}
	}
	if err := a.plan.Resolve(a.resolve); err != nil {
		return err
	}
	if err := a.place(); err != nil {
		return err
	}
	if err := a.plan.WriteRun(window{p, 0, p.header.size}); err != nil {
		return err
	}
	run := alloc.Span{Off: a.run0, Len: a.plan.Size()}
	if err := p.sync(a.used, run, alloc.Span{Off: m.Window, Len: m.Segment}); err != nil {
		return err
	}
	m.slot = a.plan.Slot()
	m.own = alloc.Span{Off: a.run0 + a.plan.FileSize(), Len: a.plan.Size() - a.plan.FileSize()}
	files := a.plan.FileCount()
	list := a.newInodes()
	a.plan = nil
	if files > manyFiles {
		debug.FreeOSMemory() // the plan takes more memory than all that follows
	}
	if err := p.index.putImage(m, byOffset(a.used), a.run0, list, a.after, p.header.generation+1); err != nil {
		return err
	}
	a.done = true
	a.keep(list)
	return nil
}

// manyFiles is the number of files above which returning the memory of their plan pays off.
const manyFiles = 100_000

// place finds room for the run and, with windows, for the segment, which it also writes.
func (a *addition) place() error {
	p, m := a.p, a.m
	p.mu.Lock()
	off, after, ok := a.before.take(p.space, a.plan.Size())
	if !ok {
		defer p.mu.Unlock()
		free, _ := p.space.Free()
		return &FullError{
			What: fullTree, Need: a.plan.Size(), Have: p.space.SegmentRoom(),
			Free: free + p.space.SegmentFree(),
		}
	}
	a.run0, a.after = off, after
	p.mu.Unlock()
	if err := a.plan.PlaceLive(p.header.geo, off, m.Slot); err != nil {
		return err
	}
	if !p.header.windows {
		return nil
	}
	var err error
	need := roundUp(daxfs.BlockSize + a.plan.MetaSize())
	if m.Window, err = p.newSegment(need); err != nil {
		return err
	}
	m.Segment = need
	m.WindowSize = windowSize(m.Image, a.used)
	return p.writeSegment(a.plan.Plan, m.Image)
}

// resolve finds the existing inode of a regular file, or contents for a new inode.
func (a *addition) resolve(f daxfs.LiveFile) (nid uint64, d daxfs.Data, err error) {
	p := a.p
	if f.Data.Size == 0 {
		return p.empty.nth(f.Key, f.Seq), f.Data, nil
	}
	p.mu.Lock()
	e := p.extents[f.Data.Off] // held since addImage looked at the tree
	if e.damaged {
		p.mu.Unlock()
		return 0, f.Data, fmt.Errorf("contents of %d bytes at %d are damaged: %w", e.size, e.off, ErrNotFound)
	}
	if !p.header.dax {
		a.use(e)
		nid = e.nth(f.Key, f.Seq)
		p.mu.Unlock()
		return nid, f.Data, nil
	}
	seq := f.Seq
	var free *extent
	for _, c := range p.equal(e.key()) {
		switch {
		case c.failed || c.pending || c.added && !c.hasInodes():
		case !c.hasInodes():
			if free == nil {
				free = c
			}
		case c.firstKey == f.Key:
			if seq == 0 {
				a.use(c)
				p.mu.Unlock()
				f.Data.Off = c.off
				return c.firstNid, f.Data, nil
			}
			seq--
		}
	}
	if free != nil {
		a.use(free)
	}
	p.mu.Unlock()
	if free == nil {
		if free, err = a.variant(e); err != nil {
			return 0, f.Data, err
		}
	}
	f.Data.Off = free.off
	return 0, f.Data, nil
}

// use makes the image hold an extent. Preconditions: mu is held.
func (a *addition) use(e *extent) {
	if !e.added {
		e.added = true
		e.ref()
		a.used = append(a.used, e)
	}
}

// variant copies an extent for another inode: with DAX, an extent belongs to one inode.
func (a *addition) variant(from *extent) (*extent, error) {
	p := a.p
	p.mu.Lock()
	e, err := p.newExtent(from.size)
	p.mu.Unlock()
	if err != nil {
		return nil, err
	}
	e.sum, e.head = from.sum, from.head
	if err := p.copyRange(e.off, from.off, e.span().Len); err != nil {
		p.unref(e)
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.list(e)
	e.added = true
	a.used = append(a.used, e)
	return e, nil
}

// newInodes encodes the run's new inodes for the index, by the offset of their contents, if any.
func (a *addition) newInodes() []byte {
	place := func(i int32) int64 {
		d, _ := a.plan.FileData(int(i))
		if d.Size == 0 {
			return 0
		}
		return d.Off
	}
	order := make([]int32, 0, a.plan.FileCount())
	for i := range a.plan.FileCount() {
		if _, isNew := a.plan.FileData(i); isNew {
			order = append(order, int32(i))
		}
	}
	if len(order) == 0 {
		return nil
	}
	slices.SortStableFunc(order, func(a, b int32) int { return cmp.Compare(place(a), place(b)) })
	list := newRunList(len(order))
	for _, i := range order {
		f := a.plan.File(int(i))
		list.add(runInode{off: place(i), size: f.Data.Size, nid: f.Nid, key: f.Key})
	}
	return list.b
}

// keep updates memory after the index: it adds the image and the new inodes of its run.
func (a *addition) keep(newInodes []byte) {
	p, m := a.p, a.m
	p.mu.Lock()
	defer p.mu.Unlock()
	if newInodes != nil {
		err := eachInode(newInodes, func(in runInode) {
			e := p.empty
			if in.size > 0 {
				e = p.extents[in.off]
			}
			e.addInode(sharedInode{key: in.key, nid: in.nid, run: a.run0})
		})
		if err != nil {
			panic("pool: its own list of inodes: " + err.Error())
		}
	}
	p.images[m.Key] = &image{storedImage: m, used: a.used}
	for _, e := range a.used {
		e.images++
	}
	p.tree = a.after
	p.header.used = m.Slot + 1
	p.stale[m.Slot] = m.slot
}

// undo gives back the space that a failed addition took, unless the index may list it.
func (a *addition) undo() error {
	p := a.p
	if a.done || p.index.unknown() != nil {
		return nil
	}
	if a.m.Segment > 0 {
		p.freeSegment(a.m.Image)
	}
	p.mu.Lock()
	a.after.drop(p.space, a.before)
	p.mu.Unlock()
	p.unref(a.used...)
	return nil
}

// windowSize ends a window at the first multiple of 2 MiB after its metadata and its highest extent.
// The pool's size is such a multiple, so the window fits.
func windowSize(m Image, used []*extent) int64 {
	end := m.Window + m.Segment
	for _, e := range used {
		end = max(end, e.span().End())
	}
	return roundUp(end) - m.Window
}

func roundUp(n int64) int64 { return (n + alloc.Align - 1) &^ (alloc.Align - 1) }

// hold references the extents of all files of a plan.
func (p *Pool) hold(plan *daxfs.LivePlan) ([]*extent, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	// There may be millions of files: growing the slice step by step would take several times its memory.
	used := make([]*extent, 0, plan.FileCount())
	for i := range plan.FileCount() {
		d, _ := plan.FileData(i)
		if d.Size == 0 {
			continue
		}
		e := p.extents[d.Off]
		if e == nil || e.size != d.Size || e.sum != d.Sum || !e.listed {
			return nil,
				fmt.Errorf("%q: contents of %d bytes at %d, sum %x: %w", plan.FilePath(i), d.Size, d.Off,
					d.Sum, ErrNotFound)
		}
		used = append(used, e)
	}
	used = slices.Compact(byOffset(used))
	for _, e := range used {
		e.ref()
	}
	return used, nil
}

func (p *Pool) newSegment(n int64) (int64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	off, ok := p.space.Segment(n)
	if !ok {
		free, _ := p.space.Free()
		return 0,
			&FullError{What: fullSegment, Need: n, Have: p.space.SegmentRoom(), Free: free + p.space.SegmentFree()}
	}
	return off, nil
}

// freeSegment frees the space from newSegment, unless the index may list it.
func (p *Pool) freeSegment(m Image) {
	if p.index.unknown() != nil {
		return
	}
	p.punch(alloc.Span{Off: m.Window, Len: m.Segment})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.space.FreeSegment(m.Window, m.Segment)
}

// writeSegment writes the metadata of an image into its window's segment, and zeros the rest.
func (p *Pool) writeSegment(plan *daxfs.Plan, m Image) error {
	at := daxfs.Placement{Image: m.Window, Meta: m.Window + daxfs.BlockSize, End: m.Window + m.WindowSize}
	if err := plan.Place(at); err != nil {
		return err
	}
	if err := p.region.Punch(m.Window, m.Segment); err != nil {
		return fmt.Errorf("clear the segment: %w", err)
	}
	return plan.WriteTo(window{p, m.Window, m.Segment})
}

// window limits writes to a range of the pool; offsets are relative to its start.
type window struct {
	p        *Pool
	off, len int64
}

func (w window) WriteAt(b []byte, off int64) (int, error) {
	if off < 0 || int64(len(b)) > w.len || off > w.len-int64(len(b)) {
		return 0, fmt.Errorf("write of %d bytes at %d of a range of %d: %w", len(b), off, w.len, io.ErrShortWrite)
	}
	if err := w.p.write(b, w.off+off); err != nil {
		return 0, err
	}
	return len(b), nil
}

func entryOff(slot int) int64 { return tableOff + int64(slot)*entrySize }

// publish makes an image of the index visible: first its slot, then its entry in the slot table, then
// a header. If that fails, the image stays, and publishStale tries again. Preconditions: commit is
// held.
func (p *Pool) publish(m *image) error {
	if err := p.publishSlot(m); err != nil {
		return fmt.Errorf("publish at slot %d: %w", m.Slot, err)
	}
	if err := p.writeHeader(p.header.generation + 1); err != nil {
		return err
	}
	p.freeRetired()
	return nil
}

// publishSlot writes the slot of an image, then its entry. It leaves a correct slot alone: while a
// slot is being written, nobody finds the image by name.
func (p *Pool) publishSlot(m *image) error {
	g := p.header.geo
	w := window{p, 0, p.header.size}
	have := make([]byte, daxfs.SlotSize)
	if n, err := p.region.ReadAt(have, g.SlotOff(m.Slot)); n < len(have) {
		return err
	}
	sync := func() error { return p.region.Sync(g.SlotOff(m.Slot), daxfs.SlotSize) }
	if !bytes.Equal(have, m.slot) {
		if err := daxfs.PublishSlot(w, g, m.Slot, m.slot, sync); err != nil {
			return err
		}
	} else if err := sync(); err != nil {
		return err
	}
	if _, err := w.WriteAt(p.entry(m), entryOff(m.Slot)); err != nil {
		return err
	}
	if err := p.region.Sync(entryOff(m.Slot), entrySize); err != nil {
		return err
	}
	delete(p.stale, m.Slot)
	return nil
}

// publishStale retries failed publications. Preconditions: commit is held, or p is not shared yet.
func (p *Pool) publishStale() error {
	for _, m := range p.images {
		if p.stale[m.Slot] == nil {
			continue
		}
		if err := p.publishSlot(m); err != nil {
			return fmt.Errorf("publish image %q at slot %d: %w", m.Key, m.Slot, err)
		}
	}
	return nil
}

// republish writes images that the index has and readers do not see yet.
func (p *Pool) republish() error {
	p.commit.Lock()
	defer p.commit.Unlock()
	if len(p.stale) == 0 {
		return nil
	}
	return p.republishStale()
}

// republishStale is republish without the lock. Preconditions: commit is held.
func (p *Pool) republishStale() error {
	gen := p.header.generation + 1
	if err := p.index.setGeneration(gen); err != nil {
		return err
	}
	if err := p.publishStale(); err != nil {
		return err
	}
	if err := p.writeHeader(gen); err != nil {
		return err
	}
	p.freeRetired()
	return nil
}

// Image returns an image. Errors: ErrNotFound.
func (p *Pool) Image(key string) (Image, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m := p.images[key]; m != nil {
		return m.Image, nil
	}
	return Image{}, fmt.Errorf("pool: image %q: %w", key, ErrNotFound)
}

// Images returns all images, by slot.
func (p *Pool) Images() []Image {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]Image, 0, len(p.images))
	for _, m := range p.images {
		out = append(out, m.Image)
	}
	slices.SortFunc(out, func(a, b Image) int { return cmp.Compare(a.Slot, b.Slot) })
	return out
}

// RemoveImage removes an image: its catalogue entry, slot, directories and window. Contents that
// nothing else holds become dead: see Dead. After an error the image is unchanged or gone.
//
// Preconditions: nothing uses the image, in any kernel. A kernel that has one of its directories in
// memory could see it empty or damaged, though never another image's bytes. RemoveImage itself asks
// readers that have leases.
//
// Errors: ErrNotFound; ErrLeased if readers use the image. Then the catalogue no longer lists it, and
// a later call removes it.
func (p *Pool) RemoveImage(ctx context.Context, key string) error {
	p.commit.Lock()
	defer p.commit.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := p.removeImage(key); err != nil {
		return fmt.Errorf("pool: image %q: %w", key, err)
	}
	return nil
}

// removeImage is RemoveImage. Preconditions: commit is held.
func (p *Pool) removeImage(key string) error {
	m, err := p.takeImage(key)
	if err != nil {
		return err
	}
	if err = p.unleased(m); err == nil {
		err = p.index.removeImage(m.storedImage, p.header.generation+1)
	}
	p.mu.Lock()
	if err != nil {
		m.leaving = false
		p.mu.Unlock()
		return err
	}
	delete(p.images, key)
	for _, e := range m.used {
		e.images--
	}
	p.mu.Unlock()
	delete(p.stale, m.Slot)
	p.erase[m.Slot] = m.own
	if err := p.eraseRemoved(); err != nil {
		p.warn(fmt.Errorf("pool: image %q is removed but not erased yet: %w", key, err))
	} else if m.Segment > 0 {
		p.freeSegment(m.Image)
	}
	p.unref(m.used...)
	if m.doc != nil {
		p.unref(m.doc)
	}
	return nil
}

// takeImage marks an image as leaving.
func (p *Pool) takeImage(key string) (*image, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.images[key]
	switch {
	case p.closed:
		return nil, ErrClosed
	case m == nil:
		return nil, ErrNotFound
	}
	m.leaving = true
	return m, nil
}

// eraseRemoved removes images from the slot table and the live tree. The entry goes first: readers on
// other kernels rely on it. Preconditions: commit is held, or p is not shared yet.
func (p *Pool) eraseRemoved() error {
	if len(p.erase) == 0 {
		return nil
	}
	g := p.header.geo
	w := window{p, 0, p.header.size}
	var slots []int
	for slot := range p.erase {
		slots = append(slots, slot)
		if _, err := w.WriteAt(make([]byte, entrySize), entryOff(slot)); err != nil {
			return err
		}
	}
	if err := p.region.Sync(tableOff, g.Head-tableOff); err != nil {
		return err
	}
	if err := p.writeHeader(p.header.generation + 1); err != nil {
		return err
	}
	lo, hi := p.header.size, int64(0)
	note := func(off, n int64) { lo, hi = min(lo, off), max(hi, off+n) }
	for _, slot := range slots {
		if err := daxfs.RetractSlot(w, g, slot); err != nil {
			return err
		}
		note(g.SlotOff(slot), daxfs.SlotSize)
		if own := p.erase[slot]; own.Len > 0 {
			if err := p.region.Punch(own.Off, own.Len); err != nil {
				return err
			}
			note(own.Off, own.Len)
		}
	}
	if err := p.region.Sync(lo, hi-lo); err != nil {
		return err
	}
	if err := p.index.erased(slots); err != nil {
		return err
	}
	clear(p.erase)
	return nil
}
