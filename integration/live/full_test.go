package live

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool"
)

// The disk below a mounted pool fills up at any write of a publication. The image is then missing, and
// no other is affected. Removing images works and frees space; with space the image is published.
func TestFullDisk(t *testing.T) {
	pl := place{fs: "ext4", driver: "erofs-file", size: 256 << 20, disk: 48 << 20, shape: "reuse", slots: 20_000}
	b := newBed(t, pl, newSeed(t))
	f := &full{bed: b, rnd: rand.New(rand.NewPCG(b.seed, 6)), live: map[int]string{}}
	for range 4 {
		f.publish(t)
	}
	rounds := times(t, 60)
	for i := 0; i < rounds && !t.Failed(); i++ {
		f.round(t)
	}
	t.Logf("%d publications met a full disk, %d fitted; the pool had to be opened anew %d times; %d images were "+
		"removed from a full disk", f.failed, f.fitted, f.reopened, f.removed)
	if !testing.Short() && (f.failed < rounds/4 || f.removed == 0) {
		t.Error("the disk was not full often enough for this to be a test")
	}
	for n := range f.live {
		if ok, err := b.remove(t.Context(), n, func() {}); err != nil || !ok {
			t.Errorf("remove image %d: %t, %v", n, ok, err)
		}
	}
	if _, waiting, err := b.reclaim(t.Context(), false); err != nil || waiting > 0 {
		t.Errorf("%d extents wait, nobody reads: %v", waiting, err)
	}
	b.emptied(t)
	if err := b.tab.UnmountPool(t.Context()); err != nil {
		t.Error(err)
	}
}

// full is a bed with a full disk.
type full struct {
	*bed
	rnd  *rand.Rand
	next int
	live map[int]string // directories

	failed, fitted, reopened, removed int
}

func (f *full) publish(t *testing.T) {
	t.Helper()
	n := f.next
	dir, err := f.bed.publish(t.Context(), n)
	if err != nil {
		t.Fatalf("publish image %d with room on the disk: %v", n, err)
	}
	f.next++
	f.live[n] = dir
}

func (f *full) round(t *testing.T) {
	t.Helper()
	free := f.fill(t)
	n := f.next
	dir, err := f.bed.publish(t.Context(), n)
	switch {
	case err == nil:
		f.fitted++
		f.next++
		f.live[n] = dir
	case !errors.Is(err, pool.ErrFull) && !errors.Is(err, unix.ENOSPC):
		t.Errorf("publish image %d with %d free blocks: %v, expected that the disk is full", n, free, err)
	default:
		f.failed++
		if _, err := f.p.Image(key(n)); !errors.Is(err, pool.ErrNotFound) {
			t.Logf("image %d could not be published completely, and is there: %v", n, err)
		}
	}
	f.verify(t)
	f.removeOne(t)
	if err := os.Remove(f.ballast()); err != nil {
		t.Fatal(err)
	}
	f.recover(t)
	f.check(t)
	f.verify(t)
	if _, err := f.p.Image(key(n)); err != nil {
		f.publish(t)
	} else if f.live[n] == "" { // the index has it: it was published when there was room
		f.next++
		m, err := f.p.Image(key(n))
		if err == nil {
			f.live[n], err = f.mount(t.Context(), m)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func (f *full) ballast() string { return filepath.Join(f.dir, "ballast") }

// fill leaves a few free blocks on the disk, and returns their number.
func (f *full) fill(t *testing.T) int64 {
	t.Helper()
	if err := f.r.Sync(0, f.r.Size()); err != nil {
		t.Fatal(err)
	}
	b, err := os.Create(f.ballast())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	leave := f.rnd.Int64N(600)
	for { // the file needs metadata blocks, too
		var fs unix.Statfs_t
		var st unix.Stat_t
		if err := errors.Join(unix.Fstatfs(int(b.Fd()), &fs), unix.Fstat(int(b.Fd()), &st)); err != nil {
			t.Fatal(err)
		}
		more := int64(fs.Bfree) - leave
		if more <= 0 {
			return int64(fs.Bfree)
		}
		err := unix.Fallocate(int(b.Fd()), 0, st.Size, min(more, 256)*4096)
		if errors.Is(err, unix.ENOSPC) {
			return int64(fs.Bfree)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func (f *full) verify(t *testing.T) {
	t.Helper()
	for n, dir := range f.live {
		if _, err := verify(dir, f.want(n), f.rnd, false); err != nil {
			t.Errorf("image %d: %v", n, err)
		}
	}
}

// removeOne removes an image while the disk is full, and frees its space.
func (f *full) removeOne(t *testing.T) {
	t.Helper()
	if len(f.live) < 4 {
		return
	}
	for n := range f.live {
		ok, err := f.remove(t.Context(), n, func() {})
		if err != nil || !ok {
			// The index may not be writable any more.
			t.Logf("remove image %d from a full disk: %t, %v", n, ok, err)
			return
		}
		delete(f.live, n)
		f.removed++
		break
	}
	if _, _, err := f.reclaim(t.Context(), false); err != nil {
		t.Logf("free space of a full disk: %v", err)
	}
}

// recover reopens the pool if the pool requires it.
func (f *full) recover(t *testing.T) {
	t.Helper()
	err := f.p.SetRecord("test", "key", []byte(fmt.Sprint(f.next)))
	if err == nil {
		err = f.r.Sync(0, f.r.Size())
	}
	if err == nil {
		return
	}
	t.Logf("open the pool anew: %v", err)
	f.reopened++
	f.close(t)
	f.open(t)
}
