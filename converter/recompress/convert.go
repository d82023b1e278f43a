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

// Options of Convert. The zero value is a good default.
type Options struct {
	// Platform chooses one image of an index, which becomes a manifest alone; nil keeps the index with all images.
	Platform *source.Platform
	// MaxSize bounds the bytes of one layer once it is decompressed; 0 means source.DefaultMaxSize.
	MaxSize int64
	// Progress is told what is read and what is sent; nil means nobody.
	Progress Progress
}

// Progress observes a conversion. Its methods are called from several goroutines, and should return soon. Done says that a
// layer has arrived at the destination.
type Progress interface {
	converter.Progress
	// Send says that the new blob of a layer is sent to a registry, from its beginning: again, if it was sent before.
	Send(layer int, size int64)
	// Sent says that n more bytes of that were sent.
	Sent(layer int, n int)
}

// Result says what was written.
type Result struct {
	// Digest and MediaType of the index or the manifest.
	Digest    digest.Digest
	MediaType string
	// Images is the number of manifests of images, and Layers are their distinct layers.
	Images int
	Layers []LayerResult
	// Notes are what a user should know, a sentence each.
	Notes []string
	// Sent are the bytes of layers and other blobs that went to a registry, Mounted and Present those that did not have
	// to.
	Sent, Mounted, Present int64
}

// LayerResult says what became of a layer.
type LayerResult struct {
	DiffID digest.Digest
	// From is the layer in the source, whose digest may be empty, and To the one that was written.
	From, To ocispec.Descriptor
	// Kept is why the layer was not encoded; empty if it was.
	Kept string
}

// Convert reads the image of src and writes it to to. What src is to be closed by the caller, and to as well.
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

// conversion is one Convert.
type conversion struct {
	o      Options
	to     Destination
	layers []*layerTask
	res    Result
}

// lanes is how many layers are read at the same time. Each uses all cores while it is encoded; a second one uses the
// network meanwhile.
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

// document writes what belongs to an index or a manifest, and the document itself unless it is the root.
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
