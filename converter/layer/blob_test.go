package layer_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// counted counts the bytes read and records the close.
type counted struct {
	io.Reader
	n      int
	closed bool
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += n
	return n, err
}

func (c *counted) Close() error { c.closed = true; return nil }

// brokenStore reads its input and then fails.
type brokenStore struct{ err error }

func (b brokenStore) Put(_ context.Context, size int64, r io.Reader) (daxfs.Data, error) {
	if _, err := io.CopyN(io.Discard, r, size); err != nil {
		return daxfs.Data{}, err
	}
	return daxfs.Data{}, b.err
}

func TestFromBlob(t *testing.T) {
	raw := Tar(Reg("a", "contents of a"), Reg("b", strings.Repeat("b", 10_000)))
	src := &counted{Reader: bytes.NewReader(raw)}
	b, err := layer.FromBlob(t.Context(), src, blob.Spec{Size: int64(len(raw))}, &Store{}, layer.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	size, want := int64(len(raw)), digest.FromBytes(raw)
	if b.DiffID != want || b.Size != size || b.BytesRead != size || b.Len() != 2 {
		t.Errorf("diff ID %s, %d of %d bytes, %d changes; expected %s, %d bytes and 2 changes",
			b.DiffID, b.BytesRead, b.Size, b.Len(), want, size)
	}
	if !src.closed {
		t.Error("the source is still open")
	}
}

// TestFromBlobErrors: a blob mismatch overrides an error of the parser, but not one of the store.
func TestFromBlobErrors(t *testing.T) {
	full := errors.New("no space")
	raw := Tar(Reg("a", "contents of a"), Reg("big", strings.Repeat("b", 64<<20)))
	truncated := raw[:len(raw)/2]
	spec := blob.Spec{Digest: digest.FromBytes(raw), DiffID: digest.FromBytes(raw), Size: int64(len(raw))}
	for name, c := range map[string]struct {
		blob  []byte
		spec  blob.Spec
		store layer.Store
		is    error
	}{
		"damaged":               {truncated, spec, &Store{}, blob.ErrMismatch},
		"no tar":                {bytes.Repeat([]byte("x"), 4096), blob.Spec{}, &Store{}, layer.ErrInvalid},
		"cut off":               {truncated, blob.Spec{}, &Store{}, io.ErrUnexpectedEOF},
		"full store":            {raw, spec, brokenStore{full}, full},
		"full store and damage": {truncated, spec, brokenStore{full}, full},
		"bad digest":            {raw, blob.Spec{Digest: "sha256:0"}, &Store{}, digest.ErrDigestInvalidLength},
	} {
		src := &counted{Reader: bytes.NewReader(c.blob)}
		_, err := layer.FromBlob(t.Context(), src, c.spec, c.store, layer.Limits{})
		if !errors.Is(err, c.is) {
			t.Errorf("%s: error %v, expected %v", name, err, c.is)
		}
		if !src.closed {
			t.Errorf("%s: the source is still open", name)
		}
		if c.is == full && src.n > len(c.blob)/2 {
			t.Errorf("%s: read %d of %d bytes, although none of them could be stored", name, src.n, len(c.blob))
		}
	}
}
