package store

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A stored layer is reused only for a blob from which the store once read it; a named diff ID proves
// nothing.
func TestStoredLayerNeedsProof(t *testing.T) {
	k := newKit(t, nil)
	ctx := t.Context()
	raw := makeTar(file{"a", random(1, 5000)})
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, err := w.Write(raw)
	k.must(errors.Join(err, w.Close()))
	b := blobOf(raw)
	b.Digest, b.MediaType = digest.FromBytes(packed.Bytes()), ocispec.MediaTypeImageLayerGzip
	b.Size, b.Verify = int64(packed.Len()), true
	b.Open = func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(packed.Bytes())), nil
	}
	wrong := b
	wrong.Digest = digest.FromString("another blob")
	if _, err := k.AddBlob(ctx, wrong); err == nil || len(k.pool.Layers()) > 0 {
		t.Errorf("a blob with another digest: %v, layers %q", err, k.pool.Layers())
	}
	_, err = k.AddBlob(ctx, b)
	k.must(err)
	k.restart(nil)
	// Callers that can open the blob get the layer without reading it.
	unread := b
	unread.Open = func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(iotest.ErrReader(errors.New("read again"))), nil
	}
	if _, err := k.AddBlob(ctx, unread); err != nil {
		t.Errorf("the same blob: %v", err)
	}
	// All others have to bring the bytes.
	other := blobOf(makeTar(file{"b", random(2, 5000)}))
	other.DiffID = b.DiffID
	if st, err := k.AddBlob(ctx, other); err == nil {
		t.Errorf("another blob with the diff ID got layer %q", st.Key)
	}
	unread.Open = func(context.Context) (io.ReadCloser, error) { return nil, errors.New("no such blob") }
	if st, err := k.AddBlob(ctx, unread); err == nil {
		t.Errorf("a caller without the blob got layer %q", st.Key)
	}
}

// A layer is pinned whenever a caller gets it: if its diff ID is not known before, and if it was stored.
func TestLayerIsPinned(t *testing.T) {
	k := newKit(t, nil)
	b := blobOf(makeTar(file{"a", random(1, 5000)}))
	known := b.DiffID
	for _, id := range []digest.Digest{"", known} {
		pinned := ""
		b.DiffID, b.Pin = id, func(key string) { pinned = key }
		_, err := k.AddBlob(t.Context(), b)
		k.must(err)
		if pinned != BlobKey(known) {
			t.Errorf("expected diff ID %q: pinned is %q", id, pinned)
		}
	}
}
