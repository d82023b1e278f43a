package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrNoDocuments reports a source without index and manifest.
var ErrNoDocuments = errors.New("the source holds no index and no manifest")

// Whole is an index or a manifest with all its parts.
type Whole struct {
	// Desc is the descriptor of the index or the manifest. Its media type is that of the document.
	Desc ocispec.Descriptor
	// Registry and Repository are the origin, without a tag; empty for other sources.
	Registry, Repository string
	// Open opens any blob. The caller closes the result and verifies what it reads.
	Open func(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error)

	find *finder
}

type wholeSource interface {
	blobs
	whole(ctx context.Context) (ocispec.Descriptor, error)
}

// FindWhole finds the document at a source's name, for all platforms. The result is valid until the
// source is closed, and belongs to one goroutine except for Open.
func FindWhole(ctx context.Context, src Source) (*Whole, error) {
	s, ok := src.(wholeSource)
	if !ok {
		return nil, fmt.Errorf("%s: %w", src, ErrNoDocuments)
	}
	d, err := s.whole(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", src, err)
	}
	w := &Whole{Open: s.open, find: newFinder(s)}
	if w.Desc, err = w.find.typed(ctx, d); err != nil {
		return nil, fmt.Errorf("%s: %w", src, err)
	}
	if r, ok := src.(*registry); ok {
		w.Registry, w.Repository = r.repo.Place()
	}
	return w, nil
}

// Document reads and verifies an index, a manifest or a configuration. The documents of one Whole
// share the limits of a search for an image.
func (w *Whole) Document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	return w.find.document(ctx, d)
}

// Index reads an index.
func (w *Whole) Index(ctx context.Context, d ocispec.Descriptor) (*ocispec.Index, error) {
	p, err := w.find.document(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	index := new(ocispec.Index)
	if err := unmarshal(p, d.MediaType, index); err != nil {
		return nil, fmt.Errorf("index %s: %w", d.Digest, err)
	}
	return index, nil
}

// Manifest reads any manifest. img is its image, or nil if it is not that of a container image.
func (w *Whole) Manifest(ctx context.Context, d ocispec.Descriptor) (m *ocispec.Manifest, img *Image, err error) {
	p, err := w.find.document(ctx, d)
	if err != nil {
		return nil, nil, fmt.Errorf("manifest: %w", err)
	}
	m = new(ocispec.Manifest)
	if err := unmarshal(p, d.MediaType, m); err != nil {
		return nil, nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if d.Annotations[attestationType] != "" || isImage(d.MediaType, *m) != nil {
		return m, nil, nil
	}
	img, err = w.find.image(ctx, d)
	return m, img, err
}

// Typed returns the descriptor, with the media type of its document if it has none.
func (w *Whole) Typed(ctx context.Context, d ocispec.Descriptor) (ocispec.Descriptor, error) {
	return w.find.typed(ctx, d)
}

func (s *layout) whole(context.Context) (ocispec.Descriptor, error) {
	f, err := openFile(filepath.Join(s.dir, ocispec.ImageIndexFile))
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("not an OCI layout: %w", err)
	}
	defer f.Close()
	return wholeOf(f, s.tag)
}

func (s *ociArchive) whole(ctx context.Context) (d ocispec.Descriptor, err error) {
	if s.archive == nil {
		if s.archive, err = openArchive(ctx, s.file, s.limit); err != nil {
			return d, err
		}
	}
	r, err := s.reader(ocispec.ImageIndexFile)
	if err != nil {
		return d, fmt.Errorf("not an OCI archive: %w", err)
	}
	return wholeOf(r, s.tag)
}

// wholeOf returns the entry of an index.json that a tag or digest names.
func wholeOf(r io.Reader, tag string) (d ocispec.Descriptor, err error) {
	index, err := readIndexFile(r)
	if err != nil {
		return d, err
	}
	list, err := pick(index.Manifests, tag)
	switch {
	case err != nil:
		return d, err
	case list == nil:
		return ocispec.Descriptor{Digest: digest.Digest(tag)}, nil
	case len(list) > 1:
		return d, fmt.Errorf("%w: %d entries of %s, expected one: choose one by its tag, its digest or --platform",
			ErrAmbiguous, len(list), ocispec.ImageIndexFile)
	}
	return list[0], nil
}

// SplitTag splits PATH[:TAG]. If PATH may hold a colon, it takes the shortest PATH that exists.
func SplitTag(s string) (path, tag string) { return splitPath(s) }
