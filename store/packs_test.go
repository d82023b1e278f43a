package store

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// newPackKit is newKit with a pool that ends with the kernel, so that packs are kept.
func newPackKit(t *testing.T, change func(*Config)) *kit {
	t.Helper()
	shm, err := os.MkdirTemp("/dev/shm", "storetest")
	if err != nil {
		t.Skipf("no memory for a pool that ends with the kernel: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(shm) })
	return newKit(t, func(c *Config) {
		c.Pool = Pool{Kind: region.KindTmpfs, Path: filepath.Join(shm, "pool"), Size: 64 << 20}
		c.Packs = true
		if change != nil {
			change(c)
		}
	})
}

// expectPacks fails the test unless the directory of packs holds exactly those of some layers.
func (k *kit) expectPacks(when string, ids ...digest.Digest) {
	k.t.Helper()
	entries, err := os.ReadDir(k.packs.dir)
	k.must(err)
	for _, id := range ids {
		if !k.packs.has(id) {
			k.t.Errorf("%s: layer %s has no pack", when, id)
		}
	}
	if len(entries) != len(ids) {
		k.t.Errorf("%s: the directory of packs holds %v, expected %d", when, entries, len(ids))
	}
}

// lose removes a layer from the pool, like a reboot.
func (k *kit) lose(key string) {
	k.t.Helper()
	k.decoded.drop(key)
	k.must(k.pool.RemoveLayer(k.t.Context(), key))
}

// eofReader calls atEnd when everything was read.
type eofReader struct {
	io.Reader
	atEnd func()
}

func (r *eofReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err == io.EOF && r.atEnd != nil {
		r.atEnd()
		r.atEnd = nil
	}
	return n, err
}

func (r *eofReader) Close() error { return nil }

// A layer is in the pool only once its pack is on disk: a caller is told of neither or of both.
func TestPackComesFirst(t *testing.T) {
	k := newPackKit(t, nil)
	ctx := t.Context()
	raw := makeTar(file{"a", random(1, 50_000)})
	b := blobOf(raw)
	away := k.packs.dir + ".away"
	fails := b
	fails.Open = func(context.Context) (io.ReadCloser, error) {
		return &eofReader{bytes.NewReader(raw), func() { k.must(os.Rename(k.packs.dir, away)) }}, nil
	}
	if _, err := k.AddBlob(ctx, fails); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a layer whose pack cannot be kept: %v", err)
	}
	k.expectLayers("without a pack")
	k.must(os.Rename(away, k.packs.dir))
	k.restart(nil)
	k.expectPacks("an unfinished pack after a restart")

	pinned := ""
	b.Pin = func(key string) {
		pinned = key
		k.expectLayers("pinned")
	}
	_, err := k.AddBlob(ctx, b)
	k.must(err)
	if pinned != BlobKey(b.DiffID) {
		t.Errorf("pinned was %q", pinned)
	}
	k.expectPacks("stored", b.DiffID)
	broken := blobOf(makeTar(file{"b", random(2, 5000)}))
	broken.DiffID = digest.FromString("another layer")
	if _, err := k.AddBlob(ctx, broken); err == nil {
		t.Error("a blob of another layer was stored")
	}
	k.expectPacks("refused", b.DiffID)
}

// A stored layer without its pack is read again: the next reboot would lose it.
func TestStoredLayerNeedsPack(t *testing.T) {
	k := newPackKit(t, nil)
	b := blobOf(makeTar(file{"a", random(1, 50_000)}))
	for range 2 {
		_, err := k.AddBlob(t.Context(), b)
		k.must(err)
		k.expectPacks("stored", b.DiffID)
		k.must(k.packs.remove(b.DiffID))
	}
}

// A sweep leaves the pack of a layer alone that is being read.
func TestSweepDuringRead(t *testing.T) {
	k := newPackKit(t, nil)
	raw := makeTar(file{"a", random(1, 50_000)})
	b := blobOf(raw)
	b.Open = func(context.Context) (io.ReadCloser, error) {
		return &eofReader{bytes.NewReader(raw), func() { k.must(k.Sweep(t.Context(), wants{}, true)) }}, nil
	}
	_, err := k.AddBlob(t.Context(), b)
	k.must(err)
	k.expectPacks("stored", b.DiffID)
}

// someBlobs is a content store of containerd.
type someBlobs map[digest.Digest][]byte

func (s someBlobs) Find(_ context.Context, _ string, id digest.Digest) ([]Found, error) {
	raw, ok := s[id]
	if !ok {
		return nil, nil
	}
	return []Found{{Namespace: "default", Desc: descriptor(ocispec.MediaTypeImageLayer, raw)}}, nil
}

func (s someBlobs) Open(_ context.Context, _ string, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(s[desc.Digest])), nil
}

// A streamed layer that is restored from containerd's blob has a pack again, and survives the next
// reboot without the blob. A pack that is damaged is replaced.
func TestRestoredLayerHasPack(t *testing.T) {
	blobs := someBlobs{}
	k := newPackKit(t, func(c *Config) { c.Blobs = blobs })
	ctx := t.Context()
	a := file{"a", random(1, 50_000)}
	b := blobOf(makeTar(a))
	st, err := k.AddBlob(ctx, b)
	k.must(err)
	restore := func(when string) error {
		t.Helper()
		k.lose(st.Key)
		_, err := k.ensure(ctx, Layer{Key: st.Key})
		if err == nil {
			k.expectPacks(when, b.DiffID)
		}
		return err
	}
	k.must(restore("from the pack"))
	good, err := os.ReadFile(k.packs.path(b.DiffID))
	k.must(err)
	bad := bytes.Clone(good)
	bad[1000] ^= 1
	for _, damage := range []func(){
		func() { k.must(k.packs.remove(b.DiffID)) },
		func() { k.must(os.WriteFile(k.packs.path(b.DiffID), bad, 0o600)) },
	} {
		damage()
		if err := restore("lost"); !errors.Is(err, ErrLost) {
			t.Errorf("without a copy: %v", err)
		}
		blobs[b.DiffID] = makeTar(a)
		_, err := k.ensure(ctx, Layer{Key: st.Key})
		k.must(err)
		delete(blobs, b.DiffID)
		if now, err := os.ReadFile(k.packs.path(b.DiffID)); err != nil || !bytes.Equal(now, good) {
			t.Errorf("the pack has %d bytes, %v; expected the blob", len(now), err)
		}
		k.must(restore("from the new pack"))
	}
	// A claimed layer is restored from its owner's blob each time: a pack would outlive the owner's claim.
	k.must(k.Sweep(ctx, wants{}, false))
	k.expectPacks("not needed")
	blobs[b.DiffID] = makeTar(a)
	_, err = k.ensure(ctx, Layer{Key: "dir/a", Claim: Claim{Namespace: "default", DiffID: b.DiffID}})
	k.must(err)
	k.expectPacks("claimed")
}

// A pool that survives a reboot needs no packs.
func TestDurablePoolHasNoPacks(t *testing.T) {
	k := newKit(t, func(c *Config) { c.Packs = true })
	k.stream(file{"a", random(1, 50_000)})
	if entries, err := os.ReadDir(filepath.Join(k.cfg.Root, "packs")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("packs %v, %v", entries, err)
	}
}
