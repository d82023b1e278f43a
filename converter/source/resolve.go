package source

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/converter/source/remote"
)

const (
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	schema1        = "application/vnd.docker.distribution.manifest.v1" // followed by a suffix

	// maxDocument bounds a document in bytes. Registries refuse manifests above 4 MiB.
	maxDocument = 8 << 20
	// maxNesting bounds the nesting of indexes.
	maxNesting = 8
	// maxDocuments and maxAllDocuments bound the number and the bytes of documents read to find one image:
	// indexes can name many documents, and an index without platforms requires reading every image in it.
	maxDocuments    = 1000
	maxAllDocuments = 32 << 20
)

var (
	// errMissing marks a document that its source does not hold.
	errMissing = errors.New("missing")
	// errDamaged marks a document that does not match its descriptor, or makes no sense.
	errDamaged = errors.New("damaged")
	// errTooMany ends a search that takes too long.
	errTooMany = errors.New("too many indexes, manifests and configurations for one image")
	// errArtifact marks manifests that are not those of container images.
	errArtifact = fmt.Errorf("%w: this is not a container image", ErrMediaType)
)

// blobs is a store of content by digest: a layout, an archive, a registry, containerd.
type blobs interface {
	open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error)
}

// finder reads the documents that lead to one image, each once, and counts them.
type finder struct {
	blobs
	read      map[digest.Digest][]byte
	documents int // including missing ones
	bytes     int
}

func newFinder(b blobs) *finder { return &finder{blobs: b, read: map[digest.Digest][]byte{}} }

// document reads and verifies a small JSON blob.
func (b *finder) document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("%w: digest %q: %w", errDamaged, d.Digest, err)
	}
	if p, ok := b.read[d.Digest]; ok {
		return p, verifySize(p, d)
	}
	if b.documents++; b.documents > maxDocuments {
		return nil, fmt.Errorf("%w: more than %d", errTooMany, maxDocuments)
	}
	if d.Size > maxDocument {
		return nil, fmt.Errorf("%w: %s: %d bytes, expected at most %d for a %s",
			errDamaged, d.Digest, d.Size, maxDocument, d.MediaType)
	}
	p := d.Data // like containerd: an embedded document saves the request
	if int64(len(p)) != d.Size || verify(p, d) != nil {
		var err error
		if p, err = b.fetch(ctx, d); err != nil {
			return nil, err
		}
	}
	if b.bytes += len(p); b.bytes > maxAllDocuments {
		return nil, fmt.Errorf("%w: more than %d bytes", errTooMany, maxAllDocuments)
	}
	if err := verify(p, d); err != nil {
		return nil, err
	}
	b.read[d.Digest] = p
	return p, nil
}

func (b *finder) fetch(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	rc, err := b.open(ctx, d)
	if err != nil && isMissing(err) {
		return nil, fmt.Errorf("%w: %w", errMissing, err)
	}
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	p, err := io.ReadAll(io.LimitReader(rc, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", d.Digest, err)
	}
	return p, nil
}

// isMissing reports whether err means that the source does not hold a blob, rather than a failed read.
func isMissing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNoMember) || errdefs.IsNotFound(err) ||
		errors.Is(err, remote.ErrNotFound)
}

func verify(p []byte, d ocispec.Descriptor) error {
	if len(p) > maxDocument {
		return fmt.Errorf("%w: %s: more than %d bytes", errDamaged, d.Digest, maxDocument)
	}
	if err := verifySize(p, d); err != nil {
		return err
	}
	if got := d.Digest.Algorithm().FromBytes(p); got != d.Digest {
		return fmt.Errorf("%s: %w", d.Digest,
			&blob.MismatchError{What: "digest", Want: d.Digest.String(), Got: got.String()})
	}
	return nil
}

func verifySize(p []byte, d ocispec.Descriptor) error {
	if d.Size > 0 && int64(len(p)) != d.Size {
		return fmt.Errorf("%s: %w", d.Digest,
			&blob.MismatchError{What: "size", Want: fmt.Sprint(d.Size, " bytes"), Got: fmt.Sprint(len(p), " bytes")})
	}
	return nil
}

// resolve follows a descriptor through indexes and a manifest to the layers.
func resolve(ctx context.Context, store blobs, d ocispec.Descriptor, p Platform) (*Image, error) {
	b := newFinder(store)
	d, err := b.typed(ctx, d)
	if err != nil {
		return nil, err
	}
	if !isIndex(d.MediaType) {
		img, err := b.image(ctx, d)
		if err != nil {
			return nil, err
		}
		return img, p.accept(img.Platform)
	}
	list, err := b.index(ctx, d)
	if err != nil {
		return nil, err
	}
	s := newSearch(b, p)
	if err := s.expand(ctx, list, "", 1); err != nil {
		return nil, err
	}
	return s.choose(ctx)
}

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == dockerIndex
}

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == dockerManifest
}

// plainType returns a media type without its parameters, such as a charset added by a server.
func plainType(s string) string {
	if t, _, err := mime.ParseMediaType(s); err == nil {
		return t
	}
	return s
}

// saysNothing reports whether a media type is one of those that servers use for unknown content.
func saysNothing(mediaType string) bool {
	t := plainType(mediaType)
	return slices.Contains([]string{"", "application/octet-stream", "binary/octet-stream", "application/json"}, t) ||
		strings.HasPrefix(t, "text/")
}

// typed returns the descriptor, with the media type of its document if it has none.
func (b *finder) typed(ctx context.Context, d ocispec.Descriptor) (ocispec.Descriptor, error) {
	if !saysNothing(d.MediaType) {
		d.MediaType = plainType(d.MediaType)
		return d, nil
	}
	said := d.MediaType
	d.MediaType = ocispec.MediaTypeImageManifest // registries keep manifests apart from blobs
	p, err := b.document(ctx, d)
	if err != nil {
		return d, fmt.Errorf("manifest: %w", err)
	}
	if d.MediaType = mediaTypeOf(p); d.MediaType == "" {
		return d, fmt.Errorf("%w %q of %s: expected an index or a manifest", errArtifact, said, d.Digest)
	}
	return d, nil
}

func (b *finder) index(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	p, err := b.document(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	var index ocispec.Index
	if err := unmarshal(p, d.MediaType, &index); err != nil {
		return nil, fmt.Errorf("index %s: %w", d.Digest, err)
	}
	return index.Manifests, nil
}

// decode decodes JSON. It skips the byte order mark that editors and shells on Windows add.
func decode(p []byte, v any) error {
	if err := json.Unmarshal(bytes.TrimPrefix(p, []byte("\xef\xbb\xbf")), v); err != nil {
		if pack := blob.LooksLike(p); pack != "" {
			return fmt.Errorf("%w: it looks like %s, expected JSON", errDamaged, pack)
		}
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	return nil
}

// unmarshal decodes an index or a manifest. It refuses a document that contradicts mediaType or can be
// read as both: one digest would be different images for different tools (CVE-2021-41190). Containerd
// refuses them, too.
func unmarshal(p []byte, mediaType string, v any) error {
	var doc struct {
		MediaType string          `json:"mediaType"`
		Config    json.RawMessage `json:"config"`
		Layers    json.RawMessage `json:"layers"`
		Manifests json.RawMessage `json:"manifests"`
		FSLayers  json.RawMessage `json:"fsLayers"`
	}
	if err := decode(p, &doc); err != nil {
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
	return decode(p, v)
}

// mediaTypeOf derives the media type of a document from its content.
func mediaTypeOf(p []byte) string {
	var doc struct {
		MediaType     string          `json:"mediaType"`
		SchemaVersion int             `json:"schemaVersion"`
		Manifests     json.RawMessage `json:"manifests"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
	}
	if decode(p, &doc) != nil {
		return ""
	}
	switch {
	case !saysNothing(doc.MediaType):
		return plainType(doc.MediaType)
	case doc.SchemaVersion == 1:
		return schema1 + "+json"
	case doc.Manifests != nil:
		return ocispec.MediaTypeImageIndex
	case doc.Config != nil && doc.Layers != nil:
		return ocispec.MediaTypeImageManifest
	}
	return ""
}
