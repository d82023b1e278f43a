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

// Dead is an extent without holders, but with inodes in the live tree. A kernel may have such an inode
// in memory and read through it, so the bytes stay until a caller asks the kernel and calls Free.
type Dead struct {
	Off, Size int64    // of the contents, in bytes
	Nids      []uint64 // of the inodes
}

// Dead returns the dead extents, the oldest first. Until Erase, putting the contents revives one.
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

// Erase overwrites inodes of dead extents on disk: a kernel refuses to open them (ENXIO), unless it
// has them in memory. Erase returns the extents that were still dead; they stay dead.
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

// markErased returns the extent of d if it is dead, and makes that final.
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

// Free frees the space of dead extents that no kernel can read any more. The caller has proof: Erase
// returned them, and nothing has their inodes open or, if the pool is mounted with DAX, in memory.
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

// free removes dead extents from the index, then frees their space. Preconditions: commit is held.
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
		p.forgetExtent(e)
	}
	p.freeing++
	p.mu.Unlock()
	p.release(es)
	return nil
}

// NothingMounted frees all dead extents, and begins a new epoch if that gains enough: the live tree
// starts anew, with another UUID and without images. Layers stay; the caller adds images again from
// them.
//
// Preconditions: no superblock of the pool lives in any kernel, no window of it is mounted, and
// nothing is mounted until the call returns. turned tells whether there is a new epoch.
func (p *Pool) NothingMounted(ctx context.Context) (turned bool, err error) {
	return p.nothingMounted(ctx, false)
}

// NewEpoch is like NothingMounted, but always begins a new epoch: for a live tree that a foreign
// process has written to. The tree then starts anew.
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
		if p.hidden { // the old epoch goes on
			err = errors.Join(err, p.hide(false))
		}
		return true, err
	}
	return true, nil
}

// worthTurning tells whether a new epoch would gain half of the slots or half of the used tree area.
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
	count := func(e *extent) {
		for in := range e.inodes() {
			runs[in.run] = true
			inodes += daxfs.InodeSize
		}
	}
	for _, e := range p.extents {
		if e.died == 0 {
			count(e)
		}
	}
	if live > 0 { // which of them need the inodes of empty files is not known
		count(p.empty)
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

// turn begins a new epoch. The index comes first: after a crash, the next opening finishes the change.
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
	for p.freeing > 0 { // batches are being discarded; their spans belong to the old allocator
		p.mu.Unlock()
		time.Sleep(time.Millisecond)
		p.mu.Lock()
	}
	p.unwrittenEpoch = &uuid
	return p.finishEpoch(gen)
}

// finishEpoch writes the live tree of an epoch that is only in the index. Preconditions: commit and mu
// are held; nothing is mounted.
func (p *Pool) finishEpoch(gen uint64) error {
	if p.unwrittenEpoch == nil {
		return nil
	}
	if err := p.startEpoch(gen, *p.unwrittenEpoch); err != nil {
		return fmt.Errorf("pool: begin an epoch: %w", err)
	}
	p.unwrittenEpoch = nil
	return nil
}
