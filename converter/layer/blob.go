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
	// Size is the number of bytes of the tar, BytesRead that of the blob.
	Size, BytesRead int64
}

// FromBlob reads the blob of a layer, of whatever compression, to its end: read, hash, decompress, hash, parse, at
// the same time. It closes src. Contents go into s while the blob is not verified yet: when FromBlob fails, what was
// put is for the caller to drop.
//
// What spec says of the blob is verified. A blob that is not what spec says is reported as a *blob.MismatchError,
// also when its tar cannot be parsed. When s fails the rest of the blob is not read, and the error of s is returned.
func FromBlob(ctx context.Context, src io.ReadCloser, spec blob.Spec, s Store, lim Limits) (*Blob, error) {
	r, err := blob.NewReader(ctx, src, spec)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	watched := &watchedStore{Store: s}
	l, err := FromTar(ctx, r, watched, lim)
	if err != nil && (watched.failed || ctx.Err() != nil) {
		return nil, err // the error says nothing about the blob
	}
	if err := r.Finish(err); err != nil {
		return nil, err
	}
	return &Blob{Layer: l, DiffID: r.DiffID(), Size: r.Size(), BytesRead: r.BytesRead()}, nil
}

// watchedStore tells errors of a store from those of the reader that it reads from.
type watchedStore struct {
	Store
	failed bool
}

func (w *watchedStore) Put(ctx context.Context, size int64, r io.Reader) (daxfs.Data, error) {
	from := &watchedReader{r: r}
	d, err := w.Store.Put(ctx, size, from)
	if err != nil && (from.err == nil || from.n == size) { // a reader may say EOF along with the last byte
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
