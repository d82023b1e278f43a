package source

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"

	// maxDocument bounds an index, a manifest or a configuration. Registries refuse manifests above 4 MiB.
	maxDocument = 8 << 20
	// maxNesting bounds how deep indexes may lie in indexes.
	maxNesting = 8
	// maxDocuments and maxAllDocuments bound the number and the bytes of what is read to find one image: indexes can name
	// each other many times, and an index without platforms makes us read every image in it.
	maxDocuments    = 1000
	maxAllDocuments = 32 << 20
)

// blobs is a store that finds content by its digest: a layout, an archive, a registry, containerd.
type blobs interface {
	open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error)
}

// finder reads the documents that lead to one image, and counts them.
type finder struct {
	blobs
	documents, bytes int
}

// document reads and verifies a small JSON blob.
func (b *finder) document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if b.documents++; b.documents > maxDocuments {
		return nil, fmt.Errorf("more than %d indexes, manifests and configurations for one image", maxDocuments)
	}
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", d.Digest, err)
	}
	if d.Size > maxDocument {
		return nil, fmt.Errorf("%s: %d bytes, expected at most %d for a %s", d.Digest, d.Size, maxDocument, d.MediaType)
	}
	p := d.Data // as containerd does: if it is the document, nothing else is asked for
	if int64(len(p)) != d.Size || verify(p, d) != nil {
		rc, err := b.open(ctx, d)
		if err != nil {
			return nil, err
		}
		defer rc.Close()
		if p, err = io.ReadAll(io.LimitReader(rc, maxDocument+1)); err != nil {
			return nil, fmt.Errorf("read %s: %w", d.Digest, err)
		}
	}
	if b.bytes += len(p); b.bytes > maxAllDocuments {
		return nil, fmt.Errorf("more than %d bytes of indexes, manifests and configurations for one image", maxAllDocuments)
	}
	return p, verify(p, d)
}

func verify(p []byte, d ocispec.Descriptor) error {
	if len(p) > maxDocument {
		return fmt.Errorf("%s: more than %d bytes", d.Digest, maxDocument)
	}
	if d.Size > 0 && int64(len(p)) != d.Size {
		return fmt.Errorf("%s: %w", d.Digest,
			&blob.MismatchError{What: "size", Want: fmt.Sprint(d.Size, " bytes"), Got: fmt.Sprint(len(p), " bytes")})
	}
	if got := d.Digest.Algorithm().FromBytes(p); got != d.Digest {
		return fmt.Errorf("%s: %w", d.Digest, &blob.MismatchError{What: "digest", Want: d.Digest.String(), Got: got.String()})
	}
	return nil
}

// resolve walks from a descriptor through indexes and manifest to the layers.
func resolve(ctx context.Context, store blobs, d ocispec.Descriptor, p Platform) (*Image, error) {
	b := &finder{blobs: store}
	indexed := false
	if isIndex(d.MediaType) {
		all, err := manifests(ctx, b, d, 0)
		if err != nil {
			return nil, err
		}
		if d, err = p.choose(all); err != nil {
			return nil, err
		}
		indexed = true
	}
	img, err := fromManifest(ctx, b, d)
	if err != nil {
		return nil, err
	}
	if !indexed {
		if err := p.accept(img.Platform); err != nil {
			return nil, err
		}
	}
	return img, nil
}

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == dockerIndex
}

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == dockerManifest
}

// manifests lists the image manifests of an index and of the indexes in it, each with its platform.
func manifests(ctx context.Context, b *finder, d ocispec.Descriptor, depth int) ([]ocispec.Descriptor, error) {
	if depth == maxNesting {
		return nil, fmt.Errorf("index %q: more than %d indexes within each other", d.Digest, maxNesting)
	}
	p, err := b.document(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	var index ocispec.Index
	if err := unmarshal(p, d.MediaType, &index); err != nil {
		return nil, fmt.Errorf("index %s: %w", d.Digest, err)
	}
	return expand(ctx, b, index.Manifests, depth)
}

func expand(ctx context.Context, b *finder, list []ocispec.Descriptor, depth int) ([]ocispec.Descriptor, error) {
	var all []ocispec.Descriptor
	for _, m := range list {
		switch {
		case isIndex(m.MediaType):
			inner, err := manifests(ctx, b, m, depth+1)
			if err != nil {
				return nil, err
			}
			all = append(all, inner...)
		case !isManifest(m.MediaType):
			// An index may hold artifacts of any kind beside images.
		case m.Platform != nil:
			all = append(all, m)
		default:
			img, err := fromManifest(ctx, b, m) // the configuration knows
			if errors.Is(err, errArtifact) {
				continue // signatures and the like often stand beside the image they belong to, in a layout
			}
			if err != nil {
				return nil, err
			}
			m.Platform = &img.Platform
			all = append(all, m)
		}
	}
	return all, nil
}

// unmarshal reads an index or a manifest. It refuses one that is something else than mediaType says, or could be read as
// both: the same digest would then be different images for different tools (CVE-2021-41190). Containerd does so too.
func unmarshal(p []byte, mediaType string, v any) error {
	var doc struct {
		MediaType string          `json:"mediaType"`
		Config    json.RawMessage `json:"config"`
		Layers    json.RawMessage `json:"layers"`
		Manifests json.RawMessage `json:"manifests"`
		FSLayers  json.RawMessage `json:"fsLayers"`
	}
	if err := json.Unmarshal(p, &doc); err != nil {
		return err
	}
	switch {
	case doc.FSLayers != nil:
		return fmt.Errorf("%w: it has fsLayers, as Docker schema 1", ErrMediaType)
	case isManifest(mediaType) && (doc.Manifests != nil || isIndex(doc.MediaType)):
		return fmt.Errorf("%w: expected a manifest (%s), found an index", ErrMediaType, mediaType)
	case isIndex(mediaType) && (doc.Config != nil || doc.Layers != nil || isManifest(doc.MediaType)):
		return fmt.Errorf("%w: expected an index (%s), found a manifest", ErrMediaType, mediaType)
	}
	return json.Unmarshal(p, v)
}

// errArtifact marks manifests of something else than container images.
var errArtifact = fmt.Errorf("%w of its config", ErrMediaType)

// fromManifest reads an image manifest and its configuration, and checks that they agree.
func fromManifest(ctx context.Context, b *finder, d ocispec.Descriptor) (*Image, error) {
	if !isManifest(d.MediaType) {
		return nil, fmt.Errorf("%w %q of %q: expected an OCI or Docker (schema 2) manifest or index",
			ErrMediaType, d.MediaType, d.Digest)
	}
	p, err := b.document(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	var m ocispec.Manifest
	if err := unmarshal(p, d.MediaType, &m); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if t := m.Config.MediaType; t != ocispec.MediaTypeImageConfig && t != dockerConfig {
		return nil, fmt.Errorf("manifest %s: %w %q: expected %q, this is not a container image",
			d.Digest, errArtifact, t, ocispec.MediaTypeImageConfig)
	}
	p, err = b.document(ctx, m.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	img, err := fromConfig(p, m.Config.Digest, len(m.Layers))
	if err != nil {
		return nil, err
	}
	img.Digest = d.Digest
	for i, l := range m.Layers {
		if err := l.Digest.Validate(); err != nil {
			return nil, fmt.Errorf("manifest %s: layer %d: digest %q: %w", d.Digest, i, l.Digest, err)
		}
		if l.Size <= 0 {
			return nil, fmt.Errorf("layer %s: size %d, expected more than 0", l.Digest, l.Size)
		}
		if err := blob.CheckMediaType(l.MediaType); err != nil {
			return nil, fmt.Errorf("layer %s: %w", l.Digest, err)
		}
		img.Layers[i].Desc = l
		img.Layers[i].Open = func(ctx context.Context) (io.ReadCloser, error) { return b.open(ctx, l) }
	}
	return img, nil
}

// fromConfig makes an image with n layers of which only the diff IDs are known.
func fromConfig(p []byte, d digest.Digest, n int) (*Image, error) {
	var config ocispec.Image
	if err := json.Unmarshal(p, &config); err != nil {
		return nil, fmt.Errorf("config %s: %w", d, err)
	}
	if len(config.RootFS.DiffIDs) != n {
		return nil, fmt.Errorf("config %s: %d diff IDs for %d layers", d, len(config.RootFS.DiffIDs), n)
	}
	img := &Image{Digest: d, Platform: config.Platform, Layers: make([]Layer, n)}
	for i, id := range config.RootFS.DiffIDs {
		if err := id.Validate(); err != nil {
			return nil, fmt.Errorf("config %s: diff ID %q of layer %d: %w", d, id, i, err)
		}
		img.Layers[i].DiffID = id
	}
	return img, nil
}

// mediaTypeOf looks into a document for what its descriptor does not say.
func mediaTypeOf(p []byte) string {
	var doc struct {
		MediaType     string            `json:"mediaType"`
		SchemaVersion int               `json:"schemaVersion"`
		Manifests     []json.RawMessage `json:"manifests"`
		Layers        []json.RawMessage `json:"layers"`
	}
	if json.Unmarshal(p, &doc) != nil {
		return ""
	}
	switch {
	case doc.MediaType != "":
		return doc.MediaType
	case doc.SchemaVersion == 1:
		return "application/vnd.docker.distribution.manifest.v1+json"
	case doc.Manifests != nil:
		return ocispec.MediaTypeImageIndex
	case doc.Layers != nil:
		return ocispec.MediaTypeImageManifest
	}
	return ""
}

// pick finds one image among the entries of an index.json by tag or digest, or all of them as one index.
func pick(list []ocispec.Descriptor, tag string) ([]ocispec.Descriptor, error) {
	names := func() string {
		var s []string
		for _, d := range list {
			for _, a := range tagAnnotations {
				if v := d.Annotations[a]; v != "" {
					s = append(s, fmt.Sprintf("%q", v))
					break
				}
			}
		}
		if len(s) == 0 {
			return "no tags"
		}
		return strings.Join(s, ", ")
	}
	if tag == "" {
		all, tagged := map[digest.Digest]bool{}, map[digest.Digest]bool{} // an image may have several tags
		for _, d := range list {
			all[d.Digest] = true
			if slices.ContainsFunc(tagAnnotations, func(a string) bool { return d.Annotations[a] != "" }) {
				tagged[d.Digest] = true
			}
		}
		switch {
		case len(list) == 0:
			return nil, fmt.Errorf("%w: the index is empty", ErrNotFound)
		case len(all) == 1:
			return list[:1], nil
		case len(tagged) > 1:
			return nil, fmt.Errorf("%w: no tag given and several images: %s", ErrNotFound, names())
		}
		return list, nil
	}
	for _, d := range list {
		if string(d.Digest) == tag {
			return []ocispec.Descriptor{d}, nil
		}
		for _, a := range tagAnnotations {
			if d.Annotations[a] == tag {
				return []ocispec.Descriptor{d}, nil
			}
		}
	}
	if strings.HasPrefix(tag, "sha256:") {
		var digests []string
		for _, d := range list {
			digests = append(digests, d.Digest.String())
		}
		return nil, fmt.Errorf("%w: the index has no digest %q, it has: %s", ErrNotFound, tag, strings.Join(digests, ", "))
	}
	return nil, fmt.Errorf("%w: no tag %q, there is: %s", ErrNotFound, tag, names())
}

// tagAnnotations hold the name of an image in a layout: what the specification says, and what containerd writes.
var tagAnnotations = []string{ocispec.AnnotationRefName, "io.containerd.image.name"}
