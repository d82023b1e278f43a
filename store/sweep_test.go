package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func (k *kit) expectNoImages() {
	k.t.Helper()
	if m, n := k.Mounted(), len(k.pool.Images()); len(m) != 0 || n != 0 {
		k.t.Errorf("mounted %+v and %d images are left", m, n)
	}
}

// expectLayers fails the test unless the pool has exactly these layers.
func (k *kit) expectLayers(when string, keys ...string) {
	k.t.Helper()
	slices.Sort(keys)
	if have := k.pool.Layers(); !slices.Equal(have, keys) {
		k.t.Errorf("%s: the pool has the layers %q, expected %q", when, have, keys)
	}
}

// A sweep keeps the layers that containerd needs. If memory is short, it evicts those that it can restore.
func TestSweepKeepsLayers(t *testing.T) {
	var evicted []string
	k := newKit(t, func(c *Config) { c.Evicted = func(what string) { evicted = append(evicted, what) } })
	ctx := t.Context()
	b := blobOf(makeTar(file{"a", random(1, 5000)}))
	b.Holder = ""
	st, err := k.AddBlob(ctx, b)
	k.must(err)
	dir := t.TempDir()
	k.must(os.WriteFile(filepath.Join(dir, "b"), random(2, 5000), 0o600))
	k.must(k.AddDir(ctx, "", "dir/b", dir))
	need := wants{st.Key: Kept, "dir/b": Kept}
	k.must(k.Sweep(ctx, need, false))
	k.expectLayers("needed", st.Key, "dir/b")
	// The sweep has recorded containerd as the holder, for those that do not ask containerd.
	k.restart(nil)
	k.sweep()
	k.expectLayers("held", st.Key, "dir/b")
	k.must(k.Sweep(ctx, need, true))
	k.expectLayers("memory is short", st.Key)
	if r := k.layerRecords()["dir/b"]; len(r.Holders) != 1 {
		t.Errorf("the record of the evicted layer is %+v", r)
	}
	if fmt.Sprint(evicted) != "[layer]" {
		t.Errorf("evicted %q, expected the layer of a directory", evicted)
	}
	k.must(k.Sweep(ctx, wants{}, false))
	k.expectLayers("not needed")
	if r := k.layerRecords(); len(r) != 0 {
		t.Errorf("records of layers that nothing needs, one of them evicted before: %+v", r)
	}
}

// If memory is short, a mounted image that can be made again goes, but not what is known of it.
func TestSweepEvictsReady(t *testing.T) {
	var evicted []string
	k := newKit(t, func(c *Config) { c.Evicted = func(what string) { evicted = append(evicted, what) } })
	ctx := t.Context()
	a := file{"a", random(1, 5000)}
	img := image(k.stream(a))
	img.Name = "example.org/web:1"
	dir, err := k.Lower(ctx, img)
	k.must(err)
	need := wants{img.Key: Ready, img.Layers[0].Key: Kept}
	k.must(k.Sweep(ctx, need, false))
	k.expect(dir, a)
	for range 2 {
		k.must(k.Sweep(ctx, need, true))
		k.expectNoImages()
	}
	if r := k.imageRecord(img.Key); fmt.Sprint(evicted) != "[image]" || len(r.Names) != 1 || len(r.Layers) != 1 {
		t.Errorf("evicted %q, left is the record %+v; expected one image and its record", evicted, r)
	}
	dir, err = k.Lower(ctx, img)
	k.must(err)
	k.expect(dir, a)
}

// An image goes even if only the pool or only its mount tells of it.
func TestSweepFindsImages(t *testing.T) {
	for name, forget := range map[string]func(k *kit, key string){
		"in the pool": func(k *kit, key string) { k.must(k.table.Unmount(k.t.Context(), key)) },
		"mounted":     func(k *kit, key string) { k.must(k.pool.RemoveImage(k.t.Context(), key)) },
	} {
		t.Run(name, func(t *testing.T) {
			k := newKit(t, nil)
			img := image(k.stream(file{"a", random(1, 5000)}))
			_, err := k.Lower(t.Context(), img)
			k.must(err)
			forget(k, img.Key)
			k.must(k.forgetImage(img.Key))
			k.must(k.Sweep(t.Context(), wants{}, false))
			k.expectNoImages()
		})
	}
}

// Containerd holds nothing after its last use, also for those that do not ask containerd later.
func TestSweepDropsContainerd(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	img := image(k.stream(file{"a", random(1, 5000)}))
	_, err := k.Lower(ctx, img)
	k.must(err)
	_, err = k.Pin(ctx, img.Key, "pinned")
	k.must(err)
	k.must(k.Sweep(ctx, wants{}, false))
	k.must(k.Unpin("pinned"))
	k.restart(nil)
	k.sweep()
	k.expectLayers("unpinned")
	if n := len(k.pool.Images()); n != 0 {
		t.Errorf("%d images are left", n)
	}
}

// The layers of an image that containerd holds stay without containerd, even one without a record.
func TestSweepKeepsLayersOfImage(t *testing.T) {
	k := newKit(t, nil)
	img := image(k.stream(file{"a", random(1, 5000)}))
	_, err := k.Lower(t.Context(), img)
	k.must(err)
	k.must(k.forgetLayer(img.Layers[0].Key))
	k.sweep()
	k.expectLayers("held", img.Layers[0].Key)
}

// A pinned layer stays, even if its image is not made yet and memory is short.
func TestSweepKeepsPinnedLayer(t *testing.T) {
	k := newKit(t, nil)
	dir := t.TempDir()
	k.must(os.WriteFile(filepath.Join(dir, "a"), random(1, 5000), 0o600))
	k.must(k.AddDir(t.Context(), holderPin+"pinned", "dir/a", dir))
	k.must(k.Sweep(t.Context(), wants{}, true))
	k.expectLayers("pinned", "dir/a")
}

// The layers of a pinned image stay without containerd: there may be no other copy.
func TestSweepKeepsPinned(t *testing.T) {
	for name, pin := range map[string]func(k *kit) (Info, error){
		"image": func(k *kit) (Info, error) {
			return k.Put(t.Context(), sourceOf(file{"a", random(1, 5000)}), "pinned")
		},
		"directory": func(k *kit) (Info, error) {
			dir := k.t.TempDir()
			k.must(os.WriteFile(filepath.Join(dir, "a"), random(1, 5000), 0o600))
			return k.Put(t.Context(), dirSource(dir), "pinned")
		},
		"containerd's image": func(k *kit) (Info, error) {
			img := image(k.stream(file{"a", random(1, 5000)}))
			_, err := k.Lower(t.Context(), img)
			k.must(err)
			return k.Pin(t.Context(), img.Key, "pinned")
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKit(t, nil)
			info, err := pin(k)
			k.must(err)
			for _, short := range []bool{false, true} {
				k.must(k.Sweep(t.Context(), wants{}, short))
				k.expectLayers(fmt.Sprint("short of memory: ", short), info.Layers...)
				if n := len(k.pool.Images()); n != 1 {
					t.Errorf("short of memory: %t: %d images", short, n)
				}
			}
			k.must(k.Unpin("pinned"))
			k.must(k.Sweep(t.Context(), wants{}, false))
			k.expectLayers("unpinned")
		})
	}
}

// The pack of a layer stays as long as the layer is needed, and restores it.
func TestSweepKeepsPacks(t *testing.T) {
	k := newPackKit(t, nil)
	ctx := t.Context()
	a := file{"a", random(1, 50_000)}
	img := image(k.stream(a))
	need := wants{img.Key: Kept, img.Layers[0].Key: Kept}
	_, err := k.Lower(ctx, img)
	k.must(err)
	k.must(k.Sweep(ctx, need, true))
	k.expectLayers("memory is short")
	dir, err := k.Lower(ctx, img)
	k.must(err)
	k.expect(dir, a)
	k.must(k.Sweep(ctx, wants{}, false))
	if ids, err := k.packs.list(); err != nil || len(ids) > 0 {
		t.Errorf("packs of layers that nothing needs: %q, %v", ids, err)
	}
}

// A layer whose pack is gone has no other copy.
func TestSweepKeepsLayerWithoutPack(t *testing.T) {
	k := newPackKit(t, nil)
	raw := makeTar(file{"a", random(1, 50_000)})
	st, err := k.AddBlob(t.Context(), blobOf(raw))
	k.must(err)
	k.must(k.packs.remove(st.DiffID))
	k.must(k.Sweep(t.Context(), wants{st.Key: Kept}, true))
	k.expectLayers("memory is short", st.Key)
}

// An image with an open file stays until the next sweep, which is no error.
func TestSweepLeavesBusy(t *testing.T) {
	k := newKit(t, nil)
	a := file{"a", random(1, 5000)}
	dir, err := k.Lower(t.Context(), image(k.stream(a)))
	k.must(err)
	f, err := os.Open(filepath.Join(dir, "a"))
	k.must(err)
	defer f.Close()
	k.must(k.Sweep(t.Context(), wants{}, false))
	k.expect(dir, a)
	k.must(f.Close())
	k.must(k.Sweep(t.Context(), wants{}, false))
	k.expectNoImages()
}

// The end of one mount by hand does not end another of the same image.
func TestSweepKeepsOtherMount(t *testing.T) {
	k := newKit(t, nil)
	a := file{"a", random(1, 5000)}
	img := image(k.stream(a))
	_, err := k.Lower(t.Context(), img)
	k.must(err)
	ends, stays := t.TempDir(), t.TempDir()
	for _, dir := range []string{ends, stays} {
		_, err = k.MountAt(t.Context(), img.Key, dir, true)
		k.must(err)
	}
	k.must(detach(ends))
	k.must(k.Sweep(t.Context(), wants{}, false))
	if m := k.Mounts(); len(m) != 1 || m[stays] != img.Key {
		t.Errorf("mounts %v, expected that on %s", m, stays)
	}
	k.expect(stays, a)
	k.must(k.UnmountAt(t.Context(), stays))
}

// A layer that containerd needs gets a record if it has none, for those that do not ask containerd.
func TestSweepRecordsLayers(t *testing.T) {
	k := newKit(t, nil)
	key := k.putLayer()
	k.must(errors.Join(k.forgetLayer(key), k.pool.FlushRecords()))
	k.must(k.Sweep(t.Context(), wants{key: Kept}, false))
	if now, err := k.pool.Records(kindLayer); err != nil || len(now) != 1 {
		t.Errorf("after a crash there would be the records %q, %v", now, err)
	}
	k.restart(nil)
	k.sweep()
	k.expectLayers("held", key)
}

// A mount by hand holds nothing once its directory is gone.
func TestSweepDropsMountWithoutDirectory(t *testing.T) {
	k := newKit(t, nil)
	img := image(k.stream(file{"a", random(1, 5000)}))
	_, err := k.Lower(t.Context(), img)
	k.must(err)
	dir := filepath.Join(t.TempDir(), "dir")
	k.must(os.Mkdir(dir, 0o700))
	_, err = k.MountAt(t.Context(), img.Key, dir, true)
	k.must(err)
	k.must(detach(dir))
	k.must(os.Remove(dir))
	k.must(k.Sweep(t.Context(), wants{}, false))
	if m, n := k.Mounts(), len(k.pool.Images()); len(m) != 0 || n != 0 {
		t.Errorf("mounts %v and %d images are left", m, n)
	}
}
