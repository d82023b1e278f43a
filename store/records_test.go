package store

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// durable returns the records of a kind that the index has on disk, as a process would find them that
// starts after a crash at this moment.
func durable[R any](k *kit, kind string) map[string]R {
	k.t.Helper()
	all := map[string]R{}
	k.must(load(k.Store, kind, all))
	return all
}

// An image or a layer in the pool has its record from the first moment: without its holders, the next
// process would take it for unneeded.
func TestRecordComesWithSubject(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	b := blobOf(makeTar(file{"a", random(1, 5000)}))
	st, err := k.Store.stream(ctx, b, nil)
	k.must(err)
	r, ok := durable[layerRecord](k, kindLayer)[st.Key]
	if !ok || !slices.Equal(r.Holders, []string{b.Holder}) || len(r.Blobs) != 1 || r.Blobs[0] != b.Digest {
		t.Errorf("the record of a new layer is %+v, %t", r, ok)
	}
	dir := t.TempDir()
	k.must(os.WriteFile(filepath.Join(dir, "b"), random(2, 5000), 0o600))
	k.must(k.addDir(ctx, "pin/b", "dir/b", dir))
	if r := durable[layerRecord](k, kindLayer)["dir/b"]; !slices.Equal(r.Holders, []string{"pin/b"}) {
		t.Errorf("the record of a new directory is %+v", r)
	}
	img := image(Layer{Key: st.Key}, Layer{Key: "dir/b"})
	img.Name = "example.org/web:1"
	_, _, err = k.build(ctx, img)
	k.must(err)
	i, ok := durable[imageRecord](k, kindImage)[img.Key]
	if !ok || !slices.Equal(i.Holders, []string{img.Holder}) || !slices.Equal(i.Layers, img.layerKeys()) ||
		!slices.Equal(i.Names, []string{img.Name}) {
		t.Errorf("the record of a new image is %+v, %t", i, ok)
	}
}

// Who gets a stored image or layer, or a mount of it, holds it durably when the call returns.
func TestHoldersAreDurable(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	a := file{"a", random(1, 5000)}
	b := blobOf(makeTar(a))
	src := t.TempDir()
	k.must(os.WriteFile(filepath.Join(src, "b"), random(2, 5000), 0o600))
	img := image(Layer{Key: BlobKey(b.DiffID)}, Layer{Key: "dir/b"})
	var want []string
	for _, ns := range []string{"one", "two"} { // the second finds everything stored
		holder := ContainerdHolder(ns)
		want = append(want, holder)
		b.Holder, img.Holder = holder, holder
		_, err := k.AddBlob(ctx, b)
		k.must(err)
		k.must(k.AddDir(ctx, holder, "dir/b", src))
		layers := durable[layerRecord](k, kindLayer)
		for _, key := range img.layerKeys() {
			if r := layers[key]; !slices.Equal(r.Holders, want) {
				t.Errorf("holders of layer %q: %q, expected %q", key, r.Holders, want)
			}
		}
		_, err = k.Lower(ctx, img)
		k.must(err)
		if r := durable[imageRecord](k, kindImage)[img.Key]; !slices.Equal(r.Holders, want) {
			t.Errorf("holders of the image: %q, expected %q", r.Holders, want)
		}
	}
	holders := func(when string, more ...string) {
		t.Helper()
		r := durable[imageRecord](k, kindImage)[img.Key]
		if all := slices.Concat(want, more); !slices.Equal(r.Holders, all) {
			t.Errorf("holders of the image, %s: %q, expected %q", when, r.Holders, all)
		}
	}
	k.must(k.noteLoose()) // as after an earlier mount: nothing but the holder is written
	dir := t.TempDir()
	_, err := k.MountAt(ctx, img.Key, dir, true)
	k.must(err)
	holders("mounted", holderMount+dir)
	k.must(k.UnmountAt(ctx, dir))
	holders("unmounted")
	path := filepath.Join(t.TempDir(), "file")
	k.must(os.WriteFile(path, nil, 0o600))
	if _, err := k.MountAt(ctx, img.Key, path, true); err == nil {
		t.Error("an image was mounted on a file")
	}
	holders("not mounted")
	_, err = k.Pin(ctx, img.Key, "mine")
	k.must(err)
	holders("pinned", "pin/mine")
	k.must(k.Unpin("mine"))
	holders("unpinned")
}
