package pool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// simPool is a pool in memory with images that share contents.
func simPool(t testing.TB, size int64, images int, o Options) (*Pool, *simRegion) {
	t.Helper()
	r := newSimRegion(size, &faults{})
	p, err := Create(r, filepath.Join(t.TempDir(), "index"), o)
	if err != nil {
		t.Fatal(err)
	}
	p.index.db.NoSync = true
	t.Cleanup(func() { p.Close() })
	for i := range images {
		key := fmt.Sprintf("image%d", i)
		b := p.Begin()
		root := tree(put(t, b, random(1, 30_000)), put(t, b, random(uint64(10+i), 5_000)),
			put(t, b, random(2, 300_000)))
		note := root.Entries["file00000"]
		note.Mtime = daxfs.Time{Sec: int64(i), Nsec: 7}
		note.Xattrs = []daxfs.Xattr{{Name: "user.note", Value: []byte(key)}}
		root.Entries["link"] = &daxfs.Node{Mode: unix.S_IFLNK | 0o777, Target: "file00000"}
		root.Entries["null"] = &daxfs.Node{Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)}
		root.Entries["dir"] = tree(put(t, b, random(3, 100)))
		root.Entries["again"] = note
		if err := b.CommitLayer(ctx, key, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := p.AddImage(ctx, key, root, daxfs.Options{}); err != nil {
			t.Fatal(err)
		}
	}
	mustCheck(t, p)
	return p, r
}

func scrub(t testing.TB, p *Pool) (list []Damage) {
	t.Helper()
	if _, err := p.Scrub(ctx, ScrubOptions{}, func(d Damage) { list = append(list, d) }); err != nil {
		t.Fatal(err)
	}
	return list
}

// TestScrubFlips flips 1,000 bits of contents and of their padding: one scrub finds each.
func TestScrubFlips(t *testing.T) {
	for _, dax := range []Choice{No, Yes} {
		p, r := simPool(t, 32<<20, 4, Options{DAX: dax})
		if list := scrub(t, p); len(list) > 0 {
			t.Fatalf("before any flip: %+v", list)
		}
		rng := rand.New(rand.NewPCG(3, 4))
		all := p.readable()
		for range 500 {
			e := all[rng.IntN(len(all))]
			at, bit := e.off+rng.Int64N(e.span().Len), byte(1)<<rng.IntN(8)
			r.mem[at] ^= bit
			list := scrub(t, p)
			if len(list) != 1 || list[0].Off != e.off || len(list[0].Images)+len(list[0].Layers) == 0 {
				t.Fatalf("a flip at %d, in the extent at %d: %+v", at, e.off, list)
			}
			served(t, p, e)
			// Restore the bit for the next flip.
			r.mem[at] ^= bit
			p.mu.Lock()
			e.damaged = false
			p.damaged.Add(-1)
			p.list(e)
			p.mu.Unlock()
			if err := p.index.setRecord(kindDamaged, damagedKey(e), nil); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(p.hideDamaged(), p.showAll()); err != nil {
				t.Fatal(err)
			}
		}
		mustCheck(t, p)
	}
}

// showAll writes all entries of the slot table again.
func (p *Pool) showAll() error {
	for _, m := range p.images {
		if err := p.publishSlot(m); err != nil {
			return err
		}
	}
	return nil
}

// served fails the test if anybody could get the contents of a damaged extent.
func served(t *testing.T, p *Pool, e *extent) {
	t.Helper()
	root := tree(daxfs.Data{Off: e.off, Size: e.size, Sum: e.sum})
	if _, err := p.AddImage(ctx, "new", root, daxfs.Options{}); !errors.Is(err, ErrNotFound) {
		t.Fatalf("an image of damaged contents: %v", err)
	}
	cat, err := ReadCatalogue(p.region)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range p.Images() {
		listed := slices.ContainsFunc(cat.Images, func(c Image) bool { return c.Key == m.Key })
		if damaged := slices.Contains(p.images[m.Key].used, e); listed == damaged || damaged != p.ImageDamaged(m.Key) {
			t.Fatalf("image %q holds it: %v; the catalogue lists it: %v", m.Key, damaged, listed)
		}
	}
	if p.find(e.key()) == e || slices.Contains(p.equal(e.key()), e) || slices.Contains(p.heads[e.headKey()], e) {
		t.Fatal("damaged contents are still found by their digest")
	}
}

// TestCheckFlips flips 1,000 bits of metadata: Check finds each flip that a reader can notice.
func TestCheckFlips(t *testing.T) {
	silent := 0
	for _, o := range []Options{{}, {Windows: Yes, DAX: Yes}} {
		p, r := simPool(t, 32<<20, 4, o)
		spans := append(p.TreeRanges(), [2]int64{1024, 1152}) // the superblock
		for gen := range uint64(2) {
			spans = append(spans, [2]int64{headerOff(gen), headerOff(gen) + 96})
		}
		for _, m := range p.Images() {
			slot, entry := p.header.geo.SlotOff(m.Slot), entryOff(m.Slot)
			spans = append(spans, [2]int64{entry, entry + entrySize}, [2]int64{slot, slot + daxfs.SlotSize})
			if m.Segment > 0 {
				spans = append(spans, [2]int64{m.Window, m.Window + m.Segment})
			}
		}
		before := listing(t, p)
		rng := rand.New(rand.NewPCG(5, 6))
		for range 500 { // for each pool
			s := spans[rng.IntN(len(spans))]
			at, bit := s[0]+rng.Int64N(s[1]-s[0]), byte(1)<<rng.IntN(8)
			r.mem[at] ^= bit
			found := false
			if err := p.Check(ctx, func(Finding) bool { found = true; return false }); err != nil {
				t.Fatalf("a flip at %d: %v", at, err)
			}
			if !found {
				silent++
				now := strings.Split(listing(t, p), "\n")
				for i, line := range strings.Split(before, "\n") {
					if now[i] != line {
						t.Errorf("a flip at %d is not found and shows\n%s\nexpected\n%s", at, now[i], line)
					}
				}
			}
			r.mem[at] ^= bit
		}
		mustCheck(t, p)
	}
	t.Logf("%d flips are in bytes that nothing reads", silent)
}

// listing is everything that readers of a pool can see except contents.
func listing(t *testing.T, p *Pool) string {
	t.Helper()
	var b strings.Builder
	cat, err := ReadCatalogue(p.region)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&b, "%+v\n", cat)
	live, err := daxfs.OpenLive(p.region, p.region.Size())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range cat.Images {
		img, err := live.Image(m.Slot)
		if err != nil {
			t.Fatal(err)
		}
		list(t, &b, img)
		if m.Segment > 0 {
			if img, err = daxfs.Open(poolRange{p, m.Window}, m.WindowSize); err != nil {
				t.Fatal(err)
			}
			list(t, &b, img)
		}
	}
	return b.String()
}

func list(t *testing.T, b *strings.Builder, img *daxfs.FS) {
	err := img.Walk(func(path string, in daxfs.Inode) error {
		xs, err := in.Xattrs()
		target := ""
		if err == nil && in.IsSymlink() {
			target, err = in.Target()
		}
		fmt.Fprintf(b, "%q %d %o %d %d %d %v %d %d %q %q\n", path, in.Nid, in.Mode, in.UID, in.GID, in.Rdev, in.Mtime,
			in.Size, in.Off, target, xs)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// poolRange reads a range of a pool.
type poolRange struct {
	p   *Pool
	off int64
}

func (w poolRange) ReadAt(b []byte, off int64) (int, error) { return w.p.region.ReadAt(b, w.off+off) }

// TestDamaged follows damaged contents until they are gone and others took their place.
func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	r := openRegion(t, dir, 64<<20)
	index := filepath.Join(dir, "index")
	p, err := Create(r, index, Options{})
	if err != nil {
		t.Fatal(err)
	}
	small, large := random(1, 10_000), random(2, 3<<20)
	addImage(t, p, "a", small, large)
	addImage(t, p, "b", small)
	addImage(t, p, "c", random(3, 100))
	old := slices.Clone(p.images["a"].used)
	for _, e := range old {
		flip(p, e.off+e.size/2)
	}
	list := scrub(t, p)
	if len(list) != 2 || list[0].Found == "" || list[0].Found == list[0].Sum {
		t.Fatalf("scrub: %+v", list)
	}
	if again := scrub(t, p); len(again) > 0 {
		t.Errorf("found twice: %+v", again)
	}
	state := func() {
		t.Helper()
		both := func(d Damage) bool { return slices.Equal(d.Images, []string{"a", "b"}) }
		if d := p.Damaged(); len(d) != 2 || !slices.ContainsFunc(d, both) {
			t.Errorf("damaged: %+v", d)
		}
		for key, want := range map[string]bool{"a": true, "b": true, "c": false} {
			if p.ImageDamaged(key) != want || p.LayerDamaged(key) != want {
				t.Errorf("image %q: %v, layer: %v; want %v", key, p.ImageDamaged(key), p.LayerDamaged(key), want)
			}
		}
		findings := 0
		err := p.Check(ctx, func(f Finding) bool {
			if findings++; f.Rule != "pool.sum" || !f.Known {
				t.Errorf("check: %+v", f)
			}
			return true
		})
		if err != nil || findings != 2 {
			t.Errorf("%d findings, %v; want those two that are known", findings, err)
		}
	}
	state()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if p, err = Open(r, index, Options{}); err != nil {
		t.Fatal(err)
	}
	state()
	// The same contents get other places, whoever holds the damaged ones.
	b := p.Begin()
	for _, body := range [][]byte{small, large} {
		d := put(t, b, body)
		if slices.ContainsFunc(old, func(e *extent) bool { return e.off == d.Off }) {
			t.Errorf("contents of %d bytes are shared with damaged ones", len(body))
		}
	}
	b.Discard()
	state()
	for _, key := range []string{"a", "b"} {
		if err := errors.Join(p.RemoveImage(ctx, key), p.RemoveLayer(ctx, key)); err != nil {
			t.Fatal(err)
		}
	}
	if err := reap(p); err != nil {
		t.Fatal(err)
	}
	if d := p.Damaged(); len(d) != 0 {
		t.Errorf("damaged and free: %+v", d)
	}
	addImage(t, p, "a", small, large)
	if records, err := p.index.records(kindDamaged); err != nil || len(records) != 0 {
		t.Errorf("records of damage that is gone: %q, %v", records, err)
	}
	mustCheck(t, p)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if p, err = Open(r, index, Options{}); err != nil {
		t.Fatal(err)
	}
	if d := p.Damaged(); len(d) != 0 {
		t.Errorf("damaged after opening: %+v", d)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestDeadDamaged finds damage in dead contents that a put would revive.
func TestDeadDamaged(t *testing.T) {
	p := newTestPool(t, 64<<20)
	body := random(1, 10_000)
	addImage(t, p, "a", body)
	e := p.images["a"].used[0]
	if err := errors.Join(p.RemoveImage(ctx, "a"), p.RemoveLayer(ctx, "a")); err != nil {
		t.Fatal(err)
	}
	flip(p, e.off)
	if list := scrub(t, p); len(list) != 1 {
		t.Fatalf("damage %+v", list)
	}
	addImage(t, p, "a", body)
	if p.images["a"].used[0] == e {
		t.Error("damaged contents came back to life")
	}
	if err := reap(p); err != nil {
		t.Fatal(err)
	}
}

// TestScrubStops checks that a scrub ends with its context, even while it waits for its rate.
func TestScrubStops(t *testing.T) {
	p, _ := simPool(t, 32<<20, 2, Options{})
	short, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	done, err := p.Scrub(short, ScrubOptions{Rate: 1}, func(Damage) {})
	if !errors.Is(err, context.DeadlineExceeded) || done.Extents != 1 {
		t.Errorf("%+v, %v", done, err)
	}
}
