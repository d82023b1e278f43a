package sink

import (
	"os"
	"path/filepath"
	"testing"
)

func testPlacer(t *testing.T) *placer {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &placer{f: f, align: true, tail: page, known: map[key][]int32{}}
}

// TestCollisions: contents of one key are never taken for each other, and are not all compared with each other.
func TestCollisions(t *testing.T) {
	p := testPlacer(t)
	const n = 100_000 // comparing all with each other would read 5 billion times
	ids := map[int32]bool{}
	for i := range n {
		b := make([]byte, page)
		b[0], b[1], b[2] = byte(i), byte(i>>8), byte(i>>16)
		id, err := p.whole(item{n: page, size: page, first: true, last: true}, b)
		if err != nil {
			t.Fatal(err)
		}
		ids[id] = true
	}
	if len(ids) != n {
		t.Errorf("%d contents became %d", n, len(ids))
	}
	if id, err := p.whole(item{n: page, size: page, first: true, last: true}, make([]byte, page)); err != nil || id != 0 {
		t.Errorf("the first content again is %d (%v), expected 0", id, err)
	}
}

// TestManyGaps: a million contents at the end that fit into none of the million gaps at the beginning.
func TestManyGaps(t *testing.T) {
	p := testPlacer(t)
	const n = 1_000_000
	var live []int32
	at := int64(page)
	for pages := int64(1); pages <= 2; pages++ {
		for range n {
			at += pages * page
			live = append(live, int32(len(p.extents)))
			p.extents = append(p.extents, extent{off: at, size: pages * page, live: true})
			at += pages * page
		}
	}
	if moved, err := p.fillFromTail(live); err != nil || moved != 0 {
		t.Errorf("moved %d bytes (%v), expected that slide does the work", moved, err)
	}
}
