package pool

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// nidOf returns the inode of a file of an image.
func nidOf(t *testing.T, p *Pool, key, name string) uint64 {
	t.Helper()
	m, err := p.Image(key)
	if err != nil {
		t.Fatal(err)
	}
	live, err := daxfs.OpenLive(p.Region(), p.Region().Size())
	if err != nil {
		t.Fatal(err)
	}
	img, err := live.Image(m.Slot)
	if err != nil {
		t.Fatal(err)
	}
	in, err := img.Lookup(name, false)
	if err != nil {
		t.Fatal(err)
	}
	return in.Nid
}

// Contents that are put again before their inodes are erased come back to life with these inodes.
// Later they are stored anew, and nothing reads the old ones in their place.
func TestDeadComesBack(t *testing.T) {
	p := newTestPool(t, 64<<20)
	body := random(1, 100_000)
	remove := func() {
		t.Helper()
		if err := errors.Join(p.RemoveImage(ctx, "a"), p.RemoveLayer(ctx, "a")); err != nil {
			t.Fatal(err)
		}
		if u := p.Usage(); u.DeadCount != 1 || u.ExtentCount != 0 {
			t.Fatalf("usage after removing: %+v", u)
		}
	}
	addImage(t, p, "a", body)
	first := nidOf(t, p, "a", "file00000")
	at := p.images["a"].used[0].off
	remove()
	addImage(t, p, "a", body)
	if now := nidOf(t, p, "a", "file00000"); now != first {
		t.Errorf("the file is inode %d, expected %d again", now, first)
	}
	if u := p.Usage(); u.DeadCount != 0 || u.ExtentCount != 1 {
		t.Errorf("usage after putting again: %+v", u)
	}
	remove()
	dead := p.Dead()
	erased, err := p.Erase(ctx, dead)
	if err != nil || len(erased) != 1 || erased[0].Nids[0] != first {
		t.Fatalf("erase: %+v, %v", erased, err)
	}
	addImage(t, p, "a", body)
	if now := nidOf(t, p, "a", "file00000"); now == first {
		t.Error("an erased inode is in use again")
	}
	if p.images["a"].used[0].off == at {
		t.Error("contents are where a kernel may still read through an erased inode")
	}
	if u := p.Usage(); u.DeadCount != 1 || u.ExtentCount != 1 {
		t.Errorf("usage with a dead and a new copy: %+v", u)
	}
	if err := p.Free(ctx, erased); err != nil {
		t.Fatal(err)
	}
	if u := p.Usage(); u.DeadCount != 0 || u.ExtentCount != 1 {
		t.Errorf("usage after freeing: %+v", u)
	}
	// Live extents are never freed, whatever the caller passes.
	if err := p.Free(ctx, dead); err != nil {
		t.Fatal(err)
	}
	files := readImage(t, p.Region(), p.Images()[0])
	if !bytes.Equal(files["file00000"], body) {
		t.Error("contents of an image were freed")
	}
}

// Dead extents are still dead after a restart, and their space is not used.
func TestDeadSurvives(t *testing.T) {
	dir := t.TempDir()
	r := openRegion(t, dir, 17<<20)
	index := filepath.Join(dir, "index")
	p, err := Create(r, index, Options{})
	if err != nil {
		t.Fatal(err)
	}
	body := random(1, 7<<20)
	addImage(t, p, "a", body)
	addImage(t, p, "b", random(2, 1000))
	if err := errors.Join(p.RemoveImage(ctx, "a"), p.RemoveLayer(ctx, "a"), p.Close()); err != nil {
		t.Fatal(err)
	}
	if p, err = Open(r, index, Options{}); err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if u := p.Usage(); u.DeadCount != 1 || u.Dead != 7<<20 {
		t.Fatalf("usage after reopening: %+v", u)
	}
	mustCheck(t, p)
	b := p.Begin()
	defer b.Discard()
	if _, err := b.Put(ctx, 7<<20, bytes.NewReader(random(3, 7<<20))); !errors.Is(err, ErrFull) {
		t.Errorf("put where there is only space of the dead: %v", err)
	}
	turned, err := p.NothingMounted(ctx)
	if err != nil || turned {
		t.Errorf("nothing mounted: turned %t, %v; expected the same epoch", turned, err)
	}
	put(t, b, random(3, 7<<20))
	readImage(t, r, p.Images()[0])
	mustCheck(t, p)
}

// With DAX, other metadata and the second equal file of an image get a copy of the contents.
func TestDAXVariants(t *testing.T) {
	dir := t.TempDir()
	p, err := Create(openRegion(t, dir, 64<<20), filepath.Join(dir, "index"), Options{DAX: Yes, Windows: Yes})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	b := p.Begin()
	body := random(1, 3<<20+5)
	d := put(t, b, body)
	add := func(key string, files int, mtime int64) {
		t.Helper()
		list := make([]daxfs.Data, files)
		for i := range list {
			list[i] = d
		}
		root := tree(list...)
		for _, n := range root.Entries {
			n.Mtime.Sec = mtime
		}
		m, err := p.AddImage(ctx, key, root, daxfs.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for name, got := range readImage(t, p.Region(), m) {
			if !bytes.Equal(got, body) {
				t.Errorf("image %s: %s has other contents", key, name)
			}
		}
		mustCheck(t, p)
	}
	for _, c := range []struct {
		key     string
		files   int
		mtime   int64
		extents int
	}{{"one", 1, 0, 1}, {"two", 2, 0, 2}, {"again", 2, 0, 2}, {"later", 1, 9, 3}, {"later too", 2, 9, 4}} {
		add(c.key, c.files, c.mtime)
		if n := p.Usage().ExtentCount; n != c.extents {
			t.Errorf("image %s: %d extents, expected %d", c.key, n, c.extents)
		}
	}
	if nidOf(t, p, "one", "file00000") != nidOf(t, p, "two", "file00000") {
		t.Error("two images do not share an inode")
	}
	if turned, err := p.NothingMounted(ctx); err != nil || turned {
		t.Errorf("turned %t, %v; expected that images stay as long as nothing waits", turned, err)
	}
	for _, m := range p.Images() {
		if err := p.RemoveImage(ctx, m.Key); err != nil {
			t.Fatal(err)
		}
	}
	if u := p.Usage(); u.DeadCount != 3 || u.ExtentCount != 1 {
		t.Errorf("usage after removing all: %+v", u)
	}
	// The batch still holds the first one, whose inode lives as long as it does.
	add("one", 1, 0)
	b.Discard()
	if err := p.RemoveImage(ctx, "one"); err != nil {
		t.Fatal(err)
	}
	turned, err := p.NothingMounted(ctx)
	if err != nil || !turned {
		t.Errorf("turned %t, %v; expected a new epoch: addresses of mapped files wait", turned, err)
	}
	if u := p.Usage(); u.DeadCount != 0 || u.ExtentCount != 0 || u.Gaps != 1 || u.SlotsUsed != 0 {
		t.Errorf("usage in the new epoch: %+v", u)
	}
	mustCheck(t, p)
}

// TestEpoch uses up the slots again and again: an epoch turns only when nothing is mounted.
func TestEpoch(t *testing.T) {
	dir := t.TempDir()
	r := openRegion(t, dir, 64<<20)
	p, err := Create(r, filepath.Join(dir, "index"), Options{Slots: 8})
	if err != nil {
		t.Fatal(err)
	}
	uuids := map[[16]byte]bool{}
	for round := range 3 {
		uuids[p.UUID()] = true
		var full error
		for i := 0; full == nil; i++ {
			b := p.Begin()
			key := fmt.Sprint(round, ".", i)
			d := put(t, b, random(uint64(i), 5000))
			if i == 0 {
				if err := b.CommitLayer(ctx, key, nil); err != nil {
					t.Fatal(err)
				}
			}
			if _, full = p.AddImage(ctx, key, tree(d), daxfs.Options{}); full == nil && i > 0 {
				if err := p.RemoveImage(ctx, key); err != nil {
					t.Fatal(err)
				}
			}
			b.Discard()
		}
		var e *FullError
		if !errors.As(full, &e) || e.What != "slot" || e.Free != 8 {
			t.Fatalf("round %d: %v, expected no slot", round, full)
		}
		mustCheck(t, p)
		turned, err := p.NothingMounted(ctx)
		if err != nil || !turned {
			t.Fatalf("round %d: turned %t, %v", round, turned, err)
		}
		if u := p.Usage(); u.Images != 0 || u.SlotsUsed != 0 || u.ExtentCount != 1 || u.Dead != 0 {
			t.Errorf("usage in the new epoch: %+v", u)
		}
		mustCheck(t, p)
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if p, err = Open(r, filepath.Join(dir, "index"), Options{}); err != nil {
			t.Fatal(err)
		}
	}
	defer p.Close()
	if len(uuids) != 3 {
		t.Errorf("%d UUIDs in 3 epochs", len(uuids))
	}
}

// An epoch turns for the sake of slots only if removed images have more than half of them.
func TestEpochKeepsSlots(t *testing.T) {
	dir := t.TempDir()
	p, err := Create(openRegion(t, dir, 64<<20), filepath.Join(dir, "index"), Options{Slots: 8})
	noError(t, err)
	defer p.Close()
	for i := range 7 {
		addImage(t, p, fmt.Sprint(i), random(uint64(i), 5000))
	}
	for removed := range 6 {
		if removed > 0 {
			removeAll(t, p, fmt.Sprint(removed))
		}
		turned, err := p.NothingMounted(ctx)
		if err != nil || turned != (removed > 4) {
			t.Errorf("%d of 8 slots have removed images: turned %t, %v", removed, turned, err)
		}
	}
}

// Erased inodes of dead extents are no damage, also after a restart.
func TestErasedSurvives(t *testing.T) {
	p, r, index := leasedPool(t, &faults{})
	noError(t, errors.Join(p.RemoveImage(ctx, "a"), p.RemoveLayer(ctx, "a")))
	erased, err := p.Erase(ctx, p.Dead())
	if err != nil || len(erased) != 1 {
		t.Fatalf("erase: %+v, %v", erased, err)
	}
	mustCheck(t, p)
	noError(t, p.Close())
	p, err = Open(r, index, Options{})
	noError(t, err)
	defer p.Close()
	mustCheck(t, p)
	if dead := p.Dead(); len(dead) != 1 || dead[0].Off != erased[0].Off {
		t.Errorf("dead after a restart: %+v, expected %+v", dead, erased)
	}
}

// An epoch does not turn for the sake of metadata that an image still needs, however much that is.
func TestEpochKeepsLargeImage(t *testing.T) {
	p := newTestPool(t, 64<<20)
	root := tree()
	for i := range 2300 {
		root.Entries[fmt.Sprint(i)] = &daxfs.Node{
			Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("t", 4000), // a block each
		}
	}
	_, err := p.AddImage(ctx, "large", root, daxfs.Options{})
	noError(t, err)
	addImage(t, p, "small", random(1, 100))
	if turned, err := p.NothingMounted(ctx); err != nil || turned {
		t.Errorf("with the image: turned %t, %v", turned, err)
	}
	noError(t, p.RemoveImage(ctx, "large"))
	if turned, err := p.NothingMounted(ctx); err != nil || !turned {
		t.Errorf("without the image: turned %t, %v", turned, err)
	}
}

// A new epoch would not gain the inodes of empty files, so it would begin at each start of the daemon. It
// gains those of dead contents.
func TestEpochKeepsEmptyFiles(t *testing.T) {
	if testing.Short() {
		t.Skip("slow: makes images of 200,000 files")
	}
	p := newTestPool(t, 64<<20)
	b := p.Begin()
	add := func(key string, d daxfs.Data) {
		t.Helper()
		root := tree()
		for i := range 200_000 {
			root.Entries[fmt.Sprint(i)] = &daxfs.Node{Mode: unix.S_IFREG | 0o644, Data: d}
		}
		_, err := p.AddImage(ctx, key, root, daxfs.Options{})
		noError(t, err)
	}
	turns := func(when string, want bool) {
		t.Helper()
		if turned, err := p.NothingMounted(ctx); err != nil || turned != want {
			t.Errorf("%s: turned %t, %v; expected %t", when, turned, err, want)
		}
	}
	add("empty files", daxfs.Data{})
	addImage(t, p, "small", random(1, 100))
	turns("with an image of empty files", false)
	noError(t, p.RemoveImage(ctx, "empty files"))
	noError(t, p.RemoveImage(ctx, "small"))
	turns("without images", true)
	add("equal files", put(t, b, random(2, 100)))
	b.Discard()
	turns("with an image of equal files", false)
	noError(t, p.RemoveImage(ctx, "equal files"))
	turns("with dead contents", true)
}

// Erased inodes stay erased after a power loss: the space behind them may hold contents of others by then.
func TestEraseIsDurable(t *testing.T) {
	for name, erase := range map[string]func(p *Pool) error{
		"Erase": func(p *Pool) error {
			dead := p.Dead()
			slices.SortFunc(dead, func(a, b Dead) int { return cmp.Compare(a.Nids[0], b.Nids[0]) })
			dead[1], dead[2] = dead[2], dead[1] // the last is neither the first nor the last in the pool
			_, err := p.Erase(ctx, dead)
			return err
		},
		"NothingMounted": func(p *Pool) error {
			turned, err := p.NothingMounted(ctx)
			if turned {
				t.Error("the epoch has turned: nothing was tested")
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			p, r, _ := leasedPool(t, &faults{})
			removeAll(t, p, "a", "b")
			dead := p.Dead()
			erased := func() (n int) {
				live, err := daxfs.OpenLive(r.syncedClone(), r.Size())
				if err != nil {
					t.Fatal(err)
				}
				for _, d := range dead {
					if _, err := live.FS().Erased(d.Nids[0]); err == nil {
						n++
					}
				}
				return n
			}
			if n := erased(); n != 0 || len(dead) != 3 {
				t.Fatalf("before: %d of %d inodes are erased", n, len(dead))
			}
			if err := erase(p); err != nil || erased() != len(dead) {
				t.Errorf("%v; after a power loss: %d of %d inodes are erased", err, erased(), len(dead))
			}
		})
	}
}

// TestEpochFaults fails each operation of a new epoch in turn. If the index has the epoch and the region
// does not, the next image first writes the tree of the epoch, or fails.
func TestEpochFaults(t *testing.T) {
	unwritten := 0
	for at := 1; ; at++ {
		f := &faults{}
		r, index := newSimRegion(simSize, f), filepath.Join(fastDir(t), "index")
		p, err := Create(r, index, Options{Slots: 8})
		if err != nil {
			t.Fatal(err)
		}
		addImage(t, p, "a", bodies.a)
		b := p.Begin()
		d := put(t, b, bodies.a)
		p.index.fail = f.hit
		f.n, f.at = 0, at
		err = p.NewEpoch(ctx)
		finished := f.n < at
		if err != nil && !errors.Is(err, errFault) {
			t.Fatal(err)
		}
		if err != nil && len(p.Images()) == 0 {
			unwritten++
			f.n, f.at = 0, 1
			_, err := p.AddImage(ctx, "b", tree(d), daxfs.Options{})
			if n := len(p.Images()); !errors.Is(err, errFault) || n > 0 {
				t.Errorf("operation %d: an image without the tree of its epoch: %v, %d images", at, err, n)
			}
		}
		f.at = 0
		if _, err := p.AddImage(ctx, "b", tree(d), daxfs.Options{}); err != nil {
			t.Fatalf("operation %d: %v", at, err)
		}
		b.Discard()
		mustCheck(t, p)
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		if p, err = Open(r, index, Options{}); err != nil {
			t.Fatalf("operation %d: %v", at, err)
		}
		mustCheck(t, p)
		for _, m := range p.Images() {
			if files := readImage(t, r, m); !bytes.Equal(files["file00000"], bodies.a) {
				t.Errorf("operation %d: image %q has other contents", at, m.Key)
			}
		}
		p.Close()
		if finished || t.Failed() {
			break
		}
	}
	if unwritten == 0 {
		t.Error("no fault came between the index and the region")
	}
}

func TestRecords(t *testing.T) {
	dir := t.TempDir()
	r := openRegion(t, dir, 64<<20)
	p, err := Create(r, filepath.Join(dir, "index"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ kind, key, value string }{
		{"a", "x", "1"},
		{"a", "y", "2"},
		{"b", "x", "3"},
		{"a", "x", "4"},
	} {
		if err := p.SetRecord(step.kind, step.key, []byte(step.value)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(p.SetRecord("a", "y", nil), p.SetRecord("a", "none", nil)); err != nil {
		t.Fatal(err)
	}
	if err := p.SetRecord("", "x", nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("no kind: %v", err)
	}
	p.Close()
	if p, err = Open(r, filepath.Join(dir, "index"), Options{}); err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for kind, want := range map[string]string{"a": "map[x:4]", "b": "map[x:3]", "c": "map[]"} {
		got, err := p.Records(kind)
		text := map[string]string{}
		for k, v := range got {
			text[k] = string(v)
		}
		if err != nil || fmt.Sprint(text) != want {
			t.Errorf("records %s: %v, %v; expected %s", kind, text, err, want)
		}
	}
}
