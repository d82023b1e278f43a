package store

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// Document describes one image for readers of a shared pool; docs/pool-format.md defines its bytes.
type Document struct {
	// ChainID is the chain ID of DiffIDs.
	ChainID digest.Digest `json:"chainID"`
	// DiffIDs are the diff IDs of the layers, bottom first. The owner computed each from the layer itself.
	DiffIDs []digest.Digest `json:"diffIDs"`
	// Images are the OCI images that have exactly these layers.
	Images []OCIImage `json:"images,omitempty"`
}

// OCIImage is an OCI image in the owner's containerd.
type OCIImage struct {
	Namespace string `json:"namespace"`
	// Name is a reference.
	Name string `json:"name"`
	// Target is the descriptor of its manifest, or of an index that lists the manifest.
	Target ocispec.Descriptor `json:"target"`
	// Blobs are the manifest, the configuration and the index if Target is one, found by their digests.
	Blobs [][]byte `json:"blobs"`
}

// Limits of a document, besides its size.
const (
	maxDocumentLayers = 1024
	maxDocumentImages = 1024
	maxDocumentName   = 1024 // in bytes
	maxImageBlobs     = 3
)

// ParseDocument parses an untrusted document. In the result all digests are correct, and all images
// have the layers of the document. Errors: pool.ErrCorrupt.
func ParseDocument(raw []byte) (*Document, error) {
	d, err := parseDocument(raw)
	if err != nil {
		return nil, fmt.Errorf("document: %w: %w", pool.ErrCorrupt, err)
	}
	return d, nil
}

func parseDocument(raw []byte) (*Document, error) {
	if len(raw) > pool.MaxDocument {
		return nil, fmt.Errorf("%d bytes, expected at most %d", len(raw), pool.MaxDocument)
	}
	var d Document
	if err := json.Unmarshal(raw, &d); err != nil {
		return nil, err
	}
	return &d, d.validate()
}

func (d *Document) validate() error {
	if n := len(d.DiffIDs); n == 0 || n > maxDocumentLayers {
		return fmt.Errorf("%d diff IDs, expected 1 to %d", n, maxDocumentLayers)
	}
	for _, id := range d.DiffIDs {
		if err := id.Validate(); err != nil {
			return fmt.Errorf("diff ID %q: %w", id, err)
		}
	}
	if want := identity.ChainID(d.DiffIDs); d.ChainID != want {
		return fmt.Errorf("chain ID %q, its diff IDs make %q", d.ChainID, want)
	}
	if n := len(d.Images); n > maxDocumentImages {
		return fmt.Errorf("%d OCI images, expected at most %d", n, maxDocumentImages)
	}
	seen := map[[2]string]bool{}
	for _, m := range d.Images {
		key := [2]string{m.Namespace, m.Name}
		if seen[key] {
			return fmt.Errorf("OCI image %q of namespace %q twice", m.Name, m.Namespace)
		}
		seen[key] = true
		parts, err := m.Parts()
		if err != nil {
			return fmt.Errorf("OCI image %q of namespace %q: %w", m.Name, m.Namespace, err)
		}
		if !slices.Equal(parts.DiffIDs, d.DiffIDs) {
			return fmt.Errorf("OCI image %q of namespace %q has diff IDs %q, the document has %q",
				m.Name, m.Namespace, parts.DiffIDs, d.DiffIDs)
		}
	}
	return nil
}

// Marshal returns the bytes of a document. Equal documents have equal bytes, whatever the order of
// their images. Errors: pool.ErrInvalid if ParseDocument would refuse the result.
func (d *Document) Marshal() ([]byte, error) {
	sorted := *d
	sorted.Images = slices.Clone(d.Images)
	slices.SortFunc(sorted.Images, func(a, b OCIImage) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	if err := sorted.validate(); err != nil {
		return nil, fmt.Errorf("document: %w: %w", pool.ErrInvalid, err)
	}
	raw, err := json.Marshal(&sorted)
	if err == nil && len(raw) > pool.MaxDocument {
		err = fmt.Errorf("document of %d bytes, expected at most %d: %w", len(raw), pool.MaxDocument, pool.ErrInvalid)
	}
	return raw, err
}

// ContentBlob is a blob with its descriptor.
type ContentBlob struct {
	Desc  ocispec.Descriptor
	Bytes []byte
}

// OCIParts are the parts of an OCI image.
type OCIParts struct {
	// Index is nil if the target is the manifest.
	Index            *ContentBlob
	Manifest, Config ContentBlob
	// Layers are the descriptors of the layer blobs, bottom first, with their DiffIDs.
	Layers  []ocispec.Descriptor
	DiffIDs []digest.Digest
}

// Parts resolves the target of an OCI image and verifies every blob: its digest and size match its
// descriptor, and there are no surplus blobs.
func (m OCIImage) Parts() (*OCIParts, error) {
	if err := identifiers.Validate(m.Namespace); err != nil {
		return nil, fmt.Errorf("namespace: %w", err)
	}
	if len(m.Name) > maxDocumentName {
		return nil, fmt.Errorf("name of %d bytes, expected at most %d", len(m.Name), maxDocumentName)
	}
	if _, err := reference.ParseAnyReference(m.Name); err != nil {
		return nil, fmt.Errorf("name: %w", err)
	}
	if n := len(m.Blobs); n > maxImageBlobs {
		return nil, fmt.Errorf("%d blobs, expected at most %d", n, maxImageBlobs)
	}
	find := finderOf(m.Blobs)
	var p OCIParts
	top, err := find(m.Target)
	if err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	p.Manifest = top
	if source.IsIndex(m.Target.MediaType) {
		p.Index = &top
		if p.Manifest, err = manifestOf(top, find); err != nil {
			return nil, fmt.Errorf("index %s: %w", top.Desc.Digest, err)
		}
	}
	manifest, err := source.ParseManifest(p.Manifest.Bytes, p.Manifest.Desc.MediaType)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", p.Manifest.Desc.Digest, err)
	}
	if p.Config, err = find(manifest.Config); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	config, err := source.ParseConfig(p.Config.Bytes)
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", p.Config.Desc.Digest, err)
	}
	p.Layers, p.DiffIDs = manifest.Layers, config.RootFS.DiffIDs
	if len(p.Layers) != len(p.DiffIDs) {
		return nil, fmt.Errorf("%d diff IDs for %d layers", len(p.DiffIDs), len(p.Layers))
	}
	for _, l := range p.Layers {
		if err := l.Digest.Validate(); err != nil {
			return nil, fmt.Errorf("layer %q: %w", l.Digest, err)
		}
	}
	want := 2
	if p.Index != nil {
		want = 3
	}
	if len(m.Blobs) != want {
		return nil, fmt.Errorf("%d blobs, expected %d", len(m.Blobs), want)
	}
	return &p, nil
}

// finderOf returns a function that finds one of the blobs by its descriptor.
func finderOf(blobs [][]byte) func(ocispec.Descriptor) (ContentBlob, error) {
	byDigest := map[digest.Digest][]byte{}
	for _, b := range blobs {
		byDigest[digest.FromBytes(b)] = b
	}
	return func(d ocispec.Descriptor) (ContentBlob, error) {
		b, ok := byDigest[d.Digest]
		switch {
		case !ok:
			return ContentBlob{}, fmt.Errorf("blob %q is not there: %w", d.Digest, pool.ErrNotFound)
		case d.Size != int64(len(b)):
			return ContentBlob{}, fmt.Errorf("blob %s has %d bytes, its descriptor says %d", d.Digest, len(b), d.Size)
		}
		return ContentBlob{Desc: d, Bytes: b}, nil
	}
}

// manifestOf finds the one manifest of an index that is among the blobs.
func manifestOf(index ContentBlob, find func(ocispec.Descriptor) (ContentBlob, error)) (ContentBlob, error) {
	list, err := source.ParseIndex(index.Bytes, index.Desc.MediaType)
	if err != nil {
		return ContentBlob{}, err
	}
	for _, d := range list.Manifests {
		m, err := find(d)
		if err == nil && !bytes.Equal(m.Bytes, index.Bytes) {
			return m, nil
		}
	}
	return ContentBlob{}, fmt.Errorf("none of its %d manifests is there: %w", len(list.Manifests), pool.ErrNotFound)
}
