package alloc

import "math/bits"

// gaps holds disjoint free spans and finds one where n bytes fit.
//
// Small spans use good fit: gaps are kept in classes by the power of two of their length. The lowest
// class with a long enough gap wins, and in it the gap with the highest offset. So small spans fill
// small holes before large gaps are cut, and everything stays near the top. Aligned spans are large
// and rare: they take the smallest gap that fits, found by a full search. In TestChurn that halves how
// often an aligned span does not fit.
type gaps struct {
	class   [64]*node       // treaps by start
	byStart map[int64]int64 // start -> length
	byEnd   map[int64]int64 // end -> length
	free    int64
	seed    uint64
}

// node is one gap in a treap ordered by start, a heap by prio.
type node struct {
	start, n    int64
	prio        uint64
	left, right *node
	maxLen      int64 // longest gap in this subtree
}

func newGaps() *gaps {
	return &gaps{byStart: map[int64]int64{}, byEnd: map[int64]int64{}, seed: 0x9e3779b97f4a7c15}
}

func classOf(n int64) int { return bits.Len64(uint64(n)) - 1 }

// alignedFit is the longest span that fits into a gap at a multiple of Align.
func alignedFit(start, n int64) int64 {
	return max(0, start+n-roundUp(start))
}

func (t *node) fix() *node {
	t.maxLen = t.n
	for _, c := range [2]*node{t.left, t.right} {
		if c != nil {
			t.maxLen = max(t.maxLen, c.maxLen)
		}
	}
	return t
}

// split cuts a treap into starts below and from start up.
func split(t *node, start int64) (lo, hi *node) {
	if t == nil {
		return nil, nil
	}
	if t.start < start {
		a, b := split(t.right, start)
		t.right = a
		return t.fix(), b
	}
	a, b := split(t.left, start)
	t.left = b
	return a, t.fix()
}

func merge(lo, hi *node) *node {
	switch {
	case lo == nil:
		return hi
	case hi == nil:
		return lo
	case lo.prio > hi.prio:
		lo.right = merge(lo.right, hi)
		return lo.fix()
	}
	hi.left = merge(lo, hi.left)
	return hi.fix()
}

func (g *gaps) insert(start, n int64) {
	g.seed ^= g.seed << 13 // xorshift; a treap needs no better randomness
	g.seed ^= g.seed >> 7
	g.seed ^= g.seed << 17
	c := classOf(n)
	lo, hi := split(g.class[c], start)
	g.class[c] = merge(merge(lo, (&node{start: start, n: n, prio: g.seed}).fix()), hi)
	g.byStart[start], g.byEnd[start+n] = n, n
	g.free += n
}

func (g *gaps) remove(start, n int64) {
	c := classOf(n)
	lo, rest := split(g.class[c], start)
	_, hi := split(rest, start+1)
	g.class[c] = merge(lo, hi)
	delete(g.byStart, start)
	delete(g.byEnd, start+n)
	g.free -= n
}

// add frees a span and joins it with its neighbours.
func (g *gaps) add(start, n int64) {
	if n == 0 {
		return
	}
	if before, ok := g.byEnd[start]; ok {
		g.remove(start-before, before)
		start, n = start-before, n+before
	}
	if after, ok := g.byStart[start+n]; ok {
		g.remove(start+n, after)
		n += after
	}
	g.insert(start, n)
}

// take removes [off, off+n) from the gap that starts at gap and has the given length.
func (g *gaps) take(gap, length, off, n int64) {
	g.remove(gap, length)
	if off > gap {
		g.insert(gap, off-gap)
	}
	if end := gap + length; end > off+n {
		g.insert(off+n, end-off-n)
	}
}

// find returns the gap for a span of n bytes; length is 0 if there is none.
func (g *gaps) find(n int64, aligned bool) (start, length int64) {
	if aligned {
		return g.smallest(n)
	}
	for c := classOf(n); c < len(g.class); c++ {
		if t := highest(g.class[c], n); t != nil {
			return t.start, t.n
		}
	}
	return 0, 0
}

// smallest returns the smallest, then highest, gap with room for n bytes at a multiple of Align.
func (g *gaps) smallest(n int64) (start, length int64) {
	for s, l := range g.byStart {
		if alignedFit(s, l) >= n && (length == 0 || l < length || l == length && s > start) {
			start, length = s, l
		}
	}
	return start, length
}

// highest returns the fitting gap with the highest start.
func highest(t *node, n int64) *node {
	for t != nil {
		switch {
		case t.right != nil && t.right.maxLen >= n:
			t = t.right
		case t.n >= n:
			return t
		default:
			t = t.left
		}
	}
	return nil
}

func (g *gaps) largest() int64 {
	var m int64
	for _, t := range g.class {
		if t != nil {
			m = max(m, t.maxLen)
		}
	}
	return m
}
