package live

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

var killPlaces = []place{
	{fs: "ext4", driver: "erofs-file", size: 96 << 20, disk: 160 << 20, shape: "rich", slots: 30_000},
	{fs: "tmpfs", driver: "erofs-loop", size: 192 << 20, shape: "rich", slots: 10_000},
}

// A daemon that publishes, removes and reclaims is killed at random moments while the pool stays
// mounted. Steps that it reported as done are done; the current step is done or not, for the next
// daemon and for the kernel. Holders of files keep their bytes.
func TestKill(t *testing.T) {
	slow.Skip(t, "kills a daemon often")
	for _, pl := range killPlaces {
		t.Run(pl.String(), func(t *testing.T) {
			seed := newSeed(t)
			h := newHouse(t, newBed(t, pl, seed))
			h.byHand, h.evicted = true, true
			if _, err := h.publish(t.Context(), stays); err != nil {
				t.Fatal(err)
			}
			k := &killing{house: h, have: map[int]bool{stays: true}}
			rounds := times(t, 12)
			for i := 0; i < rounds && !t.Failed(); i++ {
				h.close(t)
				k.life(t, uint64(i))
				k.unfinished(t)
				h.open(t)
				k.compare(t)
				k.holdOn(t)
			}
			if t.Failed() {
				return
			}
			t.Logf("%d lives, %d steps, %d of them cut; %d times a holder was asked", rounds, k.steps, k.cut, k.asked)
			for _, m := range h.p.Images() {
				h.images[number(t, m.Key)] = &tenancy{}
			}
			h.empty(t)
		})
	}
}

// stays is an image that is never removed.
const stays = 1000

// killing is the known state of a killed daemon.
type killing struct {
	*house
	have  map[int]bool
	doing step // the current step
	slot  int  // the last reported slot
	steps int
	cut   int
	asked int
}

// step is one step of a daemon: "+" or "-" an image.
type step struct {
	what string
	n    int
}

// life lets a daemon live for a while.
func (k *killing) life(t *testing.T, life uint64) {
	t.Helper()
	cmd := command("daemon", k.dir, k.root, k.fs, k.driver, k.shape,
		strconv.FormatUint(k.seed, 10), strconv.FormatUint(k.rnd.Uint64(), 10))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	last := 1 + k.rnd.IntN(16)
	kill := func() { cmd.Process.Kill() } //nolint:errcheck // it may have ended
	after := time.Duration(k.rnd.IntN(30)) * time.Millisecond
	k.doing = step{}
	lines := 0
	for s := bufio.NewScanner(out); s.Scan(); lines++ {
		if lines == last {
			time.AfterFunc(after, kill)
		}
		k.steps++
		k.said(t, s.Text())
	}
	err = cmd.Wait()
	if cmd.ProcessState.Success() || !strings.Contains(fmt.Sprint(err), "killed") {
		t.Fatalf("the daemon ended by itself: %v", err)
	}
	if k.doing.what != "" {
		k.cut++
	}
}

// said records a line of the daemon.
func (k *killing) said(t *testing.T, text string) {
	t.Helper()
	var verb, what string
	var n, slot int
	if _, err := fmt.Sscan(text, &verb, &what, &n, &slot); err != nil {
		t.Fatalf("the daemon said %q: %v", text, err)
	}
	switch verb {
	case "try":
		k.doing = step{what, n}
	case "did":
		k.apply()
		k.slot = max(k.slot, slot)
		k.doing = step{}
	case "kept":
		k.doing = step{}
	}
}

// apply records the current step as done.
func (k *killing) apply() {
	switch k.doing.what {
	case "+":
		k.have[k.doing.n] = true
	case "-":
		delete(k.have, k.doing.n)
	}
}

// unfinished checks the slot of an image that was being published, as the kernel sees it before any
// repair: the image is whole, or not there.
func (k *killing) unfinished(t *testing.T) {
	t.Helper()
	if k.doing.what != "+" {
		return
	}
	dirs, err := filepath.Glob(filepath.Join(k.root, "live", "*", "mnt", fmt.Sprintf("%05d", k.slot+1)))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		if err := unix.Access(dir, unix.F_OK); err != nil {
			if !errors.Is(err, unix.EUCLEAN) {
				t.Errorf("an image that was being published: %v", err)
			}
			continue
		}
		// In the worker, whose memory can be reclaimed.
		a := k.workers[0].do(order{
			Do: "verify", Dir: dir, Shape: k.shape, Seed: k.seed, N: k.doing.n, Rnd: k.rnd.Uint64(),
		})
		if a.Err != "" {
			t.Errorf("image %d was being published: %s", k.doing.n, a.Err)
		}
	}
}

// compare compares the reopened pool with the daemon's reports.
func (k *killing) compare(t *testing.T) {
	t.Helper()
	k.check(t)
	got := map[int]bool{}
	for _, m := range k.p.Images() {
		n := number(t, m.Key)
		got[n] = true
		k.slot = max(k.slot, m.Slot)
		dir, err := k.mount(t.Context(), m)
		if err != nil {
			t.Errorf("image %d: %v", n, err)
			continue
		}
		a := k.workers[0].do(order{Do: "verify", Dir: dir, Shape: k.shape, Seed: k.seed, N: n, Rnd: k.rnd.Uint64()})
		if a.Err != "" {
			t.Errorf("image %d: %s", n, a.Err)
		}
	}
	if !maps.Equal(got, k.have) {
		before := maps.Clone(k.have)
		k.apply()
		if !maps.Equal(got, k.have) {
			t.Errorf("images %v, expected %v or, after %+v, %v", got, before, k.doing, k.have)
		}
	}
	for _, x := range k.held {
		k.asked++
		if a := x.w.do(order{Do: "check", Hold: x.id}); a.Err != "" {
			t.Errorf("who holds on to image %d by %+v: %s", x.n, x.how, a.Err)
		}
	}
}

// holdOn adds or ends a holding of files that no mount table shows.
func (k *killing) holdOn(t *testing.T) {
	t.Helper()
	if len(k.held) >= 4 {
		if err := k.letGo(); err != nil {
			t.Error(err)
		}
		return
	}
	all := slices.Sorted(maps.Keys(k.have))
	n := all[k.rnd.IntN(len(all))]
	k.holds++
	x := &held{
		id: k.holds, n: n, w: k.workers[0], over: filepath.Join(k.over, strconv.Itoa(k.holds)),
		how: grasp{Mount: "overlay", Lazy: true, Thing: []string{"fd", "map", "cwd", "path"}[k.rnd.IntN(4)]},
	}
	if err := k.take(x, k.tab.Dir(key(n))); err != nil {
		t.Error(err)
	}
}

func number(t *testing.T, key string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimPrefix(key, "image/"))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// serveDaemon is the helper "daemon": it publishes, removes and reclaims until it is killed, and reports its steps.
func serveDaemon(args []string) error {
	seed, err := strconv.ParseUint(args[5], 10, 64)
	if err != nil {
		return err
	}
	choices, err := strconv.ParseUint(args[6], 10, 64)
	if err != nil {
		return err
	}
	b := &bed{dir: args[0], root: args[1], seed: seed, place: place{fs: args[2], driver: args[3], shape: args[4]}}
	ctx := context.Background()
	if err := b.tryOpen(ctx, pool.Options{}, nil); err != nil {
		return err
	}
	rnd := rand.New(rand.NewPCG(choices, 5))
	for {
		if err := b.step(ctx, rnd, os.Stdout); err != nil {
			return err
		}
	}
}

func (b *bed) step(ctx context.Context, rnd *rand.Rand, w io.Writer) error {
	n := rnd.IntN(8)
	_, err := b.p.Image(key(n))
	if errors.Is(err, pool.ErrNotFound) {
		fmt.Fprintln(w, "try +", n, 0)
		m, err := b.add(ctx, n)
		if errors.Is(err, pool.ErrFull) {
			fmt.Fprintln(w, "kept +", n, 0)
			_, _, err = b.reclaim(ctx, true)
			return err
		}
		if err == nil {
			_, err = b.mount(ctx, m)
		}
		fmt.Fprintln(w, "did +", n, m.Slot)
		return err
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(w, "try -", n, 0)
	ok, err := b.remove(ctx, n, func() {})
	if ok {
		fmt.Fprintln(w, "did -", n, 0)
	} else {
		fmt.Fprintln(w, "kept -", n, 0)
	}
	if err == nil && rnd.IntN(2) == 0 {
		_, _, err = b.reclaim(ctx, true)
	}
	return err
}
