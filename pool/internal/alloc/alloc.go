// Package alloc divides a pool into segments, from the bottom, and extents, from the top.
//
// Every extent lies above every segment, because a segment can only refer to higher addresses. Between
// them is a floor: segments are placed below it, extents above it. The floor rises when segments need
// more than their reserve, and sinks when they are freed, but never below the reserve. The reserve
// lets a pool that is full of extents still take the metadata of their images.
package alloc

import (
	"cmp"
	"fmt"
	"slices"
)

// Align is the alignment in bytes of segments, and of extents at least as long: a huge page.
const Align = 2 << 20

// Unit is the granule of extents in bytes: a page.
const Unit = 4096

// Span is a range of bytes of the pool.
type Span struct{ Off, Len int64 }

// End is the offset after the span.
func (s Span) End() int64 { return s.Off + s.Len }

// Space is the division of [lo, hi). It is not safe for concurrent use.
type Space struct {
	lo, hi, reserve int64
	floor           int64
	segs            []Span // by offset
	ext             *gaps  // free, above the floor
}

func roundUp(n int64) int64 { return (n + Align - 1) &^ (Align - 1) }

// RoundUnit rounds a length up to whole units.
func RoundUnit(n int64) int64 { return (n + Unit - 1) &^ (Unit - 1) }

// New divides [lo, hi), both multiples of Align, where segs and extents are in use. It returns an
// error for spans that overlap, are misaligned or outside, and for an extent below a segment.
func New(lo, hi, reserve int64, segs, extents []Span) (*Space, error) {
	s := &Space{lo: lo, hi: hi, reserve: min(roundUp(reserve), (hi-lo)&^(Align-1)), ext: newGaps()}
	s.segs = slices.Clone(segs)
	extents = slices.Clone(extents)
	byOff := func(a, b Span) int { return cmp.Compare(a.Off, b.Off) }
	slices.SortFunc(s.segs, byOff)
	slices.SortFunc(extents, byOff)
	if err := checkSpans("segment", s.segs, lo, hi, Align); err != nil {
		return nil, err
	}
	if err := checkSpans("extent", extents, s.segTop(), hi, Unit); err != nil {
		return nil, err
	}
	s.floor = max(lo+s.reserve, s.segTop())
	if len(extents) > 0 {
		// The reserve was larger once, or a version with another rule made this pool.
		s.floor = max(s.segTop(), min(s.floor, extents[0].Off&^(Align-1)))
	}
	at := s.floor
	for _, e := range extents {
		s.ext.add(at, e.Off-at)
		at = e.End()
	}
	s.ext.add(at, hi-at)
	return s, nil
}

func checkSpans(what string, spans []Span, lo, hi, align int64) error {
	at := lo
	for _, e := range spans {
		switch {
		case e.Len <= 0 || e.Off%align != 0 || e.Len%align != 0:
			return fmt.Errorf("%s %d+%d is not a multiple of %d", what, e.Off, e.Len, align)
		case e.Off < lo || e.Off > hi || e.Len > hi-e.Off:
			return fmt.Errorf("%s %d+%d is outside of %d to %d", what, e.Off, e.Len, lo, hi)
		case e.Off < at:
			return fmt.Errorf("%s %d+%d overlaps the one that ends at %d", what, e.Off, e.Len, at)
		}
		at = e.End()
	}
	return nil
}

// segTop is the end of the highest segment.
func (s *Space) segTop() int64 {
	if len(s.segs) == 0 {
		return s.lo
	}
	return s.segs[len(s.segs)-1].End()
}

// Extent takes n bytes, a positive multiple of Unit, for an extent. The extent starts at a multiple of
// Align if n is at least Align. ok is false if no gap is long enough.
func (s *Space) Extent(n int64) (off int64, ok bool) {
	aligned := n >= Align
	start, length := s.ext.find(n, aligned)
	if length == 0 {
		return 0, false
	}
	off = start + length - n
	if aligned {
		off &^= Align - 1
	}
	s.ext.take(start, length, off, n)
	return off, true
}

// FreeExtent gives back what Extent took.
func (s *Space) FreeExtent(off, n int64) { s.ext.add(off, n) }

// Segment takes n bytes, a positive multiple of Align, for a segment, at the lowest possible offset.
func (s *Space) Segment(n int64) (off int64, ok bool) {
	at := s.lo
	for i, seg := range s.segs {
		if seg.Off-at >= n {
			s.segs = slices.Insert(s.segs, i, Span{at, n})
			return at, true
		}
		at = seg.End()
	}
	if over := at + n - s.floor; over > 0 {
		room := s.ext.byStart[s.floor]
		if room < over {
			return 0, false
		}
		s.ext.take(s.floor, room, s.floor, over)
		s.floor += over
	}
	s.segs = append(s.segs, Span{at, n})
	return at, true
}

// FreeSegment gives back what Segment took.
func (s *Space) FreeSegment(off, n int64) {
	i := slices.Index(s.segs, Span{off, n})
	if i < 0 {
		// This is a bug of the caller, never of the pool's bytes.
		panic(fmt.Sprintf("alloc: segment %d+%d is not in use", off, n))
	}
	s.segs = slices.Delete(s.segs, i, i+1)
	if floor := max(s.lo+s.reserve, s.segTop()); floor < s.floor {
		old := s.floor
		s.floor = floor
		s.ext.add(floor, old-floor)
	}
}

// Free returns the number of bytes free for extents, in all gaps together, and the longest gap.
func (s *Space) Free() (total, longest int64) { return s.ext.free, s.ext.largest() }

// SegmentRoom is the length of the longest segment that fits.
func (s *Space) SegmentRoom() int64 {
	var room int64
	at := s.lo
	for _, seg := range s.segs {
		room = max(room, seg.Off-at)
		at = seg.End()
	}
	return max(room, (s.floor-at+s.ext.byStart[s.floor])&^(Align-1))
}

// SegmentFree is the number of bytes below the floor that no segment uses.
func (s *Space) SegmentFree() int64 {
	free := s.floor - s.lo
	for _, seg := range s.segs {
		free -= seg.Len
	}
	return free
}

// Gaps returns all free spans, by offset.
func (s *Space) Gaps() []Span {
	var out []Span
	at := s.lo
	for _, seg := range s.segs {
		if seg.Off > at {
			out = append(out, Span{at, seg.Off - at})
		}
		at = seg.End()
	}
	if s.floor > at {
		out = append(out, Span{at, s.floor - at})
	}
	low := len(out)
	for start, n := range s.ext.byStart {
		out = append(out, Span{start, n})
	}
	slices.SortFunc(out[low:], func(a, b Span) int { return cmp.Compare(a.Off, b.Off) })
	return out
}

// GapCount is the number of gaps that Free counts.
func (s *Space) GapCount() int { return len(s.ext.byStart) }

// Segments returns the segments in use, by offset.
func (s *Space) Segments() []Span { return slices.Clone(s.segs) }
