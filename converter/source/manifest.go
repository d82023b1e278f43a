package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
)

// manifest reads the manifest of a container image. The error wraps ErrMediaType for other manifests.
func (b *finder) manifest(ctx context.Context, d ocispec.Descriptor) (ocispec.Manifest, error) {
	var m ocispec.Manifest
	if !isManifest(d.MediaType) {
		return m, notManifest(d)
	}
	p, err := b.document(ctx, d)
	if err != nil {
		return m, fmt.Errorf("manifest: %w", err)
	}
	if m, err = ParseManifest(p, d.MediaType); err != nil {
		return m, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	return m, nil
}

// notManifest returns the error for a descriptor that is neither an index nor a manifest.
func notManifest(d ocispec.Descriptor) error {
	old := ""
	if strings.HasPrefix(d.MediaType, schema1) {
		old = " (Docker schema 1, which registries no longer take: push the image again)"
	}
	return fmt.Errorf("%w %q of %q%s: expected an OCI or Docker (schema 2) manifest or index",
		ErrMediaType, d.MediaType, d.Digest, old)
}

// isImage accepts the manifests of container images, not those of signatures, attestations and other
// artifacts. Many artifacts use the configuration type of an image; then the layers decide. A
// configuration type without meaning counts as that of an image: old registries wrote such types,
// Docker accepts them, and artifacts have their own types.
func isImage(mediaType string, m ocispec.Manifest) error {
	t := plainType(m.Config.MediaType)
	vague := saysNothing(t) && (mediaType == dockerManifest || len(m.Layers) > 0)
	if t != ocispec.MediaTypeImageConfig && t != dockerConfig && !vague {
		return fmt.Errorf("%w: its config has the media type %q, expected %q",
			errArtifact, m.Config.MediaType, ocispec.MediaTypeImageConfig)
	}
	for i, l := range m.Layers {
		if err := blob.CheckMediaType(l.MediaType); errors.Is(err, blob.ErrMediaType) {
			return fmt.Errorf("%w: layer %d (%s): %w", errArtifact, i, l.Digest, err)
		}
	}
	return nil
}

func (b *finder) config(ctx context.Context, m ocispec.Manifest) (*Image, error) {
	p, err := b.document(ctx, m.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	return fromConfig(p, m.Config.Digest, len(m.Layers))
}

// image reads an image manifest and its configuration, and checks that they agree.
func (b *finder) image(ctx context.Context, d ocispec.Descriptor) (*Image, error) {
	m, err := b.manifest(ctx, d)
	if err != nil {
		return nil, err
	}
	img, err := b.config(ctx, m)
	if err != nil {
		return nil, err
	}
	img.Digest, img.Manifest, img.ManifestType = d.Digest, b.read[d.Digest], d.MediaType
	if declared(d) {
		img.Platform = *d.Platform // the configuration often lacks variant and features
	}
	for i, l := range m.Layers {
		if err := l.Digest.Validate(); err != nil {
			return nil, fmt.Errorf("manifest %s: layer %d: %w: digest %q: %w", d.Digest, i, errDamaged, l.Digest, err)
		}
		if l.Size <= 0 {
			return nil, fmt.Errorf("layer %s: %w: size %d, expected more than 0", l.Digest, errDamaged, l.Size)
		}
		if err := blob.CheckMediaType(l.MediaType); err != nil {
			return nil, fmt.Errorf("layer %s: %w", l.Digest, err)
		}
		img.Layers[i].Desc = l
		img.Layers[i].Open = func(ctx context.Context) (io.ReadCloser, error) { return b.open(ctx, l) }
		if r, ok := b.blobs.(*registry); ok {
			img.Layers[i].parts = func(ctx context.Context) (Parts, error) { return r.repo.Parts(ctx, l) }
		}
	}
	return img, nil
}

// fromConfig returns an image with n layers. Only their diff IDs are set.
func fromConfig(p []byte, d digest.Digest, n int) (*Image, error) {
	config, err := ParseConfig(p)
	if err != nil {
		return nil, fmt.Errorf("config %s: %w", d, err)
	}
	if len(config.RootFS.DiffIDs) != n {
		return nil, fmt.Errorf("config %s: %w: %d diff IDs for %d layers", d, errDamaged, len(config.RootFS.DiffIDs), n)
	}
	img := &Image{Digest: d, Platform: config.Platform, Layers: make([]Layer, n), Config: p}
	for i, id := range config.RootFS.DiffIDs {
		img.Layers[i].DiffID = id
	}
	return img, nil
}

// ParseManifest decodes the manifest of a container image. The error wraps ErrMediaType for other documents.
func ParseManifest(p []byte, mediaType string) (ocispec.Manifest, error) {
	var m ocispec.Manifest
	if !isManifest(mediaType) {
		return m, notManifest(ocispec.Descriptor{MediaType: mediaType})
	}
	if err := unmarshal(p, mediaType, &m); err != nil {
		return m, err
	}
	return m, isImage(mediaType, m)
}

// ParseConfig decodes a configuration. All returned diff IDs are valid.
func ParseConfig(p []byte) (ocispec.Image, error) {
	var config ocispec.Image
	if err := decode(p, &config); err != nil {
		return config, err
	}
	for i, id := range config.RootFS.DiffIDs {
		if err := id.Validate(); err != nil {
			return config, fmt.Errorf("%w: diff ID %q of layer %d: %w", errDamaged, id, i, err)
		}
	}
	return config, nil
}
