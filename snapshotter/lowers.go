package snapshotter

import (
	"context"
	"io"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
)

// Lowers stores layers and turns chains of them into mounted directories. Everything it does is idempotent and may be
// called concurrently, for the same key too. Errors are of an errdefs kind; ErrResourceExhausted means that memory is
// full and that a Sweep which is short of memory may help.
type Lowers interface {
	// AddDir stores the changes in dir, the upper directory of an overlay, as layer key. It does nothing if the
	// layer is stored already.
	AddDir(ctx context.Context, key, dir string) error

	// AddBlob stores an OCI layer. What it stored survives a reboot when AddBlob returns.
	AddBlob(ctx context.Context, blob Blob) (Streamed, error)

	// Lower returns the directory at which the image of a chain is mounted. It stores missing layers again from what
	// they can be made from, and builds and mounts the image where that is not yet done. The directory is the same
	// for a chain for ever. The layers come bottom first and are not consulted if the image exists.
	Lower(ctx context.Context, chain string, layers []Layer) (string, error)

	// Sweep frees what use says is no longer needed. With short set memory is wanted: what is merely Stored or Ready
	// is freed as well if it can be made again.
	Sweep(ctx context.Context, use Uses, short bool) error
}

// Layer is one layer of a chain.
type Layer struct {
	// Key identifies the layer in Lowers.
	Key string
	// Dir is the upper directory that the layer was unpacked into; empty for a streamed layer.
	Dir string
}

// Blob is an OCI layer to be streamed.
type Blob struct {
	// MediaType is that of the layer's descriptor.
	MediaType string
	// DiffID is what containerd expects the uncompressed digest to be; empty if it did not say.
	DiffID digest.Digest
	// Size is the number of bytes that Open yields.
	Size int64
	// Open starts reading the blob. It may be called again after a failure.
	Open func(ctx context.Context) (io.ReadCloser, error)
	// Pin must be called with the key of the layer before it is stored, or found to be stored already: from then on
	// no sweep frees it until the caller has written it down.
	Pin func(key string)
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
	// Unused things are freed, together with all they could be made from again.
	Unused Use = iota
	// Stored things stay in memory, unmounted.
	Stored
	// Ready things stay mounted: a container may start from them at any moment.
	Ready
	// InUse things may not be touched: a snapshot stands on them, or an operation on them is under way.
	InUse
)

// Uses tells Sweep what is needed. Its methods are cheap and must be asked at the moment of freeing, under whatever
// lock excludes Lower and AddBlob for the same key: an operation that begins while a sweep is under way is seen.
type Uses interface {
	// Image says how much the image of a chain is needed.
	Image(chain string) Use
	// Layer says how much a layer is needed: Unused, Stored or InUse.
	Layer(key string) Use
}
