package recompress

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
)

// document is an index or a manifest to be rewritten.
type document struct {
	desc     ocispec.Descriptor // as in the source; after rewriting, of doc
	doc      []byte
	was      digest.Digest // its digest in the source
	index    *ocispec.Index
	children []*document // of the index, in its order
	image    *ocispec.Manifest
	layers   []*layerTask // of the image
	blobs    []blobTask   // copied unchanged
}

// blobTask is a blob to copy unchanged.
type blobTask struct {
	desc ocispec.Descriptor
	open func(ctx context.Context) (io.ReadCloser, error)
}

// found holds the root document and the distinct layers of all images.
type found struct {
	*document
	whole  *source.Whole
	layers []*layerTask
	known  map[string]*layerTask
	seen   map[digest.Digest]bool // blobs to copy unchanged
	images int
}

// maxNesting bounds the nesting of indexes.
const maxNesting = 8

// find reads all documents of an image.
func find(ctx context.Context, src source.Source, o Options) (*found, error) {
	f := &found{known: map[string]*layerTask{}, seen: map[digest.Digest]bool{}}
	w, err := source.FindWhole(ctx, src)
	single := o.Platform != nil || errors.Is(err, source.ErrNoDocuments)
	if err != nil && !errors.Is(err, source.ErrNoDocuments) && !(errors.Is(err, source.ErrAmbiguous) && single) {
		return nil, err
	}
	if !single {
		f.whole = w
		f.document, err = f.read(ctx, w.Desc, 0)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", src, err)
		}
		return f, nil
	}
	p := source.Host()
	if o.Platform != nil {
		p = *o.Platform
	}
	img, err := src.Image(ctx, p)
	if err != nil {
		return nil, err
	}
	if img.Tree != nil {
		return nil, fmt.Errorf("%s: it has no layers, expected an OCI image", src)
	}
	if f.document, err = f.fromImage(img); err != nil {
		return nil, fmt.Errorf("%s: %w", src, err)
	}
	return f, nil
}

// read reads a document and everything below it.
func (f *found) read(ctx context.Context, d ocispec.Descriptor, depth int) (*document, error) {
	if depth > maxNesting {
		return nil, fmt.Errorf("more than %d indexes within each other", maxNesting)
	}
	d, err := f.whole.Typed(ctx, d)
	if err != nil {
		return nil, err
	}
	doc := &document{desc: d, was: d.Digest}
	if doc.doc, err = f.whole.Document(ctx, d); err != nil {
		return nil, err
	}
	if doc.desc.Size = int64(len(doc.doc)); source.IsIndex(d.MediaType) {
		if doc.index, err = f.whole.Index(ctx, d); err != nil {
			return nil, err
		}
		for _, child := range doc.index.Manifests {
			inner, err := f.read(ctx, child, depth+1)
			if err != nil {
				return nil, err
			}
			doc.children = append(doc.children, inner)
		}
		return doc, nil
	}
	m, img, err := f.whole.Manifest(ctx, d)
	if err != nil {
		return nil, err
	}
	if img == nil { // copy attestations and signatures unchanged
		for _, b := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
			f.keep(doc, b, func(ctx context.Context) (io.ReadCloser, error) { return f.whole.Open(ctx, b) })
		}
		return doc, nil
	}
	return doc, f.take(doc, m, img)
}

// fromImage returns the document of an image selected by platform, or of one without a manifest.
func (f *found) fromImage(img *source.Image) (*document, error) {
	m := &ocispec.Manifest{Config: ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(img.Config), Size: int64(len(img.Config)),
	}}
	doc := &document{desc: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest}}
	if img.Manifest == nil {
		for _, l := range img.Layers {
			m.Layers = append(m.Layers, l.Desc)
		}
		return doc, f.take(doc, m, img)
	}
	if err := json.Unmarshal(img.Manifest, m); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", img.Digest, err)
	}
	doc.was = img.Digest
	doc.desc = ocispec.Descriptor{MediaType: img.ManifestType, Digest: img.Digest, Size: int64(len(img.Manifest))}
	doc.doc = img.Manifest
	return doc, f.take(doc, m, img)
}

// take records the layers of an image. Layers shared by several images are read once.
func (f *found) take(doc *document, m *ocispec.Manifest, img *source.Image) error {
	f.images++
	doc.image = m
	config := img.Config
	f.keep(doc, m.Config, func(context.Context) (io.ReadCloser, error) { return io.NopCloser(newReader(config)), nil })
	for i, l := range img.Layers {
		key := fmt.Sprint(l.Desc.Digest, " ", l.DiffID, " ", l.Desc.MediaType, " ", l.Desc.Annotations)
		t := f.known[key]
		if t == nil {
			t = &layerTask{layer: img.Layers[i]}
			f.known[key] = t
			f.layers = append(f.layers, t)
		}
		doc.layers = append(doc.layers, t)
	}
	return nil
}

func (f *found) keep(doc *document, d ocispec.Descriptor, open func(context.Context) (io.ReadCloser, error)) {
	if !f.seen[d.Digest] {
		f.seen[d.Digest] = true
		doc.blobs = append(doc.blobs, blobTask{d, open})
	}
}

// attested is the annotation in which BuildKit names the manifest that an attestation belongs to.
const attested = "vnd.docker.reference.digest"

// rewrite creates the new document, once all its parts are written.
func (d *document) rewrite(c *conversion) error {
	var v any
	switch {
	case d.image != nil:
		c.res.Images++
		d.image.Versioned = specs.Versioned{SchemaVersion: 2}
		d.image.MediaType = ocispec.MediaTypeImageManifest
		d.image.Config.MediaType = ocispec.MediaTypeImageConfig
		for i, t := range d.layers {
			d.image.Layers[i] = t.to
		}
		if s := d.image.Subject; s != nil {
			c.note("manifest %s refers to %s, as it did before", d.was, s.Digest)
		}
		v = d.image
	case d.index != nil:
		d.index.Versioned = specs.Versioned{SchemaVersion: 2}
		d.index.MediaType = ocispec.MediaTypeImageIndex
		now := map[string]digest.Digest{}
		for _, child := range d.children {
			now[string(child.was)] = child.desc.Digest
		}
		for i, child := range d.children {
			e := &d.index.Manifests[i]
			e.MediaType, e.Digest, e.Size, e.Data = child.desc.MediaType, child.desc.Digest, child.desc.Size, nil
			of := e.Annotations[attested]
			if to := now[of]; to != "" && string(to) != of {
				// The index must lead from the new image to its attestation, which remains a statement about
				// the old image.
				e.Annotations[attested] = to.String()
				c.note("attestation %s is unchanged and refers to %s, which is now %s: "+
					"signatures over the old digest do not cover the new one", child.desc.Digest, of, to)
			}
		}
		v = d.index
	default:
		return nil
	}
	doc, err := json.Marshal(v)
	if err != nil {
		return err
	}
	d.doc = doc
	d.desc = ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(doc), Size: int64(len(doc)),
	}
	if d.index != nil {
		d.desc.MediaType = ocispec.MediaTypeImageIndex
	}
	return nil
}

func (c *conversion) note(format string, args ...any) {
	c.res.Notes = append(c.res.Notes, fmt.Sprintf(format, args...))
}
