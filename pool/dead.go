package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// Dead is an extent that nothing holds any more, and to which inodes of the live tree point. A kernel may have one of them
// in memory and read through it, so the bytes stay until somebody who can ask the kernel calls Free.
type Dead struct {
	Off, Size int64    // of the contents, in bytes
	Nids      []uint64 // of the inodes
}

// Dead returns the dead extents, those that died first first. Contents that are put again take theirs back to life, until
// Erase is called.
func (p *Pool) Dead() []Dead {
	p.mu.Lock()
	defer p.mu.Unlock()
	var es []*extent
	for _, e := range p.extents {
		if e.died != 0 {
			es = append(es, e)
		}
	}
	slices.SortFunc(es, func(a, b *extent) int { return cmp.Compare(a.died, b.died) })
	out := make([]Dead, len(es))
	for i, e := range es {
		out[i] = Dead{Off: e.off, Size: e.size, Nids: make([]uint64, 0, e.inodeCount())}
		for in := range e.inodes() {
			out[i].Nids = append(out[i].Nids, in.nid)
		}
	}
	return out
}

// Erase makes the inodes of dead extents ones that a kernel refuses to open (ENXIO), and returns those of the extents that were
// still dead: they stay so. Who has an inode in memory keeps it.
func (p *Pool) Erase(ctx context.Context, dead []Dead) ([]Dead, error) {
	p.commit.Lock()
	defer p.commit.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var out []Dead
	lo, hi := p.header.size, int64(0)
	w := window{p, 0, p.header.size}
	for _, d := range dead {
		if p.markErased(d) == nil {
			continue
		}
		for _, nid := range d.Nids {
			if err := daxfs.EraseInode(w, p.header.geo, nid); err != nil {
				return nil, fmt.Errorf("pool: erase inode %d: %w", nid, err)
			}
			off := p.header.geo.NidOff(nid)
			lo, hi = min(lo, off), max(hi, off+daxfs.InodeSize)
		}
		out = append(out, d)
	}
	if hi > lo {
		if err := p.region.Sync(lo, hi-lo); err != nil {
			return nil, fmt.Errorf("pool: erase %d inodes: %w", len(out), err)
		}
	}
	return out, nil
}

// markErased returns the extent of d if it is dead, and sees to it that it stays so.
func (p *Pool) markErased(d Dead) *extent {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.extents[d.Off]
	if e == nil || e.died == 0 || e.size != d.Size {
		return nil
	}
	e.erased = true
	p.unlist(e)
	return e
}

// Free frees the space of dead extents, for which the caller has proof that no kernel can read them any more: Erase
// returned them, and nothing has one of their inodes open, or in memory at all if the pool is mounted with DAX.
func (p *Pool) Free(ctx context.Context, dead []Dead) error {
	p.commit.Lock()
	defer p.commit.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	var es []*extent
	for _, d := range dead {
		if e := p.markErased(d); e != nil {
			es = append(es, e)
		}
	}
	return p.free(es)
}

// free takes dead extents out of the index, then frees their space. Preconditions: commit is held.
func (p *Pool) free(es []*extent) error {
	if len(es) == 0 {
		return nil
	}
	runs := map[int64][]runInode{}
	gone := map[*extent]bool{}
	for _, e := range es {
		gone[e] = true
		for in := range e.inodes() {
			runs[in.run] = nil
		}
	}
	p.mu.Lock()
	keep := func(e *extent) {
		for in := range e.inodes() {
			if list, ok := runs[in.run]; ok && !gone[e] {
				runs[in.run] = append(list, runInode{off: e.off, size: e.size, nid: in.nid, key: in.key})
			}
		}
	}
	keep(p.empty)
	for _, e := range p.extents {
		keep(e)
	}
	p.mu.Unlock()
	for _, list := range runs {
		slices.SortFunc(list, func(a, b runInode) int {
			return cmp.Or(cmp.Compare(a.off, b.off), cmp.Compare(a.nid, b.nid))
		})
	}
	if err := p.index.putRuns(runs); err != nil {
		return fmt.Errorf("pool: free %d extents: %w", len(es), err)
	}
	p.mu.Lock()
	for _, e := range es {
		e.dropInodes()
		p.forgetExtent(e)
	}
	p.freeing++
	p.mu.Unlock()
	p.release(es)
	return nil
}

// NothingMounted frees all dead extents, and turns the epoch if that gains enough: the live tree begins anew, with another
// UUID and without images. Layers stay, and whoever knows what images are made of adds them again.
//
// Preconditions: no superblock of the pool lives in any kernel, and no window of it is mounted; nothing is mounted until
// the call returns. turned tells whether there is a new epoch.
func (p *Pool) NothingMounted(ctx context.Context) (turned bool, err error) {
	return p.nothingMounted(ctx, false)
}

// NewEpoch is NothingMounted that turns the epoch in any case: for a live tree that somebody else has written to, which
// then is made again from what the index knows.
func (p *Pool) NewEpoch(ctx context.Context) error {
	turned, err := p.nothingMounted(ctx, true)
	if err == nil && !turned {
		err = fmt.Errorf("pool: an image is being added: %w", ErrBusy)
	}
	return err
}

func (p *Pool) nothingMounted(ctx context.Context, always bool) (turned bool, err error) {
	p.commit.Lock()
	defer p.commit.Unlock()
	if err := ctx.Err(); err != nil {
		return false, err
	}
	p.mu.Lock()
	closed := p.closed
	waiting := false
	var es []*extent
	for _, e := range p.extents {
		if e.died != 0 {
			e.erased = true
			p.unlist(e)
			es = append(es, e)
			waiting = true
		}
	}
	busy := len(p.adding) > 0
	p.mu.Unlock()
	if closed {
		return false, fmt.Errorf("pool: %w", ErrClosed)
	}
	turn := !busy && (always || p.worthTurning() || waiting && p.header.dax)
	if turn {
		err := p.unleasedPool()
		if err != nil && always {
			return false, err
		}
		if err != nil && !errors.Is(err, ErrLeased) {
			p.warn(fmt.Errorf("pool: no epoch begins: %w", err))
		}
		turn = err == nil
	}
	if !turn {
		// Nobody has the inodes in memory; the next mount must not read them.
		return false, p.eraseAndFree(es)
	}
	if err := p.turn(es); err != nil {
		if p.hidden { // the epoch goes on
			err = errors.Join(err, p.hide(false))
		}
		return true, err
	}
	return true, nil
}

// worthTurning tells whether a new epoch would gain much: half of the slots, or half of what the tree area has taken.
func (p *Pool) worthTurning() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	live := len(p.images)
	if p.header.used-live > p.header.geo.Slots/2 {
		return true
	}
	runs := map[int64]bool{}
	own := int64(0)
	for _, m := range p.images {
		own += m.own.Len
	}
	inodes := int64(0)
	for _, e := range p.extents {
		if e.died != 0 {
			continue
		}
		for in := range e.inodes() {
			runs[in.run] = true
			inodes += daxfs.InodeSize
		}
	}
	used := p.tree.used()
	return used > 4*alloc.Align && used-own-inodes-int64(len(runs))*daxfs.BlockSize > used/2
}

func (p *Pool) eraseAndFree(es []*extent) error {
	w := window{p, 0, p.header.size}
	for _, e := range es {
		for in := range e.inodes() {
			if err := daxfs.EraseInode(w, p.header.geo, in.nid); err != nil {
				return fmt.Errorf("pool: erase inode %d: %w", in.nid, err)
			}
		}
	}
	if len(es) > 0 {
		if err := p.region.Sync(p.header.geo.TreeStart(), p.header.size-p.header.geo.TreeStart()); err != nil {
			return fmt.Errorf("pool: erase inodes: %w", err)
		}
	}
	return p.free(es)
}

// turn begins a new epoch. The index comes first: whatever happens after it, the next opening finishes it.
func (p *Pool) turn(dead []*extent) error {
	gen := p.header.generation + 1
	uuid := newUUID()
	if err := p.index.newEpoch(gen, uuid, p.header.firstChunk()); err != nil {
		return fmt.Errorf("pool: begin an epoch: %w", err)
	}
	p.mu.Lock()
	var used []*extent
	for _, m := range p.images {
		for _, e := range m.used {
			e.images--
		}
		used = append(used, m.used...)
		if m.doc != nil {
			used = append(used, m.doc)
		}
	}
	used = append(used, p.retired...)
	p.retired = nil
	p.hidden = false
	clear(p.images)
	clear(p.stale)
	clear(p.erase)
	p.empty.dropInodes()
	for _, e := range p.extents {
		e.dropInodes()
	}
	for _, e := range dead {
		p.forgetExtent(e)
	}
	p.freeing++
	p.mu.Unlock()
	p.unref(used...)
	p.release(dead)
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.freeing > 0 { // by batches that are discarded at this moment: their spans belong to the old division of space
		p.mu.Unlock()
		time.Sleep(time.Millisecond)
		p.mu.Lock()
	}
	p.begun = &uuid
	return p.finishEpoch(gen)
}

// finishEpoch writes the live tree of an epoch that the index has and the region has not. Preconditions: commit and mu
// are held; nothing is mounted.
func (p *Pool) finishEpoch(gen uint64) error {
	if p.begun == nil {
		return nil
	}
	if err := p.startEpoch(gen, *p.begun); err != nil {
		return fmt.Errorf("pool: begin an epoch: %w", err)
	}
	p.begun = nil
	return nil
}
