package main

import (
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/converter/tree"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

func (e *env) poolPut(c *cli.Context) error {
	if err := needArgs(c, "POOL", "SOURCE"); err != nil {
		return err
	}
	src, platform, err := parseSource(c, c.Args().Get(1), 0)
	if err != nil {
		return err
	}
	defer src.Close()
	return e.withPool(c, func(p *pool.Pool) error {
		img, err := src.Image(c.Context, platform)
		if err != nil {
			return err
		}
		before := p.Usage()
		m, err := putImage(c.Context, p, img, c.String("key"))
		if err != nil {
			return fmt.Errorf("%s: %w", src, err)
		}
		u, err := p.ImageUsage(m.Key)
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return writeJSON(e.stdout, poolImage{Image: m, UUID: uuid(m.UUID), Usage: &u})
		}
		after := p.Usage()
		fmt.Fprintf(e.stdout, "%s: %s in %d distinct files, %s of them new\n", printable(m.Key), human(u.Extents), u.Files, human(after.Extents-before.Extents))
		return nil
	})
}

// putImage adds the layers of an image that are not in the pool, and the image.
func putImage(ctx context.Context, p *pool.Pool, img *source.Image, key string) (pool.Image, error) {
	var layers []*layer.Layer
	var ids []digest.Digest
	if img.Dir != "" {
		if key == "" {
			return pool.Image{}, &usageError{"pool put", "a directory has no chain ID: --key is needed"}
		}
		l, done, err := readLayer(ctx, p, func(s layer.Store) (*layer.Layer, error) { return layer.FromDir(ctx, img.Dir, s, layer.Limits{}) })
		if err != nil {
			return pool.Image{}, err
		}
		defer done() // after the image holds the contents: the directory is no layer that anyone would ask for
		layers = append(layers, l)
	}
	for i, l := range img.Layers {
		parsed, err := putLayer(ctx, p, l)
		if err != nil {
			return pool.Image{}, fmt.Errorf("layer %d (%s): %w", i, l.Name(), err)
		}
		layers, ids = append(layers, parsed), append(ids, l.DiffID)
	}
	root, err := tree.Merge(layers)
	if err != nil {
		return pool.Image{}, err
	}
	if key == "" {
		key = identity.ChainID(ids).String()
	}
	if have, err := p.Image(key); err == nil {
		// The pool takes an image with this key for the one that is wanted, as it is where keys are chain IDs.
		plan, err := daxfs.NewPlan(root, daxfs.Options{})
		if err != nil {
			return pool.Image{}, err
		}
		if plan.UUID() != have.UUID {
			return pool.Image{}, fmt.Errorf("image %q is in the pool already, with other contents (UUID %s, expected %s): "+
				"remove it first, or choose another --key", key, uuid(have.UUID), uuid(plan.UUID()))
		}
	}
	return p.AddImage(ctx, key, root, daxfs.Options{})
}

// readLayer reads contents into a batch, which done discards.
func readLayer(ctx context.Context, p *pool.Pool, read func(layer.Store) (*layer.Layer, error)) (l *layer.Layer, done func(), err error) {
	b := p.Begin()
	if l, err = read(b); err != nil {
		b.Discard()
		return nil, nil, err
	}
	return l, b.Discard, nil
}

// putLayer returns a layer that the pool has, or reads it into the pool.
func putLayer(ctx context.Context, p *pool.Pool, l source.Layer) (*layer.Layer, error) {
	key := l.DiffID.String()
	if payload, err := p.Layer(key); err == nil {
		parsed := new(layer.Layer)
		return parsed, parsed.UnmarshalBinary(payload)
	}
	rc, err := l.Open(ctx)
	if err != nil {
		return nil, err
	}
	r, err := blob.NewReader(ctx, rc, blob.Spec{MediaType: l.Desc.MediaType, Digest: l.Desc.Digest, Size: l.Desc.Size, DiffID: l.DiffID})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b := p.Begin()
	defer b.Discard()
	parsed, err := layer.FromTar(ctx, r, b, layer.Limits{})
	if err := r.Finish(err); err != nil {
		return nil, err
	}
	payload, err := parsed.MarshalBinary()
	if err != nil {
		return nil, err
	}
	return parsed, b.CommitLayer(ctx, key, payload)
}
