package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/log"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/converter/tree"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// imagePrefix is the prefix of image keys; the hash of the layers' keys follows, in hexadecimal.
const imagePrefix = "image/"

// ImageKey returns the key of the image made of layers, given by their keys, bottom first.
func ImageKey(layers []string) string {
	h := sha256.New()
	for _, key := range layers {
		fmt.Fprintf(h, "%d %s\n", len(key), key)
	}
	return imagePrefix + hex.EncodeToString(h.Sum(nil))
}

// Image is an image to make: a chain of layers, bottom first.
type Image struct {
	Key    string
	Layers []Layer
	// Holder will hold the image.
	Holder string
	// Name is a reference of the OCI image; empty if unknown.
	Name string
}

func (m Image) layerKeys() []string {
	keys := make([]string, len(m.Layers))
	for i, l := range m.Layers {
		keys[i] = l.Key
	}
	return keys
}

// Lower returns the directory of a mounted image, after restoring, building and mounting as necessary.
func (s *Store) Lower(ctx context.Context, img Image) (string, error) {
	unlock, err := s.images.lock(ctx, img.Key)
	if err != nil {
		return "", err
	}
	defer unlock()
	m, err := s.mount(ctx, img)
	if err == nil && s.pool.ImageDamaged(m.Key) { // found damaged while the pool was mounted
		m, err = s.mount(ctx, img)
	}
	if errors.Is(err, mount.ErrCheck) {
		// The memory lost what was written there. The index is elsewhere, so the tree can be made again.
		log.G(ctx).WithError(err).Error("the pool is damaged, making its metadata again")
		if herr := s.newEpoch(ctx); herr != nil {
			return "", fmt.Errorf("image %q: %w; and the pool's metadata cannot be made again: %w", img.Key, err, herr)
		}
		m, err = s.mount(ctx, img)
	}
	if err != nil {
		return "", fmt.Errorf("image %q: %w", img.Key, err)
	}
	return m.Dir, nil
}

// mount mounts an image, and adds it to the pool if it is missing. Preconditions: the image is locked.
func (s *Store) mount(ctx context.Context, img Image) (mount.Mounted, error) {
	s.epoch.RLock()
	defer s.epoch.RUnlock()
	m, added, err := s.add(ctx, img)
	if err != nil {
		return mount.Mounted{}, err
	}
	began := time.Now()
	mounted, err := s.table.Mount(ctx, s.mountable(m))
	if err == nil && added != nil {
		s.logMade(ctx, added, &mounted, time.Since(began))
	}
	return mounted, err
}

// mountable describes an image of the pool for the table.
func (s *Store) mountable(m pool.Image) mount.Image {
	img := mount.Image{
		Key: m.Key, Name: m.Name(), Nid: s.pool.Geometry().SlotNid(m.Slot), Window: m.Window, WindowSize: m.WindowSize,
		UUID: m.UUID, Created: m.Created,
	}
	for _, r := range s.pool.TreeRanges() {
		img.Tree = append(img.Tree, mount.Range{Off: r[0], End: r[1]})
	}
	return img
}

// add returns the image of the pool, which it builds if there is none, and records its holder. built
// is nil if the image existed. Preconditions: the image is locked, and epoch is held for reading.
func (s *Store) add(ctx context.Context, img Image) (m pool.Image, built *addition, err error) {
	m, err = s.pool.Image(s.poolKey(img.Key))
	if errors.Is(err, pool.ErrNotFound) {
		m, built, err = s.build(ctx, img)
	}
	if err == nil && s.pool.Unlisted(m.Key) {
		err = s.pool.Relist(ctx, m.Key)
	}
	if err != nil {
		return m, nil, err
	}
	return m, built, errors.Join(s.noteImage(img), s.pool.FlushRecords())
}

// noteImage records the layers, the holder and the name of an image.
func (s *Store) noteImage(img Image) error {
	return s.amendImage(img.Key, func(r *imageRecord) {
		r.Layers = img.layerKeys()
		r.Names, r.Holders = add(r.Names, img.Name), add(r.Holders, img.Holder)
	})
}

func (s *Store) build(ctx context.Context, img Image) (m pool.Image, added *addition, err error) {
	began := time.Now()
	defer func() {
		if !isFull(err) {
			s.cfg.Observe("build", time.Since(began), err)
		}
	}()
	if want := ImageKey(img.layerKeys()); img.Key != want {
		return m, nil, fmt.Errorf("key of %d layers, expected %q: %w", len(img.Layers), want, pool.ErrInvalid)
	}
	keys := img.layerKeys()
	before := s.readTime(keys)
	root, err := mergeLayers(ctx, img.Layers, s.ensure)
	if err != nil {
		return m, nil, err
	}
	if err := s.noteImage(img); err != nil {
		return m, nil, err
	}
	if m, err = s.pool.AddImage(ctx, s.poolKey(img.Key), root, daxfs.Options{Take: true}); err != nil {
		return m, nil, err
	}
	added = &addition{image: m, layers: keys, name: img.Name, read: s.readTime(keys)}
	added.build = max(0, time.Since(began)-(added.read-before)) // without reading missing layers meanwhile
	s.forgetRead(keys)
	return m, added, s.noteMade(added)
}

// mergeLayers merges layers, bottom first; get returns each of them.
func mergeLayers(ctx context.Context, from []Layer,
	get func(context.Context, Layer) (*layer.Layer, error),
) (*daxfs.Node, error) {
	m := tree.NewMerger()
	for _, f := range from {
		parsed, err := get(ctx, f)
		if err != nil {
			return nil, err
		}
		apply := m.Apply
		if parsed.Cost() > maxCached { // nobody else has it: the cache keeps no layers of that size
			apply = m.Take
		}
		if err := apply(parsed); err != nil {
			return nil, fmt.Errorf("%w: %w", layer.ErrInvalid, err)
		}
	}
	return m.Root(), nil
}

// rebuild adds the pinned images that a new epoch removed: somebody wants them in the pool although no
// container asks for them.
func (s *Store) rebuild(ctx context.Context) error {
	var errs []error
	for key, r := range s.imageRecords() {
		if !slices.ContainsFunc(r.Holders, lasting) {
			continue
		}
		if _, err := s.pool.Image(s.poolKey(key)); err == nil {
			continue
		}
		if err := s.rebuildOne(ctx, s.recorded(key)); err != nil {
			errs = append(errs, fmt.Errorf("image %q: %w", key, err))
		}
	}
	return errors.Join(errs...)
}

func (s *Store) rebuildOne(ctx context.Context, img Image) error {
	unlock, err := s.images.lock(ctx, img.Key)
	if err != nil {
		return err
	}
	defer unlock()
	s.epoch.RLock()
	defer s.epoch.RUnlock()
	_, added, err := s.add(ctx, img)
	if err == nil && added != nil {
		s.logMade(ctx, added, nil, 0)
	}
	return err
}
