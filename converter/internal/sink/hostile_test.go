package sink

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

func testPlacer(t *testing.T) *placer {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &placer{f: f, align: true, tail: page, known: map[uint64]int32{}}
}

// TestManyGaps: a million contents at the end that fit none of the million gaps at the beginning.
func TestManyGaps(t *testing.T) {
	slow.Skip(t, "makes two million gaps")
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

// TestSumsThatBeginAlike: contents are equal only if their whole sums are, not just the prefixes.
func TestSumsThatBeginAlike(t *testing.T) {
	p := testPlacer(t)
	var sums [3][32]byte
	for i := range sums {
		sums[i] = [32]byte{1, 2, 3, 31: byte(i)}
		id, err := p.whole(item{size: page, sum: sums[i]}, make([]byte, page))
		if err != nil || id != int32(i) {
			t.Fatalf("contents %d are extent %d, %v", i, id, err)
		}
	}
	for i := range sums {
		if id, err := p.whole(item{size: page, sum: sums[i]}, make([]byte, page)); err != nil || id != int32(i) {
			t.Errorf("contents %d are found as extent %d, %v", i, id, err)
		}
	}
	if p.saved != 3*page {
		t.Errorf("%d bytes saved, expected %d", p.saved, 3*page)
	}
}
