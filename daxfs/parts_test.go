package daxfs

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// TestNidTable: the table finds the same items as a map, at any size, and no missing ones.
func TestNidTable(t *testing.T) {
	var (
		items parts[uint64]
		table nidTable
		want  = map[uint64]int32{}
		rng   = rand.New(rand.NewPCG(1, 2))
	)
	nid := func(i int32) uint64 { return *items.at(i) }
	for items.len() < 3*partLen+1 {
		n := rng.Uint64N(8 * partLen) // some occur twice
		got, ok := table.find(n, nid)
		i, there := want[n]
		if ok != there || ok && got != i {
			t.Fatalf("inode %d is found at %d, %v, expected %d, %v", n, got, ok, i, there)
		}
		if ok {
			continue
		}
		want[n] = items.len()
		items.add(n)
		table.add(want[n], nid)
	}
	for n, i := range want {
		if got, ok := table.find(n, nid); !ok || got != i {
			t.Errorf("inode %d is found at %d, %v, expected %d", n, got, ok, i)
		}
	}
	flat := items.take()
	if len(flat) != len(want) || items.len() != 0 {
		t.Fatalf("%d items, and %d left, expected %d", len(flat), items.len(), len(want))
	}
	for i, n := range flat {
		if want[n] != int32(i) {
			t.Errorf("item %d is %d, which was added as number %d", i, n, want[n])
		}
	}
	if slices.Sort(flat); len(slices.Compact(flat)) != len(want) {
		t.Error("items are there twice")
	}
}
