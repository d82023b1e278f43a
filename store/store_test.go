package store

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
	"github.com/daxfs/daxfs-snapshotter/mount"
)

// A layer goes in, an image comes out; unneeded ones are removed, and their space is free again.
func TestLifeOfAnImage(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	a, b := file{"a", random(1, 3_000_000)}, file{"b", random(2, 5000)}
	img := image(k.stream(a), k.stream(b))
	dir, err := k.Lower(ctx, img)
	k.must(err)
	k.expect(dir, a, b)
	again, err := k.Lower(ctx, img)
	if k.must(err); again != dir {
		t.Errorf("the second time at %q, the first at %q", again, dir)
	}
	need := wants{img.Key: Ready, img.Layers[0].Key: Kept, img.Layers[1].Key: Kept}
	k.must(k.Sweep(ctx, need, false))
	k.expect(dir, a, b)
	need[img.Key] = Kept
	k.must(k.Sweep(ctx, need, false))
	if n := len(k.Mounted()); n != 0 || len(k.pool.Images()) != 1 {
		t.Errorf("%d images are mounted, %d in the pool; expected none and one", n, len(k.pool.Images()))
	}
	k.restart(nil)
	if dir, err = k.Lower(ctx, img); err != nil {
		t.Fatal(err)
	}
	k.expect(dir, a, b)
	k.must(k.Sweep(ctx, wants{}, false))
	if u := k.pool.Usage(); u.Images+u.Layers != 0 || u.Extents+u.Dead != 0 {
		t.Errorf("left over: %+v", u)
	}
	if n := len(k.imageRecords()) + len(k.layerRecords()); n != 0 {
		t.Errorf("%d records are left over", n)
	}
}

// Contents of an open file keep their bytes, whatever is added, and are freed once it is closed.
func TestOpenFileKeepsItsBytes(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	a := file{"a", random(1, 3_000_000)}
	other := image(k.stream(file{"other", random(7, 1000)})) // keeps the pool mounted
	_, err := k.Lower(ctx, other)
	k.must(err)
	need := wants{other.Key: InUse, other.Layers[0].Key: Kept}
	img := image(k.stream(a))
	dir, err := k.Lower(ctx, img)
	k.must(err)
	f, err := os.Open(filepath.Join(dir, "a"))
	k.must(err)
	defer f.Close()
	// The mount is busy while a file in it is open, so the file can outlive only a detached mount.
	k.must(detach(dir))
	k.must(k.Sweep(ctx, need, false))
	for i := range 20 {
		k.stream(file{"x", random(uint64(100+i), 3_000_000)})
	}
	got := make([]byte, len(a.body))
	k.uncache("/proc/self/fd/" + fdName(f))
	if _, err := f.ReadAt(got, 0); err != nil || string(got) != string(a.body) {
		t.Errorf("the open file changed: %v", err)
	}
	if k.pool.Usage().Dead == 0 {
		t.Error("the contents of an open file are not waiting")
	}
	k.must(f.Close())
	k.must(k.Sweep(ctx, need, false))
	if u := k.pool.Usage(); u.Dead != 0 {
		t.Errorf("%d bytes still wait", u.Dead)
	}
}

// A mount by hand keeps the image and its contents.
func TestMountAt(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	a := file{"a", random(1, 3_000_000)}
	img := image(k.stream(a))
	img.Name = "example/a:1"
	_, err := k.Lower(ctx, img)
	k.must(err)
	dir := t.TempDir()
	info, err := k.MountAt(ctx, "example/a:1", dir, true)
	k.must(err)
	if info.Key != img.Key || k.Mounts()[dir] != img.Key {
		t.Errorf("mounted %+v, mounts %v", info, k.Mounts())
	}
	for range 2 {
		k.must(k.Sweep(ctx, wants{}, false))
		k.uncache(filepath.Join(dir, "a"))
		k.expect(dir, a)
		k.restart(nil)
	}
	f, err := os.Open(filepath.Join(dir, "a"))
	k.must(err)
	if err := k.UnmountAt(ctx, dir); !errors.Is(err, mount.ErrBusy) {
		t.Errorf("unmounted with an open file: %v", err)
	}
	k.must(f.Close())
	k.must(k.UnmountAt(ctx, dir))
	if err := k.UnmountAt(ctx, dir); !errors.Is(err, mount.ErrNotFound) {
		t.Errorf("unmounted twice: %v", err)
	}
	k.must(k.Sweep(ctx, wants{}, false))
	if u := k.pool.Usage(); u.Images != 0 || u.Extents+u.Dead != 0 {
		t.Errorf("left over: %+v", u)
	}
}

// An image that was put stays until it is unpinned, even through a new epoch and without containerd.
func TestPut(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	a, b := file{"a", random(1, 3_000_000)}, file{"a", random(2, 3_000_000)}
	first, err := k.Put(ctx, sourceOf(a), "example/a:1")
	k.must(err)
	k.must(k.Sweep(ctx, wants{}, true))
	k.sweep()
	k.restart(nil)
	k.must(k.Sweep(ctx, wants{}, false))
	found, err := k.Find("example/a:1")
	if k.must(err); found.Key != first.Key || len(found.Holders) != 1 {
		t.Fatalf("found %+v", found)
	}
	k.must(k.newEpoch(ctx))
	k.sweep()
	found, err = k.Find("example/a:1")
	if k.must(err); found.Key != first.Key {
		t.Fatalf("found %+v after a new epoch", found)
	}
	dir, err := k.Lower(ctx, image(Layer{Key: BlobKey(digestOf(a))})) // containerd pulls the same image
	k.must(err)
	k.expect(dir, a)
	// The name moves to another image.
	second, err := k.Put(ctx, sourceOf(b), "example/a:1")
	k.must(err)
	k.must(k.Sweep(ctx, wants{}, false))
	if all := k.Images(); len(all) != 1 || all[0].Key != second.Key {
		t.Errorf("images %+v", all)
	}
	k.must(k.Unpin("example/a:1"))
	k.must(k.Sweep(ctx, wants{}, false))
	if u := k.pool.Usage(); u.Images+u.Layers != 0 || u.Extents+u.Dead != 0 {
		t.Errorf("left over: %+v", u)
	}
}

// A layer too large for the cache is encoded while it is dropped, and read again from the pool.
func TestLargeLayer(t *testing.T) {
	slow.Skip(t, "adds a layer with more files than the cache holds")
	k := newKit(t, nil)
	ctx := t.Context()
	var files []file
	for i := range maxCached + 10 {
		f := file{fmt.Sprintf("%06d", i), nil}
		if i%500 == 0 {
			f.body = random(uint64(i%3000), 100+i%7)
		}
		files = append(files, f)
	}
	layer := k.stream(files...)
	if _, _, ok := k.decoded.get(layer.Key); ok {
		t.Error("the layer is in the cache")
	}
	_, err := k.Lower(ctx, image(layer))
	k.must(err)
	other := file{"other", random(1, 5000)}
	dir, err := k.Lower(ctx, image(layer, k.stream(other)))
	k.must(err)
	names, err := os.ReadDir(dir)
	if k.must(err); len(names) != len(files)+1 {
		t.Errorf("%d names, expected %d", len(names), len(files)+1)
	}
	for _, f := range append(files, other) {
		if len(f.body) == 0 {
			continue
		}
		if got, err := os.ReadFile(filepath.Join(dir, f.name)); err != nil || !bytes.Equal(got, f.body) {
			t.Errorf("%s: %d bytes, %v, expected %d others", f.name, len(got), err, len(f.body))
		}
	}
}

func TestPutDirectory(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	dir := t.TempDir()
	for _, text := range []string{"one", "two"} {
		k.must(os.WriteFile(filepath.Join(dir, "f"), []byte(text), 0o644))
		_, err := k.Put(ctx, dirSource(dir), "mine")
		k.must(err)
		k.sweep()
		at := t.TempDir()
		_, err = k.MountAt(ctx, "mine", at, true)
		k.must(err)
		k.expect(at, file{"f", []byte(text)})
		k.must(k.UnmountAt(ctx, at))
	}
	if n := len(k.Images()); n != 1 {
		t.Errorf("%d images", n)
	}
}

// A tree that others damaged is made again from the index.
func TestDamagedTree(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	a := file{"a", random(1, 100_000)}
	img := image(k.stream(a))
	_, err := k.Lower(ctx, img)
	k.must(err)
	k.must(k.table.Unmount(ctx, img.Key))
	k.must(k.table.UnmountPool(ctx))
	k.private = false
	g := k.pool.Geometry()
	_, err = k.region.WriteAt(make([]byte, 4096), g.SlotOff(0)&^4095)
	k.must(err)
	dir, err := k.Lower(ctx, img)
	k.must(err)
	k.expect(dir, a)
}

// A copy on disk equals the image, with all attributes.
func TestPlain(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	src := t.TempDir()
	makeOddities(t, src)
	k.must(k.AddDir(ctx, "x", "dir/1", src))
	img := image(Layer{Key: "dir/1"})
	dir, err := k.Plain(ctx, img)
	k.must(err)
	if got, want := describe(t, dir), describe(t, src); got != want {
		t.Errorf("the copy is\n%s\nthe original\n%s", got, want)
	}
	need := wants{"dir/1": Kept, "plain " + img.Key: Kept}
	k.must(k.Sweep(ctx, need, false))
	if again, err := k.Plain(ctx, img); err != nil || again != dir {
		t.Errorf("again at %q, %v", again, err)
	}
	k.must(os.MkdirAll(filepath.Join(k.plainDir(), "new-1/tree"), 0o700)) // left by a killed process
	k.restart(nil)
	delete(need, "plain "+img.Key)
	k.must(k.Sweep(ctx, need, false))
	if left, err := os.ReadDir(k.plainDir()); err != nil || len(left) != 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

func TestKeyLocksAreForgotten(t *testing.T) {
	var l keyLock
	for range 3 {
		unlock, err := l.lock(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		unlock()
	}
	if len(l.locks) != 0 {
		t.Errorf("%d locks are left", len(l.locks))
	}
}
