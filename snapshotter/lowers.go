package snapshotter

import (
	"context"
	"io"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
)

// Lowers stores layers and turns chains of them into directories. Its methods are idempotent and may
// be called concurrently, also for the same key. Errors are of an errdefs kind; ErrResourceExhausted
// means that memory is full and that a Sweep with short set may help.
type Lowers interface {
	// BlobKey returns the key of the streamed layer with a diff ID.
	BlobKey(diffID digest.Digest) string

	// ImageKey returns the key of the image of a chain, given the keys of its layers, bottom first.
	ImageKey(layers []string) string

	// AddDir stores the changes in dir, the upper directory of an overlay, as layer key of a namespace. It
	// does nothing if the layer is stored already.
	AddDir(ctx context.Context, namespace, key, dir string) error

	// AddBlob stores an OCI layer. The layer survives a reboot when AddBlob returns.
	AddBlob(ctx context.Context, blob Blob) (Streamed, error)

	// AddClaimed stores an OCI layer for which only a claim exists. It finds a blob in the namespace of
	// the claim and proves that the blob has the claimed diff ID.
	AddClaimed(ctx context.Context, claim Claim) (Streamed, error)

	// Lower returns the directory at which an image is mounted. It restores missing layers, then builds
	// and mounts the image if necessary. An image keeps its directory while its pool lives.
	Lower(ctx context.Context, img Image) (string, error)

	// Plain copies an image to a directory on disk and returns that directory. It needs no free memory.
	Plain(ctx context.Context, img Image) (string, error)

	// Sweep frees what use reports as not needed. With short set, memory is scarce: Sweep then also frees
	// things that are only Stored or Ready, if they can be made again.
	Sweep(ctx context.Context, use Uses, short bool) error
}

// Image is the image of a chain of layers.
type Image struct {
	// Key is the result of ImageKey for the layers.
	Key string
	// Layers are the layers of the chain, bottom first.
	Layers []Layer
	// Namespace is the containerd namespace that needs the image.
	Namespace string
	// Name is the reference of the OCI image; empty if no label has it.
	Name string
}

// Layer is one layer of a chain.
type Layer struct {
	// Key identifies the layer in Lowers.
	Key string
	// Dir is the upper directory that the layer was unpacked into. It is empty for a streamed layer, and
	// for one whose directory was removed.
	Dir string
	// Claim names the blob from which an unpacked layer without a directory can be restored.
	Claim Claim
}

// Blob is an OCI layer to be streamed.
type Blob struct {
	// Namespace is the namespace for which the layer is streamed.
	Namespace string
	// Digest and MediaType come from the layer's descriptor.
	Digest    digest.Digest
	MediaType string
	// DiffID is the uncompressed digest that containerd expects; empty if it names none.
	DiffID digest.Digest
	// Size is the number of bytes that Open yields.
	Size int64
	// Open starts reading the blob in the caller's namespace. It may be called again after a failure.
	Open func(ctx context.Context) (io.ReadCloser, error)
	// Pin must be called with the key of the layer before the layer is stored or found to be stored. From
	// then on no sweep frees the layer until the caller has recorded it.
	Pin func(key string)
}

// Claim is a client's unproven statement about a layer.
type Claim struct {
	// Namespace is the namespace in which a blob is looked up.
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
	// Usage is the space of the layer: bytes of file contents, and entries.
	Usage snapshots.Usage
}

// Use is a degree of need.
type Use int

// The degrees of need, in rising order.
const (
	// Unused things are freed, together with everything from which they could be restored.
	Unused Use = iota
	// Stored things stay in memory, unmounted.
	Stored
	// Ready things stay mounted because a container may start from them at any moment.
	Ready
	// InUse things must not be touched: a snapshot or an operation needs them, or no other copy exists.
	InUse
)

// Uses tells Sweep what is needed. Its methods are cheap. Call them at the moment of freeing, under
// the lock that excludes Lower and AddBlob for the same key: they see operations that began after the sweep.
type Uses interface {
	// Image returns how much an image is needed.
	Image(key string) Use
	// Plain reports whether the plain copy of an image is needed.
	Plain(key string) bool
	// Layer returns how much a layer is needed: Unused, Stored or InUse.
	Layer(key string) Use
	// Namespaces returns the namespaces that have snapshots of an image or a layer, sorted.
	Namespaces(key string) []string
}
