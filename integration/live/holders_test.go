package live

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool"
)

var holderPlaces = []place{
	{fs: "ext4", driver: "erofs-file", size: 96 << 20, disk: 160 << 20, shape: "reuse"},
	{fs: "tmpfs", driver: "erofs-loop", size: 96 << 20, shape: "reuse"},
	{fs: "ext4", driver: "fuse", size: 96 << 20, disk: 160 << 20, shape: "reuse"},
}

// Held images are removed, and their space is reused at once by images with recognizable bytes.
// Holders read continuously: they see their own bytes, or, if they hold only a name, perhaps an error.
func TestHolders(t *testing.T) {
	for _, pl := range holderPlaces {
		for _, byHand := range []bool{false, true} {
			name := pl.String() + " by containers"
			if byHand {
				name = pl.String() + " by hand"
			}
			t.Run(name, func(t *testing.T) {
				seed := newSeed(t)
				steps := times(t, 200)
				pl.slots = steps + 100
				watchKernel(t)
				h := newHouse(t, newBed(t, pl, seed))
				h.byHand, h.evicted = byHand, byHand
				h.run(t, steps)
			})
		}
	}
}

// house is a bed with holders, and a daemon's knowledge of them.
type house struct {
	*bed
	over    string
	group   *cgroup
	workers []*worker
	rnd     *rand.Rand

	// byHand allows all ways to hold; otherwise all holders have overlays that the snapshotter knows.
	byHand bool
	// evicted is package store's knowledge after it has seen a mount made by hand.
	evicted bool

	next   int // image
	images map[int]*tenancy
	holds  int // the last name of one

	mu   sync.Mutex
	held []*held

	removed, waited, freed, checks, lost atomic.Int64
	underHolder                          int // images removed while somebody held them
}

// tenancy is an image.
type tenancy struct {
	dir    string
	uppers []string // overlays of the snapshotter
}

// held is a worker's holding.
type held struct {
	id, n int
	w     *worker
	how   grasp
	over  string
	gone  atomic.Bool // the image was, or is being, removed
}

func newHouse(t *testing.T, b *bed) *house {
	t.Helper()
	h := &house{
		bed: b, over: t.TempDir(), group: newCgroup(t, 160<<20), rnd: rand.New(rand.NewPCG(b.seed, 3)),
		images: map[int]*tenancy{},
	}
	mustMountFS(t, "tmpfs", h.over)
	for range 2 {
		h.workers = append(h.workers, newWorker(t, h.group))
	}
	return h
}

// atOnce is the number of images in the pool.
const atOnce = 8

func (h *house) run(t *testing.T, steps int) {
	done := make(chan struct{})
	var checking sync.WaitGroup
	checking.Go(func() { h.checkAll(t, done) })
	ctx := t.Context()
	for i := 0; i < steps && !t.Failed(); i++ {
		var err error
		switch h.rnd.IntN(5) {
		case 0, 1:
			err = h.settle(ctx)
		case 2:
			err = h.grab(t)
		case 3:
			err = h.letGo()
		case 4:
			err = h.evict(ctx)
		}
		if err == nil && i%3 == 0 {
			err = h.sweep(ctx)
		}
		if h.evicted && i%10 == 0 {
			h.group.squeeze()
		}
		if err != nil {
			t.Errorf("step %d: %v", i, err)
		}
	}
	close(done)
	checking.Wait()
	if t.Failed() {
		return
	}
	h.empty(t)
	t.Logf("%d images of %d removed, %d of them while held; %d checks of holders; %d times a name did not open any "+
		"more; %d extents freed, an extent was found in use %d times",
		h.removed.Load(), h.next, h.underHolder, h.checks.Load(), h.lost.Load(), h.freed.Load(), h.waited.Load())
	few := h.checks.Load() < int64(steps)/10 || h.byHand && (h.underHolder == 0 || h.waited.Load() == 0)
	if few && !testing.Short() {
		t.Error("too little was held for this to be a test")
	}
}

// settle publishes an image in freed space.
func (h *house) settle(ctx context.Context) error {
	if len(h.images) >= atOnce {
		return h.evict(ctx)
	}
	n := h.next
	dir, err := h.publish(ctx, n)
	if errors.Is(err, pool.ErrFull) {
		return h.sweep(ctx)
	}
	if err != nil {
		return err
	}
	h.next++
	h.images[n] = &tenancy{dir: dir}
	return nil
}

func (h *house) any() (int, *tenancy) {
	if len(h.images) == 0 {
		return 0, nil
	}
	var all []int
	for n := range h.images {
		all = append(all, n)
	}
	slices.Sort(all)
	n := all[h.rnd.IntN(len(all))]
	return n, h.images[n]
}

// grasp returns a random way to hold.
func (h *house) grasp() grasp {
	g := grasp{
		Namespace: h.rnd.IntN(3) == 0, Lazy: h.rnd.IntN(2) == 0, Mount: "overlay",
		Thing: []string{"fd", "map", "cwd", "dirfd", "path"}[h.rnd.IntN(5)],
	}
	if h.byHand {
		g.Lazy = h.rnd.IntN(6) > 0
		kinds := []string{"own", "overlay", "overlay", "lowers", "lowers", "bind", "bind", "idmapped", "idmapped"}
		if h.driver == "fuse" {
			kinds = kinds[:7] // it has no mapped owners
		}
		g.Mount = kinds[h.rnd.IntN(len(kinds))]
	}
	return g
}

// grab makes a worker hold an image.
func (h *house) grab(t *testing.T) error {
	n, img := h.any()
	if img == nil {
		return nil
	}
	// An attempt to remove the image may have unmounted it.
	m, err := h.p.Image(key(n))
	if err != nil {
		return err
	}
	if img.dir, err = h.mount(t.Context(), m); err != nil {
		return err
	}
	h.holds++
	x := &held{
		id: h.holds, n: n, w: h.workers[h.holds%len(h.workers)], how: h.grasp(),
		over: filepath.Join(h.over, fmt.Sprint(h.holds)),
	}
	if x.how.Mount == "overlay" && !h.byHand {
		img.uppers = append(img.uppers, x.over)
	}
	return h.take(x, img.dir)
}

func (h *house) take(x *held, dir string) error {
	a := x.w.do(order{
		Do: "hold", Dir: dir, Shape: h.shape, Seed: h.seed, N: x.n, Rnd: h.rnd.Uint64(),
		Over: x.over, Hold: x.id, How: x.how,
	})
	if a.Err != "" {
		return errors.New(a.Err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.held = append(h.held, x)
	return nil
}

func (h *house) letGo() error {
	h.mu.Lock()
	if len(h.held) == 0 {
		h.mu.Unlock()
		return nil
	}
	i := h.rnd.IntN(len(h.held))
	x := h.held[i]
	h.held = slices.Delete(h.held, i, i+1)
	h.mu.Unlock()
	if a := x.w.do(order{Do: "end", Hold: x.id}); a.Err != "" {
		return fmt.Errorf("end of %+v: %s", x.how, a.Err)
	}
	return nil
}

// evict removes an image if nothing is known to stand on it.
func (h *house) evict(ctx context.Context) error {
	n, img := h.any()
	if img == nil {
		return nil
	}
	for _, dir := range img.uppers {
		if alive, err := overlayAlive(dir, h.over); err != nil || alive {
			return err
		}
	}
	h.mu.Lock()
	var holders []*held
	for _, x := range h.held {
		if x.n == n {
			holders = append(holders, x)
			x.gone.Store(true)
		}
	}
	h.mu.Unlock()
	ok, err := h.remove(ctx, n, func() {})
	if err != nil {
		return err
	}
	if !ok {
		for _, x := range holders {
			x.gone.Store(false)
		}
		return nil
	}
	if !h.byHand && len(holders) > 0 {
		return fmt.Errorf("image %d was removed under %+v", n, holders[0].how)
	}
	if len(holders) > 0 {
		h.underHolder++
	}
	h.removed.Add(1)
	delete(h.images, n)
	return nil
}

func (h *house) sweep(ctx context.Context) error {
	freed, waiting, err := h.reclaim(ctx, h.evicted)
	h.freed.Add(int64(freed))
	h.waited.Add(int64(waiting))
	return err
}

// checkAll checks the holdings one after the other until done is closed.
func (h *house) checkAll(t *testing.T, done chan struct{}) {
	for i := 0; !t.Failed(); i++ {
		select {
		case <-done:
			return
		default:
		}
		h.mu.Lock()
		var x *held
		if len(h.held) > 0 {
			x = h.held[i%len(h.held)]
		}
		h.mu.Unlock()
		if x == nil {
			time.Sleep(time.Millisecond)
			continue
		}
		before := x.gone.Load()
		a := x.w.do(order{Do: "check", Hold: x.id})
		h.checks.Add(1)
		h.lost.Add(int64(a.Lost))
		if a.Err != "" {
			t.Errorf("image %d, removed: %t: %s", x.n, x.gone.Load(), a.Err)
		}
		if a.Lost > 0 && !before && !x.gone.Load() {
			t.Errorf("image %d is there, and %d names that are held by %+v do not open", x.n, a.Lost, x.how)
		}
	}
}

// empty ends all holdings and removes all images: all space must be freed.
func (h *house) empty(t *testing.T) {
	t.Helper()
	for len(h.held) > 0 {
		if err := h.letGo(); err != nil {
			t.Error(err)
		}
	}
	h.eventually(t, "all images are removed", func() (bool, error) {
		for range len(h.images) {
			if err := h.evict(t.Context()); err != nil {
				return false, err
			}
		}
		return len(h.images) == 0, nil
	})
	h.eventually(t, "all space is back", func() (bool, error) {
		if h.evicted {
			h.group.squeeze()
		}
		err := h.sweep(t.Context())
		return len(h.p.Dead()) == 0, err
	})
	h.emptied(t)
	if err := h.tab.UnmountPool(t.Context()); err != nil {
		t.Error(err)
	}
	h.eventually(t, "nothing of the pool lives", func() (bool, error) {
		alive, err := h.tab.Alive(t.Context())
		return !alive, err
	})
	if turned, err := h.p.NothingMounted(t.Context()); err != nil {
		t.Errorf("nothing is mounted: %t, %v", turned, err)
	}
	h.emptied(t)
}

// eventually retries f, because the kernel needs time to close the files of ended threads and processes.
func (h *house) eventually(t *testing.T, what string, f func() (bool, error)) {
	t.Helper()
	for range 1000 {
		ok, err := f()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if ok {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("not so: %s: %d images, %d extents wait", what, len(h.images), len(h.p.Dead()))
}

// overlayAlive reports whether an overlay over the upper directory exists, detached or not: the kernel
// refuses a second one with index=on.
func overlayAlive(dir, base string) (bool, error) {
	empty := filepath.Join(base, "empty")
	if err := os.MkdirAll(empty, 0o700); err != nil {
		return false, err
	}
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	for _, o := range [][2]string{
		{"lowerdir", empty},
		{"upperdir", filepath.Join(dir, "u")},
		{"workdir", filepath.Join(dir, "w")},
		{"index", "on"},
	} {
		if err := unix.FsconfigSetString(fd, o[0], o[1]); err != nil {
			return false, err
		}
	}
	err = unix.FsconfigCreate(fd)
	if errors.Is(err, unix.EBUSY) {
		return true, nil
	}
	if errors.Is(err, unix.ESTALE) {
		err = nil
	}
	return false, err
}
