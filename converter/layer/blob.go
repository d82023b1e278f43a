package layer

import (
	"context"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// Blob is a layer that was read from a blob and verified.
type Blob struct {
	*Layer
	// DiffID is the digest of the tar, computed from its bytes.
	DiffID digest.Digest
	// Size is the size of the tar in bytes, BytesRead that of the blob.
	Size, BytesRead int64
}

// FromBlob reads the blob of a layer to its end: read, hash, decompress, hash and parse concurrently. It
// closes src. Contents go into s before the blob is verified; if FromBlob fails, the caller discards them.
//
// FromBlob verifies the properties in spec. It reports a mismatch as a *blob.MismatchError, even if the
// tar cannot be parsed. If s fails, FromBlob returns that error without reading the rest of the blob.
func FromBlob(ctx context.Context, src io.ReadCloser, spec blob.Spec, s Store, lim Limits) (*Blob, error) {
	r, err := blob.NewReader(ctx, src, spec)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	watched := &watchedStore{Store: s}
	l, err := FromTar(ctx, r, watched, lim)
	if err != nil && (watched.failed || ctx.Err() != nil) {
		return nil, err // an error unrelated to the blob
	}
	if err := r.Finish(err); err != nil {
		return nil, err
	}
	return &Blob{Layer: l, DiffID: r.DiffID(), Size: r.Size(), BytesRead: r.BytesRead()}, nil
}

// watchedStore distinguishes errors of a store from those of the reader that the store reads.
type watchedStore struct {
	Store
	failed bool
}

func (w *watchedStore) Put(ctx context.Context, size int64, r io.Reader) (daxfs.Data, error) {
	from := &watchedReader{r: r}
	d, err := w.Store.Put(ctx, size, from)
	if err != nil && (from.err == nil || from.n == size) { // a reader may return EOF with the last byte
		w.failed = true
	}
	return d, err
}

type watchedReader struct {
	r   io.Reader
	n   int64
	err error
}

func (w *watchedReader) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	w.n += int64(n)
	if err != nil {
		w.err = err
	}
	return n, err
}
