package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// TestTenImagesShareBase puts ten images with a common base into a pool. It compares the pool's disk
// usage with the distinct contents, rounded to pages, plus metadata.
func TestTenImagesShareBase(t *testing.T) {
	r, dir := tmpfsRegion(t, 512<<20)
	p, err := Create(r, filepath.Join(dir, "index"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	rng := rand.New(rand.NewPCG(5, 5))
	var distinct int64
	body := func(n int) []byte {
		distinct += alloc.RoundUnit(int64(n))
		return random(rng.Uint64(), n)
	}
	var base [][]byte
	for range 400 {
		base = append(base, body(1+rng.IntN(60_000)))
	}
	base = append(base, body(9<<20), body(2<<20), body(5<<20+1))
	for i := range 10 {
		bodies := append([][]byte{}, base...)
		for range 20 {
			bodies = append(bodies, body(1+rng.IntN(100_000)))
		}
		addImage(t, p, fmt.Sprint("image ", i), bodies...)
	}
	mustCheck(t, p)
	var st unix.Stat_t
	if err := unix.Stat(r.Info().Path, &st); err != nil {
		t.Fatal(err)
	}
	u := p.Usage()
	if u.Extents != distinct {
		t.Errorf("extents take %d bytes, distinct contents %d", u.Extents, distinct)
	}
	// Metadata is the head and the runs; the rest of the tree area takes no memory.
	meta := u.Head + u.Tree
	taken, limit := st.Blocks*512, distinct*103/100+meta
	t.Logf("taken %d KiB for %d KiB of distinct contents (ratio %.4f) and %d KiB of metadata, unshared %d KiB",
		taken>>10, distinct>>10,
		float64(taken-meta)/float64(distinct), meta>>10, u.Unshared>>10)
	if taken > limit {
		t.Errorf("the pool takes %d bytes, expected at most %d", taken, limit)
	}
	if u.Unshared < 7*u.ImageExtents || u.ImageExtents != distinct {
		t.Errorf("ten images would take %d bytes apart and take %d", u.Unshared, u.ImageExtents)
	}
	for i := range 10 {
		iu, err := p.ImageUsage(fmt.Sprint("image ", i))
		if err != nil || iu.Shared < iu.Extents*9/10 {
			t.Errorf("image %d: %+v, %v", i, iu, err)
		}
	}
}

// TestConcurrent puts contents and adds and removes layers and images from many goroutines.
func TestConcurrent(t *testing.T) {
	p := newTestPool(t, 128<<20)
	shared := [][]byte{random(1, 10), random(2, 40_000), random(3, smallMax+9), random(4, 2<<20)}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 0))
			for i := range 12 {
				key := fmt.Sprintf("%d.%d", g, i)
				if i%3 == 0 {
					key = fmt.Sprint("same ", i) // several goroutines add it
				}
				bodies := append([][]byte{random(uint64(1000+i), 5000)}, shared[:1+rng.IntN(len(shared))]...)
				if err := concurrentStep(p, rng, key, bodies); err != nil {
					t.Errorf("%s: %v", key, err)
				}
			}
		})
	}
	wg.Wait()
	for _, key := range p.Layers() {
		if err := p.RemoveLayer(ctx, key); err != nil {
			t.Error(err)
		}
	}
	for _, m := range p.Images() {
		readImage(t, p.Region(), m)
		if err := p.RemoveImage(ctx, m.Key); err != nil {
			t.Error(err)
		}
	}
	if err := reap(p); err != nil {
		t.Error(err)
	}
	if u := p.Usage(); u.ExtentCount != 0 || u.Dead != 0 || u.Gaps != 1 {
		t.Errorf("after removing all: %+v", u)
	}
}

// TestPutAtOnce puts the same contents from many goroutines at once: one of them stores them.
func TestPutAtOnce(t *testing.T) {
	p := newTestPool(t, 256<<20)
	for i := range 20 {
		body := random(uint64(i), []int{100, smallMax, smallMax + 1, 1 << 20}[i%4])
		start := make(chan struct{})
		places := make([]int64, 8)
		batches := make([]*Batch, len(places))
		var wg sync.WaitGroup
		for g := range places {
			batches[g] = p.Begin()
			wg.Go(func() {
				<-start
				d, err := batches[g].Put(ctx, int64(len(body)), bytes.NewReader(body))
				if err != nil {
					t.Error(err)
				}
				places[g] = d.Off
			})
		}
		close(start)
		wg.Wait()
		for _, off := range places {
			if off != places[0] {
				t.Errorf("%d bytes are at %d", len(body), places)
				break
			}
		}
		if n := p.Usage().ExtentCount; n != 1 {
			t.Errorf("%d extents, expected 1", n)
		}
		for _, b := range batches {
			b.Discard()
		}
	}
}

func concurrentStep(p *Pool, rng *rand.Rand, key string, bodies [][]byte) error {
	b := p.Begin()
	defer b.Discard()
	files := make([]daxfs.Data, len(bodies))
	errs := make([]error, len(bodies))
	var wg sync.WaitGroup
	for i, body := range bodies {
		wg.Go(func() { files[i], errs[i] = b.Put(ctx, int64(len(body)), bytes.NewReader(body)) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// The image first: another with the same key may exist, whose layer holds other extents.
	if _, err := p.AddImage(ctx, key, tree(files...), daxfs.Options{}); err != nil {
		return err
	}
	if err := b.CommitLayer(ctx, key, []byte(key)); err != nil {
		return err
	}
	if rng.IntN(2) == 0 {
		if err := p.RemoveImage(ctx, key); err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	_ = p.Usage()
	return nil
}

// slowReader returns its bytes on command.
type slowReader struct {
	io.Reader
	gate chan struct{}
}

func (r *slowReader) Read(b []byte) (int, error) {
	<-r.gate
	return r.Reader.Read(b)
}

func TestPutErrors(t *testing.T) {
	p := newTestPool(t, 64<<20)
	b := p.Begin()
	defer b.Discard()
	for _, n := range []int{100, 3 << 20} {
		if _, err := b.Put(ctx, int64(n), bytes.NewReader(make([]byte, n-1))); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d bytes, one missing: %v", n, err)
		}
		cancelled, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := b.Put(cancelled, int64(n), bytes.NewReader(make([]byte, n))); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
	}
	cancelled, cancel := context.WithCancel(ctx)
	gate := make(chan struct{})
	go func() {
		gate <- struct{}{}
		cancel()
		close(gate)
	}()
	if _, err := b.Put(cancelled, 3<<20, &slowReader{bytes.NewReader(random(1, 3<<20)), gate}); !errors.Is(err,
		context.Canceled) {
		t.Errorf("cancelled while reading: %v", err)
	}
	if _, err := b.Put(ctx, -1, nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("negative size: %v", err)
	}
	if u := p.Usage(); u.ExtentCount != 0 || u.Gaps != 1 {
		t.Errorf("puts that failed have left %+v", u)
	}
	d := put(t, b, random(1, 10))
	if err := b.CommitLayer(ctx, "", nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("empty key: %v", err)
	}
	if err := b.CommitLayer(ctx, "k", nil); err != nil {
		t.Fatal(err)
	}
	if err := b.CommitLayer(ctx, "k", nil); !errors.Is(err, ErrClosed) {
		t.Errorf("commit twice: %v", err)
	}
	if _, err := b.Put(ctx, 1, bytes.NewReader([]byte{1})); !errors.Is(err, ErrClosed) {
		t.Errorf("put after commit: %v", err)
	}
	if n := p.Usage().ExtentCount; n != 1 {
		t.Errorf("a put after commit has left %d extents, expected 1", n)
	}
	d.Sum[0]++
	if _, err := p.AddImage(ctx, "image", tree(d), daxfs.Options{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("image of contents that are not there: %v", err)
	}
	if _, err := p.AddImage(ctx, "image", &daxfs.Node{}, daxfs.Options{}); !errors.Is(err, daxfs.ErrInvalid) {
		t.Errorf("image of no tree: %v", err)
	}
	if len(p.Images()) != 0 || p.Usage().Segments != 0 {
		t.Error("images that failed are there")
	}
}

// TestLargeDivergesLate puts large contents that begin alike: that part is compared, then copied.
func TestLargeDivergesLate(t *testing.T) {
	for range 1 {
		r := newSimRegion(64<<20, &faults{})
		p, err := Create(r, filepath.Join(t.TempDir(), "index"), Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		first := random(1, 3<<20)
		bodies := [][]byte{first}
		for _, at := range []int{0, chunk - 1, chunk, 2<<20 + 5, 3<<20 - 1} {
			body := bytes.Clone(first)
			body[at] ^= 1
			bodies = append(bodies, body)
		}
		bodies = append(bodies, bytes.Clone(bodies[2]))
		m := addImage(t, p, "a", bodies...)
		files := readImage(t, r, m)
		for i, want := range bodies {
			if !bytes.Equal(files[fmt.Sprintf("file%05d", i)], want) {
				t.Errorf("file %d differs", i)
			}
		}
		if n := p.Usage().ExtentCount; n != len(bodies)-1 {
			t.Errorf("%d extents, expected %d", n, len(bodies)-1)
		}
		mustCheck(t, p)
	}
}

// TestMetaFull fills the space for metadata, and the slots: nothing of the image may stay.
func TestMetaFull(t *testing.T) {
	for what, c := range map[string]struct {
		o    Options
		size int64
		fill int // bytes of contents
	}{
		"window segment": {Options{Windows: Yes}, 12 << 20, 8 << 20},
		"tree area":      {Options{}, 8 << 20, 6 << 20},
		"slot":           {Options{Slots: 2}, 64 << 20, 0},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			p, err := Create(openRegion(t, dir, c.size), filepath.Join(dir, "index"), c.o)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			b := p.Begin()
			defer b.Discard()
			d := put(t, b, random(4, 100))
			for i := 0; i < c.fill; i += 2 << 20 {
				if _, err := b.Put(ctx, 2<<20, bytes.NewReader(random(uint64(100+i), 2<<20))); err != nil &&
					!errors.Is(err, ErrFull) {
					t.Fatal(err)
				}
			}
			many := make([]daxfs.Data, 30_000)
			var before Usage
			for i := 0; ; i++ {
				before = p.Usage()
				for k := range many { // inodes that no other image has: each takes room
					many[k] = daxfs.Data{}
				}
				root := tree(append(many, d)...)
				for _, n := range root.Entries {
					n.Mtime.Sec = int64(i)
				}
				if what != "tree area" {
					root = tree(d)
				}
				if _, err = p.AddImage(ctx, fmt.Sprint(i), root, daxfs.Options{}); err != nil {
					break
				}
			}
			var full *FullError
			if !errors.As(err, &full) || full.What != what {
				t.Fatalf("%v, expected a full pool: %s", err, what)
			}
			if after := p.Usage(); after != before {
				t.Errorf("usage %+v, before %+v", after, before)
			}
			mustCheck(t, p)
		})
	}
}

func TestWipedAndForeign(t *testing.T) {
	dir := t.TempDir()
	r := openRegion(t, dir, 64<<20)
	index := filepath.Join(dir, "index")
	if _, err := Open(r, index, Options{}); !errors.Is(err, ErrWiped) {
		t.Errorf("open of an empty region: %v, expected ErrWiped", err)
	}
	p, err := Create(r, index, Options{})
	if err != nil {
		t.Fatal(err)
	}
	addImage(t, p, "a", random(1, 100))
	copyFile(t, index, filepath.Join(dir, "old"))
	addImage(t, p, "b", random(2, 100))
	id := p.ID()
	p.Close()
	if _, err := Create(r, filepath.Join(dir, "other"), Options{}); !errors.Is(err, ErrForeign) {
		t.Errorf("create over a pool: %v, expected ErrForeign", err)
	}
	if _, err := Reset(r, index, Options{}); !errors.Is(err, ErrForeign) {
		t.Errorf("reset of a pool that is fine: %v, expected ErrForeign", err)
	}
	for _, other := range []string{"old", "missing"} {
		if _, err := Open(r, filepath.Join(dir, other), Options{}); !errors.Is(err, ErrForeign) {
			t.Errorf("open with the index %q: %v, expected ErrForeign", other, err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "junk"), random(1, 65536), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(r, filepath.Join(dir, "junk"), Options{}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("open with an index that is none: %v, expected ErrCorrupt", err)
	}
	if err := r.Punch(0, r.Size()); err != nil { // a reboot
		t.Fatal(err)
	}
	if _, err := Open(r, index, Options{}); !errors.Is(err, ErrWiped) {
		t.Errorf("open of a wiped pool: %v, expected ErrWiped", err)
	}
	p, err = Reset(r, index, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Images()) != 0 || len(p.Layers()) != 0 || p.ID() == id {
		t.Error("a wiped pool remembers")
	}
	mustCheck(t, p)
	p.Close()
	if err := r.Punch(0, r.Size()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.WriteAt([]byte("XFSB"), 0); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func() (*Pool, error){
		"open":  func() (*Pool, error) { return Open(r, index, Options{}) },
		"reset": func() (*Pool, error) { return Reset(r, index, Options{}) },
	} {
		if _, err := f(); !errors.Is(err, ErrForeign) || !bytes.Contains([]byte(err.Error()), []byte("XFS")) {
			t.Errorf("%s of a region with a filesystem: %v", name, err)
		}
	}
}

func TestTwoOwners(t *testing.T) {
	dir := t.TempDir()
	index := filepath.Join(dir, "index")
	p, err := Create(openRegion(t, dir, 64<<20), index, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	second, err := region.Open(region.Config{Kind: region.KindFile, Path: filepath.Join(dir, "pool")})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	var busy *region.BusyError
	if _, err := Open(second, index, Options{}); !errors.As(err, &busy) || busy.PID != os.Getpid() {
		t.Errorf("second owner of the region: %v", err)
	}
	elsewhere := t.TempDir()
	if _, err := Create(openRegion(t, elsewhere, 64<<20), index, Options{Force: true}); !errors.As(err, &busy) ||
		busy.PID != os.Getpid() {
		t.Errorf("second owner of the index: %v", err)
	}
}

// TestCheckFinds makes one kind of damage after the other.
func TestCheckFinds(t *testing.T) {
	for rule, damage := range map[string]func(p *Pool, m Image){
		"pool.sum":       func(p *Pool, m Image) { flip(p, p.images["a"].used[0].off+5) },
		"pool.tail":      func(p *Pool, m Image) { flip(p, p.images["a"].used[0].off+101) },
		"pool.catalogue": func(p *Pool, m Image) { flip(p, entryOff(m.Slot)+30) },
		"pool.slot":      func(p *Pool, m Image) { flip(p, p.header.geo.SlotOff(m.Slot)+9) },
		"pool.image":     func(p *Pool, m Image) { flip(p, p.header.geo.NidOff(p.images["a"].used[0].firstNid)+24) },
		"pool.header":    func(p *Pool, m Image) { flip(p, headerOff(p.header.generation)+40) },
		"pool.index":     func(p *Pool, m Image) { _ = p.index.removeLayer("a") },
		"pool.refs":      func(p *Pool, m Image) { p.images["a"].used[0].refs = 1 },
		"pool.leak":      func(p *Pool, m Image) { _, _ = p.space.Extent(4096) },
		"pool.overlap":   func(p *Pool, m Image) { p.space.FreeExtent(p.images["a"].used[0].off, 4096) },
		"live.":          func(p *Pool, m Image) { flip(p, 1024) },
		"window.":        func(p *Pool, m Image) { flip(p, m.Window+1024) },
		"pool.inode":     func(p *Pool, m Image) { flip(p, p.header.geo.NidOff(p.images["a"].used[0].firstNid)+16) },
	} {
		t.Run(rule, func(t *testing.T) {
			dir := t.TempDir()
			p, err := Create(openRegion(t, dir, 64<<20), filepath.Join(dir, "index"), Options{Windows: Yes})
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			addImage(t, p, "b", random(2, 100)) // a pool that has freed space
			removeAll(t, p, "b")
			noError(t, p.NewEpoch(ctx))
			addImage(t, p, "b", random(2, 100))
			removeAll(t, p, "b")
			noError(t, reap(p))
			m := addImage(t, p, "a", random(1, 100))
			mustCheck(t, p)
			damage(p, m)
			found := false
			err = p.Check(ctx, func(f Finding) bool {
				found = found || len(f.Rule) >= len(rule) && f.Rule[:len(rule)] == rule
				return true
			})
			if err != nil || !found {
				t.Errorf("not found, %v", err)
			}
		})
	}
}

func flip(p *Pool, off int64) {
	b := make([]byte, 1)
	_, _ = p.region.ReadAt(b, off)
	b[0] ^= 0xff
	_, _ = p.region.WriteAt(b, off)
}
