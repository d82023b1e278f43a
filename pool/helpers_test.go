package pool

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// openRegion makes a sparse file region of size bytes, which is closed at the end of the test.
func openRegion(t testing.TB, dir string, size int64) region.Region {
	t.Helper()
	r, err := region.Open(region.Config{
		Kind: region.KindFile, Path: filepath.Join(dir, "pool"),
		Size: size, Create: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// newTestPool makes an empty pool in a file. At the end of the test the pool must pass Check.
func newTestPool(t testing.TB, size int64) *Pool {
	t.Helper()
	dir := t.TempDir()
	p, err := Create(openRegion(t, dir, size), filepath.Join(dir, "index"),
		Options{Warn: func(err error) { t.Error("warning:", err) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		mustCheck(t, p)
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func mustCheck(t testing.TB, p *Pool) {
	t.Helper()
	err := p.Check(context.Background(), func(f Finding) bool {
		t.Errorf("check: %v", f)
		return true
	})
	if err != nil {
		t.Errorf("check: %v", err)
	}
}

// random returns n bytes that depend only on seed.
func random(seed uint64, n int) []byte {
	b := make([]byte, n+8)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := 0; i < n; i += 8 {
		v := r.Uint64()
		for k := range 8 {
			b[i+k] = byte(v >> (8 * k))
		}
	}
	return b[:n]
}

func put(t testing.TB, b *Batch, body []byte) daxfs.Data {
	t.Helper()
	d, err := b.Put(context.Background(), int64(len(body)), bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// tree makes a directory with one file for each element of files.
func tree(files ...daxfs.Data) *daxfs.Node {
	root := &daxfs.Node{Mode: unix.S_IFDIR | 0o755, Entries: map[string]*daxfs.Node{}}
	for i, d := range files {
		root.Entries[fmt.Sprintf("file%05d", i)] = &daxfs.Node{Mode: unix.S_IFREG | 0o644, Data: d}
	}
	return root
}

// addImage puts contents as a layer and makes an image of them with the same key.
func addImage(t testing.TB, p *Pool, key string, bodies ...[]byte) Image {
	t.Helper()
	b := p.Begin()
	defer b.Discard()
	var files []daxfs.Data
	for _, body := range bodies {
		files = append(files, put(t, b, body))
	}
	if err := b.CommitLayer(context.Background(), key, []byte("payload of "+key)); err != nil {
		t.Fatal(err)
	}
	m, err := p.AddImage(context.Background(), key, tree(files...), daxfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// reap frees dead contents as if nobody had ever mounted the pool.
func reap(p *Pool) error {
	dead, err := p.Erase(context.Background(), p.Dead())
	if err != nil {
		return err
	}
	return p.Free(context.Background(), dead)
}
