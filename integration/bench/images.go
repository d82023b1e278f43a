package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/containerd/platforms"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// Metrics of images with contents in common.
const (
	mRead   = "page cache MiB" // after reading all files of all images
	mSecond = "second MiB"     // added by the second image
	// Time from the last byte of an image's metadata until a container could be created, ...
	mFurther = "further ready ms" // ... if all layers are known, but not in this combination
	mSame    = "same ready ms"    // ... if only the configuration is new: containerd's own time
)

// distinctContents stands in place of a variant: the whole pages of distinct contents.
const distinctContents = "distinct contents"

type servedImage struct {
	ref   string
	chain string
	want  contents
}

// imageSets measures all scenarios once: unlike times, the page cache does not vary.
func (b *bench) imageSets() error {
	base := baseLayer()
	for _, sc := range scenarios() {
		if err := b.imageSet(sc, base); err != nil && b.ctx.Err() == nil {
			b.fail(err, "%s", sc.name)
		}
	}
	return b.ctx.Err()
}

// imageSet serves the images of a scenario and reads them with each snapshotter.
func (b *bench) imageSet(sc scenario, base []testimage.Entry) (err error) {
	r, err := stack.NewRegistry()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Off()) }()
	set, sums, distinct := sc.build(base), hashes{}, map[[32]byte]int64{}
	var images []servedImage
	var first float64
	for i, layers := range set.images {
		img, err := serve(r, fmt.Sprintf("image-%d", i+1), layers)
		if err != nil {
			return err
		}
		img.want = sums.merge(layers, distinct)
		images = append(images, img)
		switch i {
		case 0:
			first = total(distinct)
		case 1:
			b.samples = append(b.samples, sample{sc.name, distinctContents, mSecond, 0, total(distinct) - first})
		}
	}
	b.samples = append(b.samples, sample{sc.name, distinctContents, mRead, 0, total(distinct)})
	later := map[string][]servedImage{}
	for metric, list := range map[string][][]*layer{mFurther: set.further, mSame: set.images[:len(set.further)]} {
		for i, layers := range list {
			img, err := serve(r, fmt.Sprintf("%.4s-%d", metric, i+1), layers)
			if err != nil {
				return err
			}
			later[metric] = append(later[metric], img)
		}
	}
	for _, v := range b.variants {
		if v.name != overlay && v.name != file {
			continue
		}
		if err := b.imagesTurn(sc, v, r, images, later); err != nil && b.ctx.Err() == nil {
			b.fail(err, "%s with %s", sc.name, v.name)
		}
	}
	return b.ctx.Err()
}

// total returns a sum of bytes, in MiB.
func total(sizes map[[32]byte]int64) float64 {
	var n int64
	for _, size := range sizes {
		n += size
	}
	return float64(n) / (1 << 20)
}

// serve packs an image and pushes it.
func serve(r *stack.Registry, name string, layers []*layer) (img servedImage, err error) {
	var list []mutate.Addendum
	for _, l := range layers {
		a, err := l.pack()
		if err != nil {
			return img, err
		}
		list = append(list, a)
	}
	p, err := pack(list)
	if err != nil {
		return img, err
	}
	cfg, err := p.image.ConfigFile()
	if err != nil {
		return img, err
	}
	cfg = cfg.DeepCopy()
	cfg.Config.Labels = map[string]string{"name": name} // distinguishes it from an image with the same layers
	if p.image, err = mutate.ConfigFile(p.image, cfg); err != nil {
		return img, err
	}
	img.chain = p.chain
	img.ref, err = r.Push(name, p.image)
	return img, err
}

// imagesTurn measures one snapshotter with the images of a scenario, on its own stack. later are
// images, by metric, that are pulled after all others have been read.
func (b *bench) imagesTurn(
	sc scenario, v *variant, r *stack.Registry, images []servedImage, later map[string][]servedImage,
) (err error) {
	o := v.options
	o.Registry = r
	s, err := stack.Start(o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	client, err := s.Client()
	if err != nil {
		return err
	}
	defer client.Close()
	t := &imageTurn{ctx: b.ctx, stack: s, client: client, snapshotter: v.snapshotter}

	values, err := t.readAll(images)
	if err != nil {
		return err
	}
	b.samples = append(b.samples,
		sample{sc.name, v.name, mRead, 0, values[len(values)-1]},
		sample{sc.name, v.name, mSecond, 0, values[1] - values[0]})
	note("%s  %-14s  page cache, image after image: %.1f MiB", sc.name, v.name, values)

	for _, metric := range []string{mSame, mFurther} {
		var times []float64
		for i, img := range later[metric] {
			took, err := t.ready(img, fmt.Sprintf("%s-%d", metric, i+1))
			if err != nil {
				return err
			}
			times = append(times, float64(took.Microseconds())/1000)
		}
		if len(times) > 0 {
			b.samples = append(b.samples, sample{sc.name, v.name, metric, 0, median(times)})
			note("%s  %-14s  %s: %.1f", sc.name, v.name, metric, times)
		}
	}
	return nil
}

// note prints progress.
func note(format string, args ...any) {
	fmt.Printf("%s  %s\n", time.Now().Format(time.TimeOnly), fmt.Sprintf(format, args...))
}

// imageTurn is the state of a measurement.
type imageTurn struct {
	ctx         context.Context
	stack       *stack.Stack
	client      *containerd.Client
	snapshotter string
}

// pull pulls an image and makes the mounts of a container.
func (t *imageTurn) pull(img servedImage, key string) ([]mount.Mount, error) {
	from, err := registry.NewOCIRegistry(t.ctx, img.ref, registry.WithDefaultScheme("http"))
	if err != nil {
		return nil, err
	}
	p := platforms.DefaultSpec()
	to := image.NewStore(img.ref, image.WithPlatforms(p), image.WithUnpack(p, t.snapshotter))
	if err := t.client.Transfer(t.ctx, from, to); err != nil {
		return nil, fmt.Errorf("pull %q: %w", img.ref, err)
	}
	// Without this label containerd's garbage collector removes snapshots without a container.
	keep := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": time.Now().Format(time.RFC3339)})
	mounts, err := t.client.SnapshotService(t.snapshotter).Prepare(t.ctx, key, img.chain, keep)
	if err != nil {
		return nil, fmt.Errorf("prepare a container of %q: %w", img.ref, err)
	}
	return mounts, nil
}

// ready pulls an image and returns the time from the last byte sent by the registry until a container
// could be created. Precondition: containerd has the layers.
func (t *imageTurn) ready(img servedImage, key string) (time.Duration, error) {
	unix.Sync() // so that earlier writes do not count
	if _, err := t.pull(img, key); err != nil {
		return 0, err
	}
	return time.Since(t.stack.Registry.Served()), nil
}

// readAll pulls all images, then reads all files of one after the other, as a container does, starting
// with an empty page cache. It returns the page cache after each image, in MiB.
func (t *imageTurn) readAll(images []servedImage) (values []float64, err error) {
	var roots []string
	defer func() {
		for _, dir := range slices.Backward(roots) {
			err = errors.Join(err, mount.Unmount(dir, 0))
		}
	}()
	for i, img := range images {
		key := fmt.Sprintf("image-%d", i+1)
		mounts, err := t.pull(img, key)
		if err != nil {
			return nil, err
		}
		dir := filepath.Join(t.stack.Run, key)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
		if err := mount.All(mounts, dir); err != nil {
			return nil, err
		}
		roots = append(roots, dir)
	}
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o200); err != nil {
		return nil, err
	}
	group, err := newMemoryGroup()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, group.Close()) }()
	// The reader's own pages do not count.
	empty := filepath.Join(t.stack.Run, "empty")
	if err := os.Mkdir(empty, 0o755); err != nil {
		return nil, err
	}
	if err := group.read(t.ctx, empty, nil); err != nil {
		return nil, err
	}
	before, err := group.cached()
	if err != nil {
		return nil, err
	}
	for i, img := range images {
		if err := group.read(t.ctx, roots[i], img.want); err != nil {
			return nil, err
		}
		n, err := group.cached()
		if err != nil {
			return nil, err
		}
		values = append(values, float64(n-before)/(1<<20))
	}
	return values, nil
}
