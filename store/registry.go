package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
)

// Registry returns the source of an image by its name.
type Registry func(name string) (source.Source, error)

// maxAsked limits how many image names are looked up in registries to restore one layer: each may take
// a while, and a starting container may be waiting.
const maxAsked = 4

// fromRegistry calls use with the blobs of a layer in registries, until one call succeeds. It looks up
// the images that contained the layer by their recorded names. A name may mean another image now, so
// only layers with a matching diff ID count; the caller verifies it.
func (s *Store) fromRegistry(ctx context.Context, key string, id digest.Digest, use func(io.ReadCloser) error) error {
	if s.cfg.Registry == nil {
		return errors.New("no registry is asked, see layers.registries")
	}
	names := s.namesWith(key)
	if len(names) == 0 {
		return errors.New("nothing tells the name of an image with it")
	}
	if len(names) > maxAsked {
		names = names[:maxAsked]
	}
	var errs []error
	for _, name := range names {
		err := s.fromImage(ctx, name, id, use)
		if err == nil {
			log.G(ctx).WithField("layer", key).WithField("from", name).Info("restored a layer from a registry")
			return nil
		}
		if ctx.Err() != nil || IsFull(err) {
			return err
		}
		errs = append(errs, fmt.Errorf("%s: %w", name, err))
	}
	return errors.Join(errs...)
}

// namesWith returns the names of the images with a layer, sorted.
func (s *Store) namesWith(layer string) []string {
	var names []string
	for _, r := range s.imageRecords() {
		if slices.Contains(r.Layers, layer) {
			names = append(names, r.Names...)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func (s *Store) fromImage(ctx context.Context, name string, id digest.Digest, use func(io.ReadCloser) error) error {
	src, err := s.cfg.Registry(name)
	if err != nil {
		return err
	}
	defer src.Close()
	img, err := src.Image(ctx, source.Host())
	if err != nil {
		return err
	}
	for _, l := range img.Layers {
		if l.DiffID != id {
			continue
		}
		rc, err := l.Open(ctx)
		if err != nil {
			return err
		}
		return use(rc)
	}
	return fmt.Errorf("the image has no layer %s now", id)
}
