package pool

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

var ctx = context.Background()

// readImage reads all files of an image at its slot, as a mount would.
func readImage(t testing.TB, r region.Region, m Image) map[string][]byte {
	t.Helper()
	files, err := imageFiles(r, m)
	if err != nil {
		t.Fatalf("image %q: %v", m.Key, err)
	}
	return files
}

func imageFiles(r region.Region, m Image) (map[string][]byte, error) {
	live, err := daxfs.OpenLive(r, r.Size())
	if err != nil {
		return nil, err
	}
	fsys, err := live.Image(m.Slot)
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{}
	err = fs.WalkDir(fsys, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		files[path], err = fs.ReadFile(fsys, path)
		return err
	})
	return files, err
}

func TestPutReadBack(t *testing.T) {
	p := newTestPool(t, 64<<20)
	bodies := [][]byte{
		{'x'}, random(1, 4096), random(2, 4097), random(3, smallMax), random(4, smallMax+1), random(5, 3<<20+17), {},
	}
	m := addImage(t, p, "a", bodies...)
	files := readImage(t, p.Region(), m)
	for i, want := range bodies {
		if got := files[treeName(i)]; !bytes.Equal(got, want) {
			t.Errorf("file %d: read %d bytes, expected the %d that were put", i, len(got), len(want))
		}
	}
	payload, err := p.Layer("a")
	if err != nil || string(payload) != "payload of a" {
		t.Errorf("payload %q, %v", payload, err)
	}
}

func treeName(i int) string {
	for name := range tree(make([]daxfs.Data, i+1)...).Entries {
		if name[len(name)-5:] == string([]byte{'0', '0', '0', byte('0' + i/10), byte('0' + i%10)}) {
			return name
		}
	}
	return ""
}

func TestDedup(t *testing.T) {
	p := newTestPool(t, 64<<20)
	for _, n := range []int{10, 5000, 3 << 20} {
		body := random(uint64(n), n)
		b := p.Begin()
		first := put(t, b, body)
		second := put(t, b, body)
		other := p.Begin()
		third := put(t, other, body)
		if first != second || first != third {
			t.Errorf("%d bytes: put at %v, %v and %v", n, first, second, third)
		}
		body[n-1]++
		if d := put(t, other, body); d.Off == first.Off {
			t.Errorf("%d bytes: contents that differ in the last byte share an extent", n)
		}
		b.Discard()
		other.Discard()
	}
	if u := p.Usage(); u.ExtentCount != 0 || u.Extents != 0 || u.Gaps != 1 {
		t.Errorf("after all batches were discarded: %+v", u)
	}
}

func TestReopen(t *testing.T) {
	dir := t.TempDir()
	r := openRegion(t, dir, 64<<20)
	index := filepath.Join(dir, "index")
	p, err := Create(r, index, Options{})
	if err != nil {
		t.Fatal(err)
	}
	bodies := [][]byte{random(1, 100), random(2, 5<<20)}
	m := addImage(t, p, "a", bodies...)
	uncommitted := p.Begin()
	put(t, uncommitted, random(3, 1<<20))
	before := p.Usage()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p, err = Open(r, index, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	again, err := p.Image("a")
	if err != nil || again.Slot != m.Slot || again.UUID != m.UUID {
		t.Errorf("image after reopen: %+v, %v; expected %+v", again, err, m)
	}
	after := p.Usage()
	if after.ExtentCount != 2 || after.Extents != before.Extents-1<<20 {
		t.Errorf("usage after reopen: %+v, before with an open batch: %+v", after, before)
	}
	files := readImage(t, r, again)
	if !bytes.Equal(files["file00001"], bodies[1]) {
		t.Error("contents differ after reopen")
	}
	mustCheck(t, p)
}

func TestHolders(t *testing.T) {
	p := newTestPool(t, 64<<20)
	body := random(1, 100_000)
	addImage(t, p, "a", body)
	if err := p.RemoveLayer(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if u := p.Usage(); u.ExtentCount != 1 {
		t.Fatalf("the image's extent is gone with the layer: %+v", u)
	}
	if _, err := p.Layer("a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("removed layer: %v", err)
	}
	if err := p.RemoveImage(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if err := p.RemoveImage(ctx, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("removing twice: %v, expected ErrNotFound", err)
	}
	if u := p.Usage(); u.ExtentCount != 0 || u.DeadCount != 1 {
		t.Errorf("contents that a kernel may have in memory are not dead but gone: %+v", u)
	}
	if err := reap(p); err != nil {
		t.Fatal(err)
	}
	if u := p.Usage(); u.ExtentCount != 0 || u.Dead != 0 || u.Gaps != 1 {
		t.Errorf("not all is free: %+v", u)
	}
}

func TestFull(t *testing.T) {
	p := newTestPool(t, 16<<20)
	b := p.Begin()
	defer b.Discard()
	body := random(1, 8<<20)
	put(t, b, body)
	before := p.Usage()
	_, err := b.Put(ctx, 7<<20, bytes.NewReader(random(2, 7<<20)))
	var full *FullError
	if !errors.As(err, &full) || !errors.Is(err, ErrFull) || full.Need != 7<<20 || full.Have >= full.Need {
		t.Fatalf("put into a full pool: %v", err)
	}
	if full.Unwrap() == nil { // containerd's errgrpc.ToGRPC does not survive nil
		t.Error("the error wraps nothing")
	}
	if after := p.Usage(); after != before {
		t.Errorf("a put that failed changed the pool from %+v to %+v", before, after)
	}
	put(t, b, body) // is there already: fits
}
