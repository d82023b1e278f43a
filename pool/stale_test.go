package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// removeAll removes images with their layers of the same keys.
func removeAll(t *testing.T, p *Pool, keys ...string) {
	t.Helper()
	for _, key := range keys {
		noError(t, errors.Join(p.RemoveImage(ctx, key), p.RemoveLayer(ctx, key)))
	}
}

// The oldest dead contents come first, whatever order they have in the pool.
func TestDeadOldestFirst(t *testing.T) {
	p := newTestPool(t, 64<<20)
	for i, key := range []string{"a", "b", "c", "d"} {
		addImage(t, p, key, random(uint64(i), 1000+i))
	}
	removeAll(t, p, "c", "a", "d", "b")
	var sizes []int64
	for _, d := range p.Dead() {
		sizes = append(sizes, d.Size)
	}
	if fmt.Sprint(sizes) != "[1002 1000 1003 1001]" {
		t.Errorf("dead contents of %d bytes, expected the order in which they died", sizes)
	}
}

// A list of dead contents may be old when it is passed: what was put again since is left alone, and so are
// other contents that died at the same place.
func TestOldListOfDead(t *testing.T) {
	p := newTestPool(t, 64<<20)
	first, second := random(1, 5000), random(2, 5000)
	addImage(t, p, "a", first)
	addImage(t, p, "b", second)
	removeAll(t, p, "a", "b")
	old := p.Dead()
	intact := func() {
		t.Helper()
		for _, m := range p.Images() {
			if got := readImage(t, p.Region(), m)["file00000"]; !bytes.Equal(got, first) {
				t.Errorf("image %q has %d other bytes", m.Key, len(got))
			}
		}
		mustCheck(t, p)
	}
	if m := addImage(t, p, "again", first); len(old) != 2 || p.images[m.Key].used[0].off != old[0].Off {
		t.Fatalf("contents put again are not those of %+v: nothing is tested", old)
	}
	erased, err := p.Erase(ctx, old)
	if err != nil || len(erased) != 1 || erased[0].Off != old[1].Off {
		t.Errorf("erased %+v, %v; expected the second of %+v", erased, err, old)
	}
	intact()
	noError(t, p.Free(ctx, old))
	intact()
	if u := p.Usage(); u.ExtentCount != 1 || u.DeadCount != 0 {
		t.Errorf("%+v, expected that only the contents put again are left", u)
	}
	addImage(t, p, "c", random(3, 6000))
	removeAll(t, p, "c")
	if now := p.Dead(); len(now) != 1 || now[0].Off != old[1].Off {
		t.Fatalf("%+v died, expected other contents at the place of %+v: nothing is tested", now, old[1])
	}
	erased, err = p.Erase(ctx, old)
	if err != nil || len(erased) != 0 {
		t.Errorf("erased %+v, %v; expected nothing", erased, err)
	}
	noError(t, p.Free(ctx, old))
	if n := p.Usage().DeadCount; n != 1 {
		t.Errorf("%d dead contents are left, expected those that the list does not name", n)
	}
	intact()
}

// Contents that are put while they are being freed are stored anew: they do not come back to life.
func TestPutWhileFreeing(t *testing.T) {
	p := newTestPool(t, 64<<20)
	body := random(1, 5000)
	addImage(t, p, "a", body)
	removeAll(t, p, "a")
	held := holdWrites(t, p)
	ended := make(chan error, 2)
	go func() {
		_, err := p.NothingMounted(ctx)
		ended <- err
	}()
	<-held.writing // of an erased inode
	b := p.Begin()
	defer b.Discard()
	go func() {
		_, err := b.Put(ctx, int64(len(body)), bytes.NewReader(body))
		ended <- err
	}()
	left := 2
	select {
	case <-held.writing:
	case err := <-ended:
		left--
		t.Errorf("contents that are being freed came back to life: %v", err)
	}
	for left > 0 {
		select {
		case <-held.writing:
		case held.end <- nil:
		case err := <-ended:
			noError(t, err)
			left--
		}
	}
}

// punchedRegion calls before at the start of each punch.
type punchedRegion struct {
	region.Region
	before func()
}

func (r *punchedRegion) Punch(off, n int64) error {
	r.before()
	return r.Region.Punch(off, n)
}

// An epoch begins after all contents that are being freed: their space belongs to the old one.
func TestEpochWaitsForDiscard(t *testing.T) {
	p := newTestPool(t, 64<<20)
	punching, end := make(chan struct{}), make(chan struct{})
	below := p.region
	p.region = &punchedRegion{below, func() {
		close(punching)
		<-end
	}}
	b := p.Begin()
	put(t, b, random(1, 5000))
	discarded := make(chan struct{})
	go func() {
		defer close(discarded)
		b.Discard()
	}()
	<-punching
	p.region = below
	addImage(t, p, "a", random(2, 5000))
	began := make(chan error, 1)
	go func() { began <- p.NewEpoch(ctx) }()
	for gone := false; !gone; runtime.Gosched() {
		p.mu.Lock()
		gone = len(p.images) == 0
		p.mu.Unlock()
	}
	select {
	case err := <-began:
		t.Errorf("an epoch began while contents of the last one were being freed: %v", err)
		began <- err
	case <-time.After(10 * time.Millisecond): // enough for an epoch that does not wait
	}
	close(end)
	<-discarded
	noError(t, <-began)
	mustCheck(t, p)
}

// An empty file keeps its inode, also after contents beside it were freed and the pool was opened again.
func TestFreeKeepsEmptyFiles(t *testing.T) {
	dir := t.TempDir()
	r, index := openRegion(t, dir, 64<<20), filepath.Join(dir, "index")
	p, err := Create(r, index, Options{})
	noError(t, err)
	root := func(d daxfs.Data) *daxfs.Node {
		root := tree(d)
		root.Entries["empty"] = &daxfs.Node{Mode: unix.S_IFREG | 0o644}
		return root
	}
	b := p.Begin()
	_, err = p.AddImage(ctx, "a", root(put(t, b, random(1, 5000))), daxfs.Options{})
	noError(t, err)
	b.Discard()
	nid := nidOf(t, p, "a", "empty")
	noError(t, p.RemoveImage(ctx, "a"))
	noError(t, reap(p))
	noError(t, p.Close())
	p, err = Open(r, index, Options{})
	noError(t, err)
	defer p.Close()
	b = p.Begin()
	defer b.Discard()
	_, err = p.AddImage(ctx, "b", root(put(t, b, random(2, 5000))), daxfs.Options{})
	noError(t, err)
	if now := nidOf(t, p, "b", "empty"); now != nid {
		t.Errorf("the empty file is inode %d, expected %d again", now, nid)
	}
	mustCheck(t, p)
}

// A call whose context has ended changes nothing.
func TestCancelledChangesNothing(t *testing.T) {
	p := newTestPool(t, 64<<20)
	addImage(t, p, "a", random(1, 5000))
	addImage(t, p, "b", random(2, 5000))
	removeAll(t, p, "b")
	b := p.Begin()
	defer b.Discard()
	d := put(t, b, random(3, 5000))
	dead := p.Dead()
	stopped, stop := context.WithCancel(ctx)
	stop()
	usage, gen, uuid := p.Usage(), p.Generation(), p.UUID()
	for name, call := range map[string]func() error{
		"AddImage": func() error {
			_, err := p.AddImage(stopped, "c", tree(d), daxfs.Options{})
			return err
		},
		"CommitLayer": func() error { return b.CommitLayer(stopped, "c", nil) },
		"Erase": func() error {
			_, err := p.Erase(stopped, dead)
			return err
		},
		"Free":        func() error { return p.Free(stopped, dead) },
		"NewEpoch":    func() error { return p.NewEpoch(stopped) },
		"Put":         func() error { _, err := b.Put(stopped, 0, nil); return err },
		"Relist":      func() error { return p.Relist(stopped, "a") },
		"RemoveImage": func() error { return p.RemoveImage(stopped, "a") },
		"RemoveLayer": func() error { return p.RemoveLayer(stopped, "a") },
		"SetDocument": func() error { return p.SetDocument(stopped, "a", []byte("x")) },
	} {
		if err := call(); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v, expected %v", name, err, context.Canceled)
		}
		if u := p.Usage(); u != usage || p.Generation() != gen || p.UUID() != uuid || len(p.Layers()) != 1 {
			t.Errorf("%s: usage %+v, generation %d, layers %q; before %+v, %d", name, u, p.Generation(), p.Layers(),
				usage, gen)
		}
	}
	noError(t, b.CommitLayer(ctx, "c", nil))
}

// A closed pool refuses changes, and says why.
func TestClosedRefuses(t *testing.T) {
	r := newSimRegion(simSize, &faults{})
	p, err := Create(r, filepath.Join(fastDir(t), "index"), Options{})
	noError(t, err)
	addImage(t, p, "a", bodies.a)
	b := p.Begin()
	defer b.Discard()
	noError(t, p.Close())
	before := bytes.Clone(r.mem)
	for name, call := range map[string]func() error{
		"CommitLayer": func() error { return b.CommitLayer(ctx, "b", nil) },
		"NewEpoch":    func() error { return p.NewEpoch(ctx) },
		"NothingMounted": func() error {
			_, err := p.NothingMounted(ctx)
			return err
		},
		"Put": func() error {
			_, err := b.Put(ctx, int64(len(bodies.b)), bytes.NewReader(bodies.b))
			return err
		},
		"RemoveImage": func() error { return p.RemoveImage(ctx, "a") },
		"SetDocument": func() error { return p.SetDocument(ctx, "a", bodies.g) },
	} {
		if err := call(); !errors.Is(err, ErrClosed) || !bytes.Equal(r.mem, before) {
			t.Errorf("%s: %v, expected %v; the region changed: %t", name, err, ErrClosed, !bytes.Equal(r.mem, before))
		}
	}
	noError(t, p.Close())
}

// No epoch begins while an image is being added.
func TestEpochWaitsForImage(t *testing.T) {
	p := newTestPool(t, 64<<20)
	_, done, err := p.startAdding(ctx, "a")
	noError(t, err)
	uuid := p.UUID()
	if err := p.NewEpoch(ctx); !errors.Is(err, ErrBusy) || p.UUID() != uuid {
		t.Errorf("epoch while an image is added: %v, another epoch: %t", err, p.UUID() != uuid)
	}
	done()
	if err := p.NewEpoch(ctx); err != nil || p.UUID() == uuid {
		t.Errorf("epoch afterwards: %v, another epoch: %t", err, p.UUID() != uuid)
	}
}
