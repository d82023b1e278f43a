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
	return &placer{f: f, align: true, tail: page, known: map[[32]byte]int32{}}
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
