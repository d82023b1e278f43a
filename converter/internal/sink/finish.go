package sink

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"golang.org/x/sys/unix"
)

// Result describes the contents that Finish left in the file.
type Result struct {
	// End is the first address behind all contents, a multiple of the block size.
	End int64
	// Contents is the number of distinct contents and Bytes the sum of their sizes.
	Contents int64
	Bytes    int64
	// Deduplicated is the total size of contents that were not stored again.
	Deduplicated int64
	// Moved is the number of bytes moved to close gaps.
	Moved int64
}

// Finish waits until the contents of all layers are placed, drops contents that the tree does not refer to,
// closes gaps, and replaces the placeholders in the tree by addresses and sums. All layers must be closed.
func (s *Sink) Finish(root *daxfs.Node) (Result, error) {
	<-s.done
	if err := s.Err(); err != nil {
		return Result{}, err
	}
	s.spill.close()
	p := &s.out
	r := Result{Deduplicated: p.saved}
	p.known = nil // no more contents follow
	err := eachContent(root, func(d *daxfs.Data) error {
		id := s.extentOf(d.Off)
		if id < 0 {
			return fmt.Errorf("address %#x is not one of this sink", d.Off)
		}
		p.extents[id].live = true
		return nil
	})
	if err != nil {
		return r, err
	}
	if r.Moved, err = p.compact(); err != nil {
		return r, fmt.Errorf("write image: %w", err)
	}
	err = eachContent(root, func(d *daxfs.Data) error {
		if id := s.extentOf(d.Off); id >= 0 { // else done by another name of the file
			d.Off, d.Sum = p.extents[id].off, p.extents[id].sum
		}
		return nil
	})
	if err != nil {
		return r, err
	}
	for _, e := range p.extents {
		if e.live {
			r.Contents++
			r.Bytes += e.size
		}
	}
	r.End = p.tail
	s.forget()
	return r, nil
}

// forget frees the records of contents: there may be millions, and the tree now has all that is needed.
func (s *Sink) forget() {
	s.out.extents, s.out.known, s.out.gaps = nil, nil, nil
	for _, l := range s.layers {
		l.refs = nil
	}
}

// eachContent calls f for every name of a nonempty regular file below n, thus several times for hard
// links: with millions of files, remembering them takes too much memory.
func eachContent(n *daxfs.Node, f func(d *daxfs.Data) error) error {
	for _, c := range n.Entries {
		var err error
		switch kind := c.Mode & unix.S_IFMT; {
		case kind == unix.S_IFDIR:
			err = eachContent(c, f)
		case kind == unix.S_IFREG && c.Data.Size > 0:
			err = f(&c.Data)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// extentOf resolves a placeholder; -1 if it is none.
func (s *Sink) extentOf(off int64) int32 {
	if off&virtual == 0 {
		return -1
	}
	n := (off &^ virtual) / page
	layer, seq := n>>seqBits, n&(1<<seqBits-1)
	if layer >= int64(len(s.layers)) || seq >= int64(len(s.layers[layer].refs)) {
		return -1
	}
	return s.layers[layer].refs[seq]
}

// compact closes worthwhile gaps between live extents, zeroes the others, and truncates the file.
func (p *placer) compact() (moved int64, err error) {
	live := make([]int32, 0, len(p.extents))
	var total int64
	for id, e := range p.extents {
		if e.live {
			live = append(live, int32(id))
			total += up(e.size, page)
		}
	}
	byAddress := func(a, b int32) int { return cmp.Compare(p.extents[a].off, p.extents[b].off) }
	slices.SortFunc(live, byAddress)
	if moved, err = p.fillFromTail(live); err != nil {
		return moved, err
	}
	slices.SortFunc(live, byAddress)
	// Alignment may cost 1/64 of the contents, and one gap is always allowed.
	if gaps := p.end(live) - page - total; gaps > max(huge, total/64) {
		n, err := p.slide(live, total)
		if moved += n; err != nil {
			return moved, err
		}
	}
	at := int64(page)
	for _, id := range live {
		if err := p.zero(at, p.extents[id].off); err != nil {
			return moved, err
		}
		at = p.extents[id].end()
	}
	p.tail = at
	return moved, p.f.Truncate(at)
}

func (p *placer) end(live []int32) int64 {
	if len(live) == 0 {
		return page
	}
	return p.extents[live[len(live)-1]].end()
}

// fillFromTail moves the last extents into gaps while the last one fits one of the first free gaps.
func (p *placer) fillFromTail(live []int32) (moved int64, err error) {
	var gaps []gap
	at := int64(page)
	for _, id := range live {
		if e := p.extents[id]; e.off > at {
			gaps = append(gaps, gap{at, e.off})
		}
		at = p.extents[id].end()
	}
	first := 0 // gaps before it are full
	for i := len(live) - 1; i >= 0 && first < len(gaps); i-- {
		e := &p.extents[live[i]]
		n := up(e.size, page)
		to := int64(-1)
		for j := first; j < min(len(gaps), first+maxGaps) && gaps[j].off < e.off; j++ {
			g := &gaps[j]
			off := g.off
			if p.align && e.size >= huge {
				off = up(off, huge)
			}
			if g.end-off < n {
				continue
			}
			if off == g.off {
				g.off += n
			} else {
				// The room before an aligned extent stays usable; the room behind it is rarely worth another gap.
				g.end = off
			}
			to = off
			break
		}
		for first < len(gaps) && gaps[first].off == gaps[first].end {
			first++
		}
		if to < 0 {
			return moved, nil
		}
		if err := p.move(e, to); err != nil {
			return moved, err
		}
		moved += n
	}
	return moved, nil
}

// slide moves every extent down to the end of the previous one, in order of address. It keeps
// alignment while the necessary gaps are small.
func (p *placer) slide(live []int32, total int64) (moved int64, err error) {
	at, spare := int64(page), max(huge, total/64)
	for _, id := range live {
		e := &p.extents[id]
		to := at
		if p.align && e.size >= huge {
			if aligned := up(at, huge); aligned-at <= spare && aligned <= e.off {
				spare -= aligned - at
				to = aligned
			}
		}
		if to != e.off {
			if err := p.move(e, to); err != nil {
				return moved, err
			}
			moved += up(e.size, page)
		}
		at = e.end()
	}
	return moved, nil
}

// move copies an extent to a lower address; the ranges may overlap.
func (p *placer) move(e *extent, to int64) error {
	if err := p.flush(); err != nil {
		return err
	}
	if err := p.cover(e.end()); err != nil {
		return err
	}
	buf := p.scratch()
	for done, n := int64(0), up(e.size, page); done < n; {
		k := min(n-done, int64(len(buf)))
		if _, err := p.f.ReadAt(buf[:k], e.off+done); err != nil {
			return err
		}
		if _, err := p.f.WriteAt(buf[:k], to+done); err != nil {
			return err
		}
		done += k
	}
	e.off = to
	return nil
}
