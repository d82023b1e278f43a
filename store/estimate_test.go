package store

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
)

// sourceOfLayers is an OCI image with several layers, bottom first.
func sourceOfLayers(layers ...*source.Image) *source.Image {
	out := &source.Image{}
	for _, l := range layers {
		out.Layers = append(out.Layers, l.Layers...)
	}
	return out
}

// An estimate equals the space that images then take, whatever they share.
func TestEstimate(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	var many []file
	for i := range 300 {
		// each content three times
		many = append(many, file{fmt.Sprintf("many/%03d", i), random(uint64(i%100), 100+i%100)})
	}
	base := sourceOf(many...)
	images := []*source.Image{
		sourceOfLayers(base, sourceOf(file{"a", random(500, 3_000_000)}, file{"empty", nil})),
		sourceOfLayers(base,
			sourceOf(file{"large", random(501, 50_000)}, file{"small", random(503, 61)}, file{"empty", nil})),
		sourceOfLayers(base, sourceOf(file{"renamed", random(500, 3_000_000)})),
		sourceOfLayers(base, sourceOf(file{"many/000", random(502, 9_000)})), // hides a file of the layer below
		{Tree: dirSource(t.TempDir()).Tree},
	}
	images = append(images, images[0])
	e := NewEstimator(layer.Limits{})
	var sum Estimate
	for i, img := range images {
		before := k.pool.Usage()
		got, err := e.Add(ctx, img)
		k.must(err)
		info, err := k.Put(ctx, img, fmt.Sprintf("image %d", i))
		k.must(err)
		after := k.pool.Usage()
		contents, metadata := after.Extents-before.Extents, after.Tree-before.Tree
		again := i == len(images)-1
		if got.Contents != contents || !again && got.Metadata != metadata || again &&
			(got.Contents != 0 || got.Layers != 0) {
			t.Errorf("image %d: estimated %+v; it took %d bytes of contents and %d of metadata", i, got,
				contents, metadata)
		}
		// An image's Brought is its new contents plus its own part of the metadata.
		if min := contents; !again && (info.Brought < min || info.Brought > contents+metadata) {
			t.Errorf("image %d brought %d bytes, expected %d to %d", i, info.Brought, min, contents+metadata)
		}
		sum.Contents += got.Contents
		sum.Unpacked += got.Unpacked
		sum.Layers += got.Layers
	}
	if u := k.pool.Usage(); sum.Contents != u.Extents {
		t.Errorf("estimated %d bytes of contents, the pool has %d", sum.Contents, u.Extents)
	}
	if want := int64(300*4096 + 2*2_999_296 + 3*4096); sum.Layers != 6 || sum.Unpacked < want {
		t.Errorf("estimated %+v; expected 6 layers that take at least %d bytes unpacked", sum, want)
	}
}

// An unreadable image is an error.
func TestEstimateOfDamage(t *testing.T) {
	img := sourceOf(file{"a", random(1, 100_000)})
	img.Layers[0].DiffID = digestOf(file{"b", nil})
	if _, err := NewEstimator(layer.Limits{}).Add(t.Context(), img); err == nil {
		t.Error("a layer with another digest was estimated")
	}
	img = sourceOf(file{"a", random(1, 100_000)}, file{"b", nil})
	if _, err := NewEstimator(layer.Limits{MaxEntries: 1}).Add(t.Context(), img); !errors.Is(err, layer.ErrLimit) {
		t.Errorf("a layer beyond the limits: %v", err)
	}
}

// Room is the free space of the pool, or of the disk if that is less.
func TestRoom(t *testing.T) {
	k := newKit(t, nil)
	room, err := k.Room()
	k.must(err)
	var st unix.Statfs_t
	k.must(unix.Statfs(k.cfg.Root, &st))
	if u := k.pool.Usage(); room.Pool != u.Free || room.Disk <= 0 || room.Disk > int64(st.Blocks)*st.Bsize {
		t.Errorf("room %+v; the pool has %d free", room, u.Free)
	}
	for room, want := range map[Room]int64{{10, -1}: 10, {10, 3}: 3, {3, 10}: 3, {3, 0}: 0} {
		if got := room.Free(); got != want {
			t.Errorf("%+v: %d free, expected %d", room, got, want)
		}
	}
}
