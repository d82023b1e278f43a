package alloc

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// check proves that segments, extents and gaps cover each byte once, and that New accepts them.
func check(t *testing.T, s *Space, extents map[int64]int64) {
	t.Helper()
	spans := s.Gaps()
	var list []Span
	for off, n := range extents {
		list = append(list, Span{off, n})
		if off < s.segTop() {
			t.Fatalf("extent at %d lies below the segments, which end at %d", off, s.segTop())
		}
		if n >= Align && off%Align != 0 {
			t.Fatalf("extent of %d bytes at %d is not aligned", n, off)
		}
	}
	spans = append(spans, list...)
	spans = append(spans, s.Segments()...)
	slices.SortFunc(spans, func(a, b Span) int { return cmp.Compare(a.Off, b.Off) })
	at := s.lo
	for _, sp := range spans {
		if sp.Off != at {
			t.Fatalf("span at %d, expected %d", sp.Off, at)
		}
		at = sp.End()
	}
	if at != s.hi {
		t.Fatalf("spans end at %d, expected %d", at, s.hi)
	}
	again, err := New(s.lo, s.hi, s.reserve, s.Segments(), list)
	if err != nil {
		t.Fatal(err)
	}
	free, longest := s.Free()
	free2, longest2 := again.Free()
	if free+s.SegmentFree() != free2+again.SegmentFree() || longest > longest2 {
		t.Fatalf("%d free, longest %d; built again %d and %d", free+s.SegmentFree(), longest,
			free2+again.SegmentFree(), longest2)
	}
}

func TestRandom(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 0))
		const lo, hi = Align, 65 * Align
		s, err := New(lo, hi, 3*Align, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		extents, segs := map[int64]int64{}, map[int64]int64{}
		for i := range 3000 {
			switch op := rng.IntN(20); {
			case op < 10:
				n := Unit * (1 + rng.Int64N(1<<rng.IntN(11)))
				if off, ok := s.Extent(n); ok {
					extents[off] = n
				} else if _, longest := s.Free(); n < Align && longest >= n {
					t.Fatalf("seed %d: no room for %d with %d in one piece", seed, n, longest)
				}
			case op < 11:
				n := Align * (1 + rng.Int64N(3))
				room := s.SegmentRoom()
				off, ok := s.Segment(n)
				if ok != (room >= n) {
					t.Fatalf("seed %d: segment of %d: %v with room for %d", seed, n, ok, room)
				}
				if ok {
					segs[off] = n
				}
			case op < 12:
				for off, n := range segs {
					s.FreeSegment(off, n)
					delete(segs, off)
					break
				}
			default:
				for off, n := range extents {
					s.FreeExtent(off, n)
					delete(extents, off)
					break
				}
			}
			if i%100 == 0 {
				check(t, s, extents)
			}
		}
		for off, n := range extents {
			s.FreeExtent(off, n)
		}
		for off, n := range segs {
			s.FreeSegment(off, n)
		}
		if free, longest := s.Free(); free != longest || s.GapCount() != 1 || free != hi-lo-3*Align {
			t.Fatalf("seed %d: all freed: %d bytes free in %d gaps, the longest %d", seed, free, s.GapCount(), longest)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for name, in := range map[string]struct{ segs, extents []Span }{
		"overlapping extents":     {nil, []Span{{40 * Align, 2 * Unit}, {40*Align + Unit, Unit}}},
		"overlapping segments":    {[]Span{{Align, 2 * Align}, {2 * Align, Align}}, nil},
		"extent below a segment":  {[]Span{{10 * Align, Align}}, []Span{{5 * Align, Unit}}},
		"extent inside a segment": {[]Span{{10 * Align, Align}}, []Span{{10 * Align, Unit}}},
		"misaligned extent":       {nil, []Span{{40*Align + 1, Unit}}},
		"misaligned segment":      {[]Span{{Align + Unit, Align}}, nil},
		"empty":                   {nil, []Span{{40 * Align, 0}}},
		"negative":                {nil, []Span{{40 * Align, -Unit}}},
		"below the start":         {nil, []Span{{0, Unit}}},
		"over the end":            {nil, []Span{{64 * Align, 2 * Align}}},
		"far over the end":        {nil, []Span{{math.MaxInt64 &^ (Align - 1), Align}}},
	} {
		if _, err := New(Align, 65*Align, Align, in.segs, in.extents); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestSegmentsTakeFromExtents fills the space with extents: exactly the reserve is left for segments.
func TestSegmentsTakeFromExtents(t *testing.T) {
	s, err := New(Align, 33*Align, 2*Align, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	var last int64
	for n := 0; ; n++ {
		off, ok := s.Extent(Align)
		if !ok {
			if n != 30 {
				t.Errorf("%d extents fit, expected 30", n)
			}
			break
		}
		last = off
	}
	if _, ok := s.Segment(3 * Align); ok {
		t.Error("a segment overlaps an extent")
	}
	if off, ok := s.Segment(2 * Align); !ok || off != Align {
		t.Errorf("segment in the reserve: %d, %v", off, ok)
	}
	s.FreeExtent(last, Align)
	if off, ok := s.Segment(Align); !ok || off != 3*Align {
		t.Errorf("segment above the reserve: %d, %v", off, ok)
	}
	if _, ok := s.Extent(Unit); ok {
		t.Error("an extent fits into a full space")
	}
	s.FreeSegment(3*Align, Align)
	if off, ok := s.Extent(Align); !ok || off != 3*Align {
		t.Errorf("extent where the segment was: %d, %v", off, ok)
	}
}

// TestChurn measures fragmentation: images with realistic file sizes come and go, at about 85 % use.
// It measures how full the space is whenever something does not fit.
func TestChurn(t *testing.T) {
	rounds := 4000
	if testing.Short() {
		rounds = 800
	}
	rng := rand.New(rand.NewPCG(7, 7))
	const lo, hi = Align, 4 << 30
	s, err := New(lo, hi, (hi-lo)/32, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	type group []Span // the files of one image
	var groups []group
	var used int64
	fail, worst, small, sum, maxGaps, ops := 0, 1.0, 1.0, 0.0, 0, 0
	remove := func(i int) {
		for _, e := range groups[i] {
			s.FreeExtent(e.Off, e.Len)
			used -= e.Len
			ops++
		}
		groups[i] = groups[len(groups)-1]
		groups = groups[:len(groups)-1]
	}
	total := hi - lo - s.reserve
	for range rounds {
		var g group
		for range 1 + rng.IntN(2000) {
			// Log-normal: half the files are below 6 KiB; one in 200 is a library or model of megabytes.
			n := RoundUnit(1 + int64(math.Exp(rng.NormFloat64()*1.9+8.7)))
			if rng.IntN(200) == 0 {
				n = RoundUnit(1 + rng.Int64N(24<<20))
			}
			n = min(n, 64<<20)
			off, ok := s.Extent(n)
			for !ok && len(groups) > 0 {
				full := float64(used) / float64(total)
				fail++
				sum += full
				worst = min(worst, full)
				if n < total/1000 {
					small = min(small, full)
				}
				remove(rng.IntN(len(groups)))
				off, ok = s.Extent(n)
			}
			if !ok {
				t.Fatalf("%d bytes do not fit into an empty space", n)
			}
			g = append(g, Span{off, n})
			used += n
			ops++
		}
		groups = append(groups, g)
		for float64(used) > 0.85*float64(total) && rng.IntN(4) != 0 {
			remove(rng.IntN(len(groups)))
		}
		maxGaps = max(maxGaps, s.GapCount())
	}
	t.Logf("%d operations: %d times something did not fit, at %.1f %% use on average, %.1f %% at worst, "+
		"%.1f %% at worst for files below 1/1000 of the space; at most %d gaps",
		ops, fail, 100*sum/float64(max(1, fail)), 100*worst, 100*small, maxGaps)
	// The largest files have 1/60 of the space.
	if fail == 0 || worst < 0.65 || small < 0.90 {
		t.Errorf("did not fit %d times, at %.1f %% use at worst, expected 65; for small files at %.1f %%, expected 90",
			fail, 100*worst, 100*small)
	}
	for len(groups) > 0 {
		remove(0)
	}
	if s.GapCount() != 1 {
		t.Errorf("%d gaps after everything was freed", s.GapCount())
	}
}

func BenchmarkExtent(b *testing.B) {
	s, err := New(Align, 64<<30, Align, nil, nil)
	if err != nil {
		b.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	var live []Span
	b.ReportAllocs()
	for b.Loop() {
		if len(live) > 100_000 {
			k := rng.IntN(len(live))
			s.FreeExtent(live[k].Off, live[k].Len)
			live[k] = live[len(live)-1]
			live = live[:len(live)-1]
			continue
		}
		n := Unit * (1 + rng.Int64N(16))
		if off, ok := s.Extent(n); ok {
			live = append(live, Span{off, n})
		}
		if rng.IntN(3) == 0 {
			k := rng.IntN(len(live))
			s.FreeExtent(live[k].Off, live[k].Len)
			live[k] = live[len(live)-1]
			live = live[:len(live)-1]
		}
	}
}
