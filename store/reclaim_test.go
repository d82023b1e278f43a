package store

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// fill adds contents of size bytes again and again, which take any space of that size that was freed.
func (k *kit) fill(size int) {
	k.t.Helper()
	for i := range 20 {
		k.stream(file{"x", random(uint64(100+i), size)})
	}
}

// expectOpen fails the test unless an open file, read anew from the pool, has these contents.
func (k *kit) expectOpen(f *os.File, body []byte) {
	k.t.Helper()
	got := make([]byte, len(body))
	k.uncache("/proc/self/fd/" + fdName(f))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, body) {
		k.t.Errorf("the open file changed: %v", err)
	}
}

// other mounts one more image, which keeps the pool mounted while a sweep needs it.
func (k *kit) other() wants {
	k.t.Helper()
	img := image(k.stream(file{"other", random(7, 1000)}))
	_, err := k.Lower(k.t.Context(), img)
	k.must(err)
	return wants{img.Key: InUse, img.Layers[0].Key: Kept}
}

// A path descriptor in a mount made by hand opens its file for reading at any time, even after the
// mount is gone. The contents wait until the kernel has dropped the inode, also after a restart.
func TestPathDescriptorKeepsContents(t *testing.T) {
	const size = 3_000_000
	for name, show := range map[string]func(k *kit, img Image, lower, dir string){
		"mounted by the store": func(k *kit, img Image, _, dir string) {
			_, err := k.MountAt(k.t.Context(), img.Key, dir, true)
			k.must(err)
		},
		"bound by a user": func(k *kit, _ Image, lower, dir string) {
			k.must(unix.Mount(lower, dir, "", unix.MS_BIND, ""))
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKit(t, nil)
			ctx := t.Context()
			need := k.other()
			a := file{"a", random(1, size)}
			img := image(k.stream(a))
			lower, err := k.Lower(ctx, img)
			k.must(err)
			dir := t.TempDir()
			show(k, img, lower, dir)
			k.must(k.Sweep(ctx, need, false))
			k.expect(dir, a)
			fd, err := unix.Open(filepath.Join(dir, "a"), unix.O_PATH|unix.O_CLOEXEC, 0)
			k.must(err)
			path := os.NewFile(uintptr(fd), "a")
			defer path.Close()
			k.must(detach(dir))
			k.restart(nil)
			k.must(k.Sweep(ctx, need, false))
			if n := len(k.pool.Images()); n != 1 {
				t.Fatalf("%d images are in the pool, expected that one is gone", n)
			}
			k.fill(size)
			f, err := os.Open("/proc/self/fd/" + fdName(path))
			k.must(err)
			k.expectOpen(f, a.body)
			k.must(f.Close())
			k.must(path.Close())
		})
	}
}

// A file in a detached mount keeps the file system alive when the pool is unmounted. Another mount of
// the pool is another file system, which knows nothing of the file, so all contents wait for its end.
func TestStrayFileSystemKeepsContents(t *testing.T) {
	const size = 3_000_000
	k := newKit(t, nil)
	ctx := t.Context()
	a := file{"a", random(1, size)}
	dir, err := k.Lower(ctx, image(k.stream(a)))
	k.must(err)
	f, err := os.Open(filepath.Join(dir, "a"))
	k.must(err)
	defer f.Close()
	k.must(detach(dir))
	waits := func(when string, need wants) {
		t.Helper()
		k.must(k.Sweep(ctx, need, false))
		if u := k.pool.Usage(); u.Images != len(need)/2 || u.Dead < size {
			t.Errorf("%s: %+v, expected that the contents of the open file wait", when, u)
		}
	}
	waits("unmounted", wants{})
	k.restart(nil)
	need := k.other()
	waits("mounted again", need)
	k.restart(nil)
	waits("restarted while it is mounted", need)
	k.fill(size)
	k.expectOpen(f, a.body)
	k.must(f.Close())
	waits("closed while the pool is mounted", need)
	k.must(k.Sweep(ctx, wants{}, false))
	if u := k.pool.Usage(); u.Dead != 0 {
		t.Errorf("%d bytes wait although nothing lives", u.Dead)
	}
	// From then on contents are freed while the pool is mounted.
	for range 2 {
		b := k.stream(file{"b", random(2, size)})
		_, err = k.Lower(ctx, image(b))
		k.must(err)
		need = k.other()
		k.must(k.Sweep(ctx, need, false))
		if u := k.pool.Usage(); u.Images != 1 || u.Dead != 0 {
			t.Errorf("%+v, expected that no contents wait", u)
		}
		k.restart(nil)
	}
}

// Free takes the kernel's answers for the extents that are still dead: those put again stay, and an
// open file does not lose its contents to another's answer.
func TestFreeAfterRevival(t *testing.T) {
	const size = 1_000_000
	k := newKit(t, nil)
	ctx := t.Context()
	k.other()
	var files []file
	var layers []Layer
	for i := range 3 {
		files = append(files, file{fmt.Sprint(i), random(uint64(1+i), size+i*4096)})
		layers = append(layers, k.stream(files[i]))
	}
	img := image(layers...)
	dir, err := k.Lower(ctx, img)
	k.must(err)
	open := map[int64]*os.File{}
	bodies := map[int64]file{}
	for _, f := range files {
		o, err := os.Open(filepath.Join(dir, f.name))
		k.must(err)
		defer o.Close()
		open[int64(len(f.body))], bodies[int64(len(f.body))] = o, f
	}
	k.must(detach(dir))
	if err := k.table.Unmount(ctx, img.Key); !errors.Is(err, mount.ErrNotFound) {
		k.must(err)
	}
	k.must(k.pool.RemoveImage(ctx, img.Key))
	for _, l := range layers {
		k.decoded.drop(l.Key)
		k.must(k.pool.RemoveLayer(ctx, l.Key))
	}
	dead := k.pool.Dead()
	if len(dead) != 3 {
		t.Fatalf("%d extents are dead, expected 3", len(dead))
	}
	revived, used, unused := dead[0].Size, dead[1].Size, dead[2].Size
	k.must(open[revived].Close())
	k.must(open[unused].Close())
	again := k.stream(bodies[revived])
	n, err := Free(ctx, k.pool, k.table, dead, false)
	k.must(err)
	left := k.pool.Dead()
	if n != 1 || len(left) != 1 || left[0].Size != used {
		t.Errorf("%d extents were freed, %+v are left; expected the one of %d bytes", n, left, used)
	}
	k.fill(size)
	k.expectOpen(open[used], bodies[used].body)
	dir, err = k.Lower(ctx, image(again))
	k.must(err)
	k.expect(dir, bodies[revived])
	k.must(open[used].Close())
}

// One sweep frees more dead contents than the kernel is asked about at a time.
func TestReclaimsAllBatches(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	need := k.other()
	var files []file
	for i := range batchSize + 3 {
		files = append(files, file{fmt.Sprint(i), random(uint64(i), 64)})
	}
	_, err := k.Lower(ctx, image(k.stream(files...)))
	k.must(err)
	k.must(k.Sweep(ctx, need, false))
	if u := k.pool.Usage(); u.Images != 1 || u.DeadCount != 0 {
		t.Errorf("%+v, expected that no contents wait", u)
	}
}

// A new epoch needs a pool that nothing has mounted. Nothing of the old one lives then, so what is
// known of its users is forgotten.
func TestNewEpochForgetsUsers(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	a := file{"a", random(1, 5000)}
	img := image(k.stream(a))
	dir, err := k.Lower(ctx, img)
	k.must(err)
	k.must(k.noteLoose())
	if err := k.newEpoch(ctx); err == nil {
		t.Error("a new epoch began under a mounted image")
	}
	k.expect(dir, a)
	loose := func(want int) {
		t.Helper()
		all, err := k.pool.Records(kindLoose)
		if err != nil || len(all) != want || k.records.loose != (want > 0) {
			t.Errorf("loose uses are noted: %t, with the records %q, %v; expected %d", k.records.loose, all, err, want)
		}
	}
	loose(1)
	k.must(k.table.Unmount(ctx, img.Key))
	k.must(k.newEpoch(ctx))
	loose(0)
	dir, err = k.Lower(ctx, img)
	k.must(err)
	k.expect(dir, a)
	k.restart(nil)
	loose(0)
}

// Somebody who looks into the mount of the pool delays its end, and stops neither a sweep nor a start.
func TestBusyPool(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	img := image(k.stream(file{"a", random(1, 5000)}))
	_, err := k.Lower(ctx, img)
	k.must(err)
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(filepath.Join(k.cfg.Root, "live")))
	if err != nil || len(mounts) != 1 {
		t.Fatalf("mounts of the pool: %v, %v", mounts, err)
	}
	f, err := os.Open(mounts[0].Mountpoint)
	k.must(err)
	defer f.Close()
	k.must(k.Sweep(ctx, wants{}, false))
	k.restart(nil)
	mounted := func(want bool) {
		t.Helper()
		if is, err := mountinfo.Mounted(mounts[0].Mountpoint); want && (err != nil || !is) || !want && is {
			t.Errorf("the pool is mounted: %t, %v; expected %t", is, err, want)
		}
	}
	mounted(true)
	k.must(f.Close())
	k.must(k.UnmountIdle(ctx))
	mounted(false)
}

// While readers keep the images of a pool, only a command begins a new epoch, which removes them all.
// It begins even without dead contents if images that are gone used up most of the slots.
func TestReadersKeepEpoch(t *testing.T) {
	k := newKit(t, func(c *Config) { c.Readers = &Readers{Mode: ReadersKeep} })
	ctx := t.Context()
	k.restart(func() { // with few slots, a few images are most of them
		all, err := filepath.Glob(filepath.Join(k.cfg.Root, "pool/*.db"))
		if err != nil || len(all) != 1 {
			t.Fatalf("indexes %q, %v", all, err)
		}
		r, err := region.Open(k.regionConfig())
		k.must(err)
		p, err := pool.Create(r, all[0], pool.Options{Force: true, Slots: 8})
		k.must(err)
		k.must(errors.Join(p.Close(), r.Close()))
	})
	for i := range uint64(6) {
		k.must(k.rebuildOne(ctx, image(k.stream(file{"b", random(2+i, 5000)}))))
	}
	kept := image(k.stream(file{"a", random(1, 5000)}))
	_, err := k.Lower(ctx, kept)
	k.must(err)
	need := wants{kept.Key: InUse, kept.Layers[0].Key: Kept}
	k.must(k.Sweep(ByCommand(ctx), need, false))
	uuid := k.pool.UUID()
	is := func(when string, same bool, images int) {
		t.Helper()
		if u := k.pool.Usage(); (k.pool.UUID() == uuid) != same || u.Images != images || u.DeadCount != 0 {
			t.Errorf("%s: %+v; expected %d images, the same epoch: %t", when, u, images, same)
		}
	}
	is("images removed by a command", true, 1)
	k.must(k.Sweep(ctx, wants{}, false))
	is("nothing needed here", true, 1)
	if n := len(k.Mounted()); n != 0 {
		t.Errorf("%d images are mounted", n)
	}
	k.restart(nil)
	is("restarted", true, 1)
	need[kept.Key] = Kept
	k.must(k.Sweep(ByCommand(ctx), need, false))
	is("by a command", false, 0)
}
