package live

import (
	"errors"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// Bytes that a removed image may leave behind while the pool is mounted. The next epoch frees them.
const (
	maxTreeLeft  = 24 << 10 // addresses of the tree area
	maxDiskLeft  = 6 << 10  // blocks of the pool file
	maxIndexLeft = 1 << 10
)

// Images come and go in a pool that stays mounted. Their space is freed, except for bounded amounts,
// which are logged. When nothing is mounted, all of it is freed.
func TestChurn(t *testing.T) {
	slow.Skip(t, "publishes a thousand images")
	count := times(t, 10_000)
	const window = 20 // number of images at a time
	pl := place{
		fs: "ext4", driver: "erofs-file", shape: "small", slots: count + 10,
		size: 128<<20 + int64(count)*64<<10, disk: 256<<20 + int64(count)*64<<10,
	}
	b := newBed(t, pl, newSeed(t))
	ctx := t.Context()
	rnd := rand.New(rand.NewPCG(b.seed, 9))
	// The pool stays mounted for one image that stays.
	if _, err := b.publish(ctx, count); err != nil {
		t.Fatal(err)
	}
	mounted := map[int]bool{}
	var start left
	warm := count / 10
	for n := range count {
		if n == warm {
			start = b.left(t)
		}
		m, err := b.add(ctx, n)
		if err != nil {
			t.Fatalf("image %d: %v", n, err)
		}
		if n%50 == 0 {
			dir, err := b.mount(ctx, m)
			if err != nil {
				t.Fatalf("image %d: %v", n, err)
			}
			mounted[n] = true
			if _, err := verify(dir, b.want(n), rnd, false); err != nil {
				t.Fatalf("image %d: %v", n, err)
			}
		}
		if n < window {
			continue
		}
		old := n - window
		if mounted[old] {
			delete(mounted, old)
			if ok, err := b.remove(ctx, old, func() {}); err != nil || !ok {
				t.Fatalf("remove image %d: %t, %v", old, ok, err)
			}
		} else if err := b.p.RemoveImage(ctx, key(old)); err != nil {
			t.Fatalf("remove image %d: %v", old, err)
		}
		if n%50 == 0 {
			if _, waiting, err := b.reclaim(ctx, false); err != nil || waiting > 0 {
				t.Fatalf("%d extents wait, nobody reads: %v", waiting, err)
			}
		}
	}
	end, u := b.left(t), b.p.Usage()
	n := int64(count - warm)
	tree, disk, index := (end.tree-start.tree)/n, (end.disk-start.disk)/n, (end.index-start.index)/n
	t.Logf("%d images came and went. Each leaves, until the pool is not mounted: 1 slot of %d, %d bytes of addresses "+
		"in the tree area, %d bytes of disk, %d bytes of index. "+
		"%d bytes of contents are there, %d wait, %d are free in %d pieces",
		count, u.Slots, tree, disk, index, u.Extents, u.Dead, u.Free, u.Gaps)
	if tree > maxTreeLeft || disk > maxDiskLeft || index > maxIndexLeft {
		t.Errorf("expected at most %d, %d and %d bytes", maxTreeLeft, maxDiskLeft, maxIndexLeft)
	}
	b.check(t)
	for n := count - window; n < count; n++ {
		if err := b.tab.Unmount(ctx, key(n)); mounted[n] && err != nil {
			t.Error(err)
		}
	}
	if err := errors.Join(b.tab.Unmount(ctx, key(count)), b.tab.UnmountPool(ctx)); err != nil {
		t.Fatal(err)
	}
	if alive, err := b.tab.Alive(ctx); err != nil || alive {
		t.Fatalf("alive: %t, %v", alive, err)
	}
	turned, err := b.p.NothingMounted(ctx)
	if err != nil || !turned {
		t.Fatalf("a new epoch: %t, %v", turned, err)
	}
	b.emptied(t)
	if u := b.p.Usage(); u.SlotsUsed != 0 || u.Tree != 0 {
		t.Errorf("the new epoch begins with %d slots and %d bytes of the tree area taken", u.SlotsUsed, u.Tree)
	}
	if now := b.left(t); now.disk > start.disk {
		t.Errorf("the pool file has %d bytes, it had %d after %d images", now.disk, start.disk, warm)
	}
}

// left is the space in use, in bytes.
type left struct{ tree, disk, index int64 }

func (b *bed) left(t *testing.T) left {
	t.Helper()
	var st unix.Stat_t
	if err := errors.Join(b.r.Sync(0, b.r.Size()), unix.Stat(b.config().Path, &st)); err != nil {
		t.Fatal(err)
	}
	index, err := os.Stat(b.indexFile())
	if err != nil {
		t.Fatal(err)
	}
	return left{tree: b.p.Usage().Tree, disk: st.Blocks * 512, index: index.Size()}
}
