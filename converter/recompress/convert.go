package recompress

import (
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
)

// Options are the options of Convert. The zero value is a good default.
type Options struct {
	// Platform selects one image of an index, written as a single manifest; nil keeps the whole index.
	Platform *source.Platform
	// MaxSize bounds the decompressed bytes of one layer; 0 means source.DefaultMaxSize.
	MaxSize int64
	// Progress observes reading and sending; it may be nil.
	Progress Progress
}

// Progress observes a conversion. Several goroutines call its methods, which should return soon. Done
// reports that a layer has arrived at the destination.
type Progress interface {
	converter.Progress
	// Send reports that sending of a layer's new blob to a registry starts, possibly anew after a failure.
	Send(layer int, size int64)
	// Sent reports n more bytes of that blob.
	Sent(layer int, n int)
}

// Result describes the written image.
type Result struct {
	// Digest and MediaType describe the index or the manifest.
	Digest    digest.Digest
	MediaType string
	// Images is the number of image manifests; Layers are their distinct layers.
	Images int
	Layers []LayerResult
	// Notes are messages for the user, a sentence each.
	Notes []string
	// Sent counts the bytes of layers and other blobs that were sent to a registry, Mounted and Present
	// those that did not have to be.
	Sent, Mounted, Present int64
}

// LayerResult describes the conversion of a layer.
type LayerResult struct {
	DiffID digest.Digest
	// From is the layer in the source, possibly without digest, and To the written one.
	From, To ocispec.Descriptor
	// Kept is the reason why the layer was not encoded, or empty.
	Kept string
}

// Convert reads the image of src and writes it to to. The caller closes both.
func Convert(ctx context.Context, src source.Source, to Destination, o Options) (*Result, error) {
	if o.MaxSize <= 0 {
		o.MaxSize = source.DefaultMaxSize
	}
	r, err := find(ctx, src, o)
	if err != nil {
		return nil, err
	}
	c := &conversion{o: o, to: to, layers: r.layers}
	if err := c.run(ctx, r.document); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause
		}
		return nil, fmt.Errorf("%s to %s: %w", src, to, err)
	}
	return c.result(r.document), nil
}

type conversion struct {
	o      Options
	to     Destination
	layers []*layerTask
	res    Result
}

// lanes is the number of layers read at a time. Encoding one layer uses all cores; the second one uses
// the network meanwhile.
const lanes = 2

func (c *conversion) run(ctx context.Context, root *document) error {
	if c.o.Progress != nil {
		var list []source.Layer
		for _, t := range c.layers {
			list = append(list, t.layer)
		}
		c.o.Progress.Start(list)
	}
	g, lctx := errgroup.WithContext(ctx)
	g.SetLimit(lanes)
	for i, t := range c.layers {
		g.Go(func() error {
			if lctx.Err() != nil {
				return context.Cause(lctx)
			}
			if err := c.layer(lctx, i, t); err != nil {
				return fmt.Errorf("layer %s: %w", t.layer.Name(), err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := c.document(ctx, root); err != nil {
		return err
	}
	return c.to.name(ctx, root.desc, root.doc)
}

// document writes the parts of an index or a manifest, and the document itself unless it is the root.
func (c *conversion) document(ctx context.Context, d *document) error {
	for _, child := range d.children {
		if err := c.document(ctx, child); err != nil {
			return err
		}
		if err := c.to.manifest(ctx, child.desc, child.doc); err != nil {
			return err
		}
	}
	for _, b := range d.blobs {
		if err := c.copy(ctx, b); err != nil {
			return fmt.Errorf("blob %s: %w", b.desc.Digest, err)
		}
	}
	return d.rewrite(c)
}

func (c *conversion) result(root *document) *Result {
	c.res.Digest, c.res.MediaType = root.desc.Digest, root.desc.MediaType
	for _, t := range c.layers {
		c.res.Layers = append(c.res.Layers, LayerResult{t.layer.DiffID, t.layer.Desc, t.to, t.kept})
	}
	c.res.Sent, c.res.Mounted, c.res.Present = c.to.counts()
	return &c.res
}
