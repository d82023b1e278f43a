package snapshotter

import (
	"context"
	"io"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
)

// Lowers stores layers and turns chains of them into directories. Everything it does is idempotent and may be called
// concurrently, for the same key too. Errors are of an errdefs kind; ErrResourceExhausted means that memory is full and
// that a Sweep which is short of memory may help.
type Lowers interface {
	// BlobKey returns the key of the streamed layer with a diff ID.
	BlobKey(diffID digest.Digest) string

	// ImageKey returns the key of the image that layers make. It takes their keys, bottom first.
	ImageKey(layers []string) string

	// AddDir stores the changes in dir, the upper directory of an overlay, as layer key of a namespace. It does nothing
	// if the layer is stored already.
	AddDir(ctx context.Context, namespace, key, dir string) error

	// AddBlob stores an OCI layer. The layer survives a reboot when AddBlob returns.
	AddBlob(ctx context.Context, blob Blob) (Streamed, error)

	// AddClaimed stores an OCI layer of which only a claim is known. It finds a blob in the namespace of the claim
	// and proves that the blob has the claimed diff ID.
	AddClaimed(ctx context.Context, claim Claim) (Streamed, error)

	// Lower returns the directory at which an image is mounted. It restores layers that are missing, and builds and
	// mounts the image where that is not yet done. The directory is the same for an image as long as its pool lives.
	Lower(ctx context.Context, img Image) (string, error)

	// Plain returns a directory on disk that holds a copy of an image. It needs no free memory.
	Plain(ctx context.Context, img Image) (string, error)

	// Sweep frees what use says is no longer needed. With short set memory is wanted: Sweep then also frees things
	// that are merely Stored or Ready if they can be made again.
	Sweep(ctx context.Context, use Uses, short bool) error
}

// Image is the image of a chain of layers.
type Image struct {
	// Key is what ImageKey returned for the layers.
	Key string
	// Layers come bottom first.
	Layers []Layer
	// Namespace is the containerd namespace that wants the image.
	Namespace string
	// Name is the reference of the OCI image, if the labels tell it.
	Name string
}

// Layer is one layer of a chain.
type Layer struct {
	// Key identifies the layer in Lowers.
	Key string
	// Dir is the upper directory that the layer was unpacked into; empty for a streamed layer, and for one whose
	// directory was removed.
	Dir string
	// Claim says where an unpacked layer without a directory can be restored from.
	Claim Claim
}

// Blob is an OCI layer to be streamed.
type Blob struct {
	// Namespace is the namespace that the layer is streamed for.
	Namespace string
	// Digest and MediaType are those of the layer's descriptor.
	Digest    digest.Digest
	MediaType string
	// DiffID is what containerd expects the uncompressed digest to be; empty if it did not say.
	DiffID digest.Digest
	// Size is the number of bytes that Open yields.
	Size int64
	// Open starts reading the blob, in the caller's namespace. It may be called again after a failure.
	Open func(ctx context.Context) (io.ReadCloser, error)
	// Pin must be called with the key of the layer before the layer is stored, or found to be stored already: from
	// then on no sweep frees it until the caller has recorded it.
	Pin func(key string)
}

// Claim is what a client says about a layer.
type Claim struct {
	// Namespace is the namespace whose blobs count.
	Namespace string `json:"namespace"`
	// DiffID is the claimed diff ID; empty if there is no claim.
	DiffID digest.Digest `json:"diffID"`
	// Blob is the claimed digest of the blob; empty if it is not known.
	Blob digest.Digest `json:"blob,omitempty"`
}

// Streamed is the result of AddBlob.
type Streamed struct {
	// Key identifies the layer.
	Key string
	// DiffID is the digest of the uncompressed layer, computed now or when the layer was first stored.
	DiffID digest.Digest
	// Size is the number of uncompressed bytes of the layer's tar.
	Size int64
	// Usage is what the layer holds: bytes of file contents, and entries.
	Usage snapshots.Usage
}

// Use says how much something is needed.
type Use int

// The degrees of need, in rising order.
const (
	// Unused things are freed, together with everything that they could be restored from.
	Unused Use = iota
	// Stored things stay in memory, unmounted.
	Stored
	// Ready things stay mounted: a container may start from them at any moment.
	Ready
	// InUse things may not be touched: a snapshot stands on them, an operation on them is under way, or there is no
	// other copy.
	InUse
)

// Uses tells Sweep what is needed. Its methods are cheap and must be asked at the moment of freeing, under whatever
// lock excludes Lower and AddBlob for the same key: they see an operation that begins while a sweep is under way.
type Uses interface {
	// Image says how much an image is needed.
	Image(key string) Use
	// Plain reports whether the plain copy of an image is needed.
	Plain(key string) bool
	// Layer says how much a layer is needed: Unused, Stored or InUse.
	Layer(key string) Use
	// Namespaces returns the namespaces that have snapshots of an image or a layer, sorted.
	Namespaces(key string) []string
}
