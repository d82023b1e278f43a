package live

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

var publishPlaces = []place{
	{fs: "ext4", driver: "erofs-file", size: 256 << 20, disk: 320 << 20, shape: "rich"},
	{fs: "xfs", driver: "erofs-file", size: 256 << 20, disk: 400 << 20, shape: "rich"},
	{fs: "btrfs", driver: "erofs-file", size: 256 << 20, disk: 400 << 20, shape: "rich"},
	{fs: "tmpfs", driver: "erofs-loop", size: 256 << 20, shape: "rich"},
	{fs: "ext4", driver: "erofs-loop", size: 256 << 20, disk: 320 << 20, shape: "rich"},
	{fs: "ext4", driver: "fuse", size: 256 << 20, disk: 320 << 20, shape: "rich"},
}

// Images are published and removed while others are read and mapped by processes under memory
// pressure, and while one process looks up each directory where an image is about to appear.
func TestPublish(t *testing.T) {
	slow.Skip(t, "loads six file systems and drivers")
	for _, pl := range publishPlaces {
		t.Run(pl.String(), func(t *testing.T) {
			seed := newSeed(t)
			count := times(t, 50)
			pl.slots = count + 10
			pl.size += int64(count) * 64 << 10
			pl.disk += int64(count) * 64 << 10
			watchKernel(t)
			l := &load{bed: newBed(t, pl, seed), over: t.TempDir(), count: count, group: newCgroup(t, 80<<20)}
			l.live = map[int]*published{}
			mustMountFS(t, "tmpfs", l.over)
			for range 2 {
				l.workers = append(l.workers, newWorker(t, l.group))
			}
			l.run(t)
		})
	}
}

type load struct {
	*bed
	over    string // a file system for upper directories
	count   int
	group   *cgroup
	workers []*worker

	mu   sync.Mutex
	next int
	live map[int]*published

	// One lock serializes reclaims, as for sweeps.
	sweep sync.Mutex

	verified, objects, looks, seen atomic.Int64
}

// published is a readable image.
type published struct {
	dir   string
	users int
}

const (
	liveImages = 12
	publishers = 2
	readers    = 2 // for each worker
)

func (l *load) run(t *testing.T) {
	var publishing, reading sync.WaitGroup
	done := make(chan struct{})
	for i := range publishers {
		publishing.Go(func() { l.publishAll(t, rand.New(rand.NewPCG(l.seed, uint64(i)))) })
	}
	for i := range readers * len(l.workers) {
		reading.Go(func() { l.readAll(t, i, rand.New(rand.NewPCG(l.seed, 100+uint64(i))), done) })
	}
	publishing.Wait()
	close(done)
	reading.Wait()
	if t.Failed() {
		return
	}
	l.check(t)
	for n := range l.live {
		if ok, err := l.remove(t.Context(), n, func() {}); err != nil || !ok {
			t.Errorf("remove image %d: %t, %v", n, ok, err)
		}
	}
	if _, waiting, err := l.reclaim(t.Context(), false); err != nil || waiting > 0 {
		t.Errorf("%d extents wait, nobody reads: %v", waiting, err)
	}
	if l.driver != "fuse" {
		l.emptied(t)
	}
	if err := l.tab.UnmountPool(t.Context()); err != nil {
		t.Error(err)
	}
	t.Logf("published %d images; %d verifications of %d objects; %d looks at images in the making, of which %d saw one",
		l.count, l.verified.Load(), l.objects.Load(), l.looks.Load(), l.seen.Load())
	if l.verified.Load() < int64(l.count)/4 || l.objects.Load() < l.verified.Load() {
		t.Error("too little was verified for this to be a test")
	}
}

// publishAll publishes its share of the images, and removes older ones.
func (l *load) publishAll(t *testing.T, rnd *rand.Rand) {
	for !t.Failed() {
		l.mu.Lock()
		n := l.next
		l.next++
		l.mu.Unlock()
		if n >= l.count {
			return
		}
		look := l.workers[n%len(l.workers)].start(order{
			Do: "look", Dir: l.tab.Dir(key(n)), Shape: l.shape, Seed: l.seed, N: n, Rnd: rnd.Uint64(), Tries: 20_000,
		})
		dir, err := l.publish(t.Context(), n)
		if err != nil {
			t.Errorf("publish image %d: %v", n, err)
			return
		}
		a := <-look
		l.count1(t, a, n, "look")
		l.looks.Add(1)
		if a.Objects > 0 {
			l.seen.Add(1)
		}
		l.mu.Lock()
		l.live[n] = &published{dir: dir}
		l.mu.Unlock()
		if err := l.thin(t.Context(), rnd); err != nil {
			t.Error(err)
			return
		}
		if n%8 == 0 {
			l.group.squeeze()
		}
	}
}

// thin removes unread images until liveImages are left, and frees their space.
func (l *load) thin(ctx context.Context, rnd *rand.Rand) error {
	for {
		l.mu.Lock()
		var free []int
		for n, p := range l.live {
			if p.users == 0 {
				free = append(free, n)
			}
		}
		if len(l.live) <= liveImages || len(free) == 0 {
			l.mu.Unlock()
			break
		}
		slices.Sort(free)
		n := free[rnd.IntN(len(free))]
		delete(l.live, n)
		l.mu.Unlock()
		ok, err := l.remove(ctx, n, func() {})
		if err != nil || !ok {
			return fmt.Errorf("remove image %d, which nobody uses: %t, %w", n, ok, err)
		}
	}
	l.sweep.Lock()
	defer l.sweep.Unlock()
	_, _, err := l.reclaim(ctx, false)
	return err
}

// readAll verifies images until done is closed.
func (l *load) readAll(t *testing.T, i int, rnd *rand.Rand, done chan struct{}) {
	for k := 0; !t.Failed(); k++ {
		select {
		case <-done:
			return
		default:
		}
		n, p := l.pick(rnd)
		if p == nil {
			time.Sleep(time.Millisecond) // the first one is being published
			continue
		}
		o := order{Do: "verify", Dir: p.dir, Shape: l.shape, Seed: l.seed, N: n, Rnd: rnd.Uint64()}
		if rnd.IntN(2) == 0 {
			o.Over = filepath.Join(l.over, fmt.Sprintf("%d-%d", i, k))
		}
		a := l.workers[i%len(l.workers)].do(o)
		l.count1(t, a, n, "verify")
		l.verified.Add(1)
		l.mu.Lock()
		p.users--
		l.mu.Unlock()
	}
}

// pick returns an image, preferably a new one. It stays until its user count is decremented.
func (l *load) pick(rnd *rand.Rand) (int, *published) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []int
	for n := range l.live {
		all = append(all, n)
	}
	if len(all) == 0 {
		return 0, nil
	}
	slices.Sort(all)
	n := all[len(all)-1-rnd.IntN(len(all))]
	if rnd.IntN(2) == 0 {
		n = all[len(all)-1]
	}
	l.live[n].users++
	return n, l.live[n]
}

func (l *load) count1(t *testing.T, a answer, n int, what string) {
	l.objects.Add(int64(a.Objects))
	if a.Err != "" {
		t.Errorf("%s: image %d: %s", what, n, a.Err)
	}
}
