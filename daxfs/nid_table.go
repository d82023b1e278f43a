package daxfs

import "hash/maphash"

// nidTable finds items of a list by inode number. It stores only indexes and takes a quarter of the
// memory of a map: there may be millions of items. It hashes with a secret because the numbers come
// from images: see nidSeed.
type nidTable struct {
	// 1 + the index of an item, or 0; the length is a power of two, and at most three quarters are used
	slots []int32
	n     int
}

// find returns the index of the item of inode want. nid returns the inode of the item at an index.
func (t *nidTable) find(want uint64, nid func(int32) uint64) (int32, bool) {
	if t.n == 0 {
		return 0, false
	}
	for k := t.first(want); t.slots[k] != 0; k = t.next(k) {
		if i := t.slots[k] - 1; nid(i) == want {
			return i, true
		}
	}
	return 0, false
}

// add adds the item at index i, whose inode must be new.
func (t *nidTable) add(i int32, nid func(int32) uint64) {
	if t.n+1 > len(t.slots)/4*3 {
		old := t.slots
		t.slots = make([]int32, max(64, 2*len(old)))
		for _, s := range old {
			if s != 0 {
				t.put(s, nid(s-1))
			}
		}
	}
	t.put(i+1, nid(i))
	t.n++
}

func (t *nidTable) put(s int32, nid uint64) {
	k := t.first(nid)
	for t.slots[k] != 0 {
		k = t.next(k)
	}
	t.slots[k] = s
}

func (t *nidTable) first(nid uint64) uint64 {
	return maphash.Comparable(nidSeed, nid) & uint64(len(t.slots)-1)
}

func (t *nidTable) next(k uint64) uint64 { return (k + 1) & uint64(len(t.slots)-1) }

// nidSeed prevents images crafted so that all their inodes collide.
var nidSeed = maphash.MakeSeed()
