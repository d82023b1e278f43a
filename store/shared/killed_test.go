package shared_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount/drivers"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/lease"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

// childEnv holds the parameters of a reader process: its root, the pool, the lease region, a seed, and
// the images that it already uses.
const childEnv = "DAXFS_TEST_READER"

// manyNames is the largest number of images of an owner.
const manyNames = 12

func nameOf(i int) string { return fmt.Sprint("image ", i) }

// child is a reader that claims images and ends claims at random until it is killed. It reports a
// claim once it holds, and the end of a claim before it begins. After each step it reads all images
// that it uses.
func child() int {
	args := strings.Split(os.Getenv(childEnv), "\n")
	ctx := context.Background()
	fail := func(err error) int {
		fmt.Println("failed", err)
		return 1
	}
	mem, err := region.Open(region.Config{Kind: region.KindFile, Path: args[1], ReadOnly: true})
	if err != nil {
		return fail(err)
	}
	pools, err := shared.Open(ctx, shared.Config{
		Root: args[0], Pools: []shared.Source{{Name: args[1], Lease: args[2]}}, Drivers: drivers.All(),
	})
	if err != nil {
		return fail(err)
	}
	seed, err := strconv.ParseUint(args[3], 10, 64)
	if err != nil {
		return fail(err)
	}
	rng := rand.New(rand.NewPCG(seed, 11))
	using := map[int]bool{}
	reads := func() error {
		for i := range using {
			_, chain := chainOf(nameOf(i))
			slot, ok := pools.Slot(chain)
			if !ok {
				return fmt.Errorf("%s is not claimed", nameOf(i))
			}
			live, err := daxfs.OpenLive(mem, mem.Size())
			if err != nil {
				return err
			}
			img, err := live.Image(slot)
			if err != nil {
				return fmt.Errorf("%s: %w", nameOf(i), err)
			}
			if got, err := fs.ReadFile(img, "file"); err != nil || string(got) != nameOf(i) {
				return fmt.Errorf("%s shows %q, %w", nameOf(i), got, err)
			}
		}
		return nil
	}
	for _, text := range args[4:] {
		i, err := strconv.Atoi(text)
		if err != nil {
			return fail(err)
		}
		_, chain := chainOf(nameOf(i))
		if err := pools.Claim(ctx, chain); err != nil {
			return fail(fmt.Errorf("%s, which is in use from before: %w", nameOf(i), err))
		}
		using[i] = true
	}
	fmt.Println("ready")
	for {
		if err := reads(); err != nil {
			return fail(err)
		}
		if rng.IntN(3) == 0 {
			end := map[int]bool{}
			for i := range using {
				if rng.IntN(2) == 0 {
					end[i] = true
					delete(using, i)
					fmt.Println("end", i)
				}
			}
			needed := map[digest.Digest]bool{}
			for i := range using {
				_, chain := chainOf(nameOf(i))
				needed[chain] = true
			}
			if err := pools.Sweep(ctx, func(c digest.Digest) bool { return needed[c] }); err != nil {
				return fail(err)
			}
			continue
		}
		i := rng.IntN(manyNames)
		_, chain := chainOf(nameOf(i))
		if err := pools.Claim(ctx, chain); err != nil {
			if !errors.Is(err, shared.ErrNotFound) {
				return fail(err)
			}
			continue
		}
		if !using[i] {
			using[i] = true
			fmt.Println("use", i)
		}
	}
}

// An owner adds, removes and frees images, and restarts, while a reader is killed again and again at
// any moment. Images that the reader reported are there for its next process, and the space of all
// others becomes free.
func TestReaderKilled(t *testing.T) {
	rounds := 40
	if testing.Short() {
		rounds = 8
	}
	o := newOwner(t)
	place := filepath.Join(t.TempDir(), "guest.lease")
	must(t, os.WriteFile(place, make([]byte, lease.MinSize), 0o600))
	regions, err := lease.NewRegions([]string{place})
	must(t, err)
	o.SetLeases(regions)
	root := filepath.Join(t.TempDir(), "shared")
	rng := rand.New(rand.NewPCG(1, 11))
	using := map[int]bool{}
	waited, used := 0, 0
	for seed := range rounds {
		args := []string{root, o.path, place, strconv.Itoa(seed)}
		for i := range using {
			args = append(args, strconv.Itoa(i))
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), childEnv+"="+strings.Join(args, "\n"))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		said, ended := make(chan struct{}), make(chan struct{})
		go func() { // it ends with the process
			defer close(ended)
			lines := bufio.NewScanner(out)
			for first := true; lines.Scan(); first = false {
				if first {
					close(said)
				}
				word, rest, _ := strings.Cut(lines.Text(), " ")
				i, _ := strconv.Atoi(rest)
				switch word {
				case "use":
					using[i] = true
					used++
				case "end":
					delete(using, i)
				case "failed":
					t.Errorf("round %d: %s", seed, rest)
				}
			}
		}()
		select {
		case <-said:
		case <-ended:
			t.Fatal("the reader ended")
		}
		for range 5 + rng.IntN(40) {
			waited += o.step(rng)
		}
		must(t, cmd.Process.Kill())
		<-ended
		_ = cmd.Wait() // killed
		if rng.IntN(4) == 0 {
			must(t, errors.Join(o.Close(), o.mem.Close()))
			o.open()
			o.SetLeases(regions)
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d images were used, %d removals waited, %d are in use: %v", used, waited, len(using),
		slices.Sorted(maps.Keys(using)))
	if used == 0 || waited == 0 {
		t.Error("something never happened")
	}
	p, err := shared.Open(t.Context(), shared.Config{
		Root: root, Pools: []shared.Source{{Name: o.path, Lease: place}}, Drivers: drivers.All(),
	})
	must(t, err)
	must(t, p.Sweep(t.Context(), func(digest.Digest) bool { return false }))
	must(t, p.Close())
	if n := claims(t, regions); n != 0 {
		t.Errorf("%d claims are left", n)
	}
	for _, m := range o.Images() {
		must(t, o.RemoveImage(t.Context(), m.Key))
	}
}

// step adds or removes an image and frees unused ones. It returns 1 if a reader delays the removal.
func (o *owner) step(rng *rand.Rand) int {
	o.t.Helper()
	ctx := context.Background()
	name := nameOf(rng.IntN(manyNames))
	_, chain := chainOf(name)
	waits := 0
	_, err := o.Image(chain.String())
	switch {
	case errors.Is(err, pool.ErrNotFound):
		o.add(name)
	case o.Unlisted(chain.String()) && rng.IntN(4) == 0:
		must(o.t, o.Relist(ctx, chain.String()))
	default:
		err := o.RemoveImage(ctx, chain.String())
		if errors.Is(err, pool.ErrLeased) {
			waits, err = 1, nil
		}
		must(o.t, err)
	}
	dead, err := o.Erase(ctx, o.Dead())
	must(o.t, err)
	must(o.t, o.Free(ctx, dead))
	return waits
}
