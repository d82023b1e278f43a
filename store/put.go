package store

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// Info describes an image of the store.
type Info struct {
	pool.Image
	// Layers are the keys of its layers, bottom first.
	Layers  []string `json:"layers"`
	Names   []string `json:"names,omitempty"`
	Holders []string `json:"holders,omitempty"`
	// Brought is how many bytes the image added to the pool.
	Brought int64 `json:"brought"`
}

// Images returns the images in the pool, by slot.
func (s *Store) Images() []Info {
	var out []Info
	for _, m := range s.pool.Images() {
		if _, err := s.pool.Image(s.poolKey(canonical(m.Key))); err == nil && s.retired(m.Key) {
			continue // replaced by another copy
		}
		out = append(out, s.info(m))
	}
	return out
}

func (s *Store) info(m pool.Image) Info {
	r := s.imageRecord(canonical(m.Key))
	return Info{Image: m, Layers: r.Layers, Names: r.Names, Holders: r.Holders, Brought: r.Brought}
}

// Find returns an image by its key, a prefix of that, an OCI image's name, or the name of a pin.
func (s *Store) Find(name string) (Info, error) { return Match(s.Images(), name) }

// Match is Find in a list of images.
func Match(images []Info, name string) (Info, error) {
	var found []Info
	for _, info := range images {
		hash := strings.TrimPrefix(info.Key, imagePrefix)
		switch {
		case name == info.Key || slices.Contains(info.Names, name) || slices.Contains(info.Holders, holderPin+name):
			return info, nil
		case name != "" && strings.HasPrefix(hash, strings.TrimPrefix(name, imagePrefix)):
			found = append(found, info)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return Info{}, fmt.Errorf("image %q: %w", name, pool.ErrNotFound)
	}
	return Info{}, fmt.Errorf("image %q: %d images begin with that: %w", name, len(found), pool.ErrInvalid)
}

// Put puts an OCI image, or the tree of a source without layers, into the pool. pin/<name> holds it
// until Unpin. An existing pin with that name moves to the new image.
func (s *Store) Put(ctx context.Context, src *source.Image, name string) (Info, error) {
	if name == "" {
		return Info{}, fmt.Errorf("an image is put under a name, found none: %w", pool.ErrInvalid)
	}
	holder := holderPin + name
	img := Image{Holder: holder, Name: src.Name}
	if src.Tree != nil {
		// An earlier tree under this name may differ, so each tree has a key of its own.
		var random [8]byte
		rand.Read(random[:])
		key := "dir/put/" + digest.FromString(name).Encoded()[:16] + "/" + hex.EncodeToString(random[:])
		if err := s.addTree(ctx, holder, key, src.Tree); err != nil {
			return Info{}, err
		}
		img.Layers = []Layer{{Key: key}}
	}
	for i, l := range src.Layers {
		st, err := s.AddBlob(ctx, Blob{
			Digest: l.Desc.Digest, MediaType: l.Desc.MediaType, Verify: true, DiffID: l.DiffID, Size: l.Desc.Size,
			Open: l.Open, Pin: func(string) {}, Holder: holder,
		})
		if err != nil {
			return Info{}, fmt.Errorf("layer %d (%s): %w", i, l.Name(), err)
		}
		img.Layers = append(img.Layers, Layer{Key: st.Key})
	}
	img.Key = ImageKey(img.layerKeys())
	if err := s.rebuildOne(ctx, img); err != nil {
		return Info{}, fmt.Errorf("image %q: %w", img.Key, err)
	}
	if err := errors.Join(s.notePut(name, img.Key, src), s.unpin(name, img.Key)); err != nil {
		return Info{}, err
	}
	m, err := s.pool.Image(s.poolKey(img.Key))
	return s.info(m), err
}

// Pin makes pin/<name> hold an image of the pool, named as for Find, until Unpin. An existing pin with
// that name moves to this image. Errors: pool.ErrNotFound, pool.ErrInvalid.
func (s *Store) Pin(ctx context.Context, image, name string) (Info, error) {
	if name == "" {
		return Info{}, fmt.Errorf("an image is pinned under a name, found none: %w", pool.ErrInvalid)
	}
	info, unlock, err := s.findLocked(ctx, image)
	if err != nil {
		return Info{}, err
	}
	defer unlock()
	key := canonical(info.Key)
	m, err := s.pool.Image(s.poolKey(key)) // a sweep may have been faster
	if err != nil {
		return Info{}, err
	}
	err = s.amendImage(key, func(r *imageRecord) { r.Holders = add(r.Holders, holderPin+name) })
	return s.info(m), errors.Join(err, s.unpin(name, key))
}

// findLocked finds an image and takes its lock. A sweep may have removed the image in between.
func (s *Store) findLocked(ctx context.Context, name string) (_ Info, unlock func(), _ error) {
	info, err := s.Find(name)
	if err != nil {
		return Info{}, nil, err
	}
	unlock, err = s.images.lock(ctx, canonical(info.Key))
	return info, unlock, err
}

// Unpin undoes Put or Pin. Sweep frees the image unless others hold it. Errors: pool.ErrNotFound.
func (s *Store) Unpin(name string) error {
	pinned := false
	for _, r := range s.imageRecords() {
		pinned = pinned || slices.Contains(r.Holders, holderPin+name)
	}
	if !pinned {
		return fmt.Errorf("no image is pinned as %q: %w", name, pool.ErrNotFound)
	}
	return errors.Join(s.notePut(name, "", nil), s.unpin(name, ""))
}

// unpin removes a pin from all images but one, and from their layers.
func (s *Store) unpin(name, except string) error {
	holder := holderPin + name
	is := func(h string) bool { return h == holder }
	var errs []error
	for key, r := range s.imageRecords() {
		if key != except && slices.ContainsFunc(r.Holders, is) {
			errs = append(errs, s.dropHolder(key, holder))
		}
	}
	keep := s.imageRecord(except).Layers
	for key, r := range s.layerRecords() {
		if !slices.Contains(keep, key) && slices.ContainsFunc(r.Holders, is) {
			errs = append(errs, s.amendLayer(key, func(r *layerRecord) { r.Holders = without(r.Holders, is) }))
		}
	}
	return errors.Join(append(errs, s.pool.FlushRecords())...)
}
