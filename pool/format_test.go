package pool

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// TestFormatOrder makes a pool in the place of another and loses, at each operation, all that was not synced.
// What is left is the old pool, a wiped region or the new pool: never a pool without its index.
func TestFormatOrder(t *testing.T) {
	if testing.Short() {
		t.Skip("slow: loses power at every write")
	}
	f := &faults{}
	r, index := newSimRegion(simSize, f), filepath.Join(fastDir(t), "index")
	p, err := Create(r, index, Options{})
	noError(t, err)
	addImage(t, p, "old", bodies.a)
	noError(t, p.Close())
	wiped := 0
	look := func(want string) {
		copied := index + ".copy"
		copyFile(t, index, copied)
		p, err := Open(r.syncedClone(), copied, Options{})
		if errors.Is(err, ErrWiped) && want == "" {
			wiped++
			return
		}
		if err != nil {
			t.Errorf("operation %d: %v", f.n, err)
			return
		}
		defer p.Close()
		mustCheck(t, p)
		if n := len(p.Images()); n > 0 && wiped > 0 {
			t.Errorf("operation %d: %d images after the region was wiped", f.n, n)
		}
	}
	f.n, f.each = 0, func() { look("") }
	p, err = Create(r, index, Options{Force: true})
	noError(t, err)
	f.each = nil
	look("the new pool")
	noError(t, p.Close())
	if f.n < 5 || wiped == 0 {
		t.Errorf("%d operations, wiped at %d", f.n, wiped)
	}
}

// A new pool keeps none of the bytes, and none of the memory, of what was in the region before.
func TestFormatClears(t *testing.T) {
	r := newSimRegion(simSize, &faults{})
	for i := range r.mem {
		r.mem[i] = 0xa5
	}
	p, err := Create(r, filepath.Join(fastDir(t), "index"), Options{Force: true})
	noError(t, err)
	defer p.Close()
	if low := p.header.lowStart(); !isZero(r.mem[low:]) {
		t.Errorf("old bytes behind the slots, which end at %d", low)
	}
	mustCheck(t, p)
}

// The live tree of another pool, or of another epoch, is not taken for the one that the header describes.
func TestOpenRefusesLiveTree(t *testing.T) {
	p, r, index := leasedPool(t, &faults{})
	g := p.Geometry()
	noError(t, p.Close())
	g.UUID[0]++
	noError(t, daxfs.GrowLive(r, g)) // writes the superblock
	if _, err := Open(r, index, Options{}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("open: %v, expected %v", err, ErrCorrupt)
	}
}

// TestRepublishOrder publishes an image whose slot could not be written, and loses, at each operation, all
// that was not synced: the pool can be opened, and has the image.
func TestRepublishOrder(t *testing.T) {
	if testing.Short() {
		t.Skip("slow: loses power at every write")
	}
	f := &faults{}
	p, r, index := leasedPool(t, f)
	b := p.Begin()
	defer b.Discard()
	d, other := put(t, b, bodies.d), put(t, b, bodies.g)
	// The process goes on after the index has the image, and each later write has failed.
	p.index.fail = f.hit
	p.index.done = func(op string) error {
		if op == "put image" {
			f.n, f.at, f.stay = 0, 1, true
		}
		return nil
	}
	if _, err := p.AddImage(ctx, "c", tree(d), daxfs.Options{}); !errors.Is(err, errFault) || len(p.stale) != 1 {
		t.Fatalf("%v, %d images wait, expected one", err, len(p.stale))
	}
	p.index.done = func(string) error { return nil }
	f.at = 0
	if _, err := p.AddImage(ctx, "d", tree(other), daxfs.Options{}); err != nil || len(p.stale) != 1 {
		t.Fatalf("%v, %d images wait, expected one", err, len(p.stale)) // the header has caught up with the index
	}
	f.n, f.each = 0, func() {
		if keys := reopened(t, r, index); keys != "abcd" {
			t.Errorf("operation %d: after a power loss the catalogue lists %q", f.n, keys)
		}
	}
	_, err := p.AddImage(ctx, "c", tree(d), daxfs.Options{})
	noError(t, err)
	f.each = nil
	if keys := listed(t, r); f.n < 4 || keys != "abcd" {
		t.Errorf("after %d operations the catalogue lists %q", f.n, keys)
	}
	mustCheck(t, p)
}
