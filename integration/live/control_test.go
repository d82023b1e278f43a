package live

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool"
)

// Without one of the guards foreign bytes appear, so TestHolders is able to find them: without the
// lease, for holders of open or mapped files; without waiting for eviction, for holders of a working
// directory in an overlay that no table shows.
func TestHoldersControl(t *testing.T) {
	for _, tc := range []struct {
		name  string
		how   grasp
		lease bool
	}{
		{"descriptor without lease", grasp{Mount: "overlay", Lazy: true, Thing: "fd"}, false},
		{"mapping without lease", grasp{Mount: "lowers", Lazy: true, Namespace: true, Thing: "map"}, false},
		{"working directory without eviction", grasp{Mount: "overlay", Lazy: true, Thing: "cwd"}, true},
		{"O_PATH without eviction", grasp{Mount: "lowers", Lazy: true, Thing: "path"}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pl := holderPlaces[0]
			pl.slots = 400
			h := newHouse(t, newBed(t, pl, newSeed(t)))
			h.byHand = true
			if err := h.settle(t.Context()); err != nil {
				t.Fatal(err)
			}
			var holders []*held
			for i := range 6 {
				x := &held{id: i, n: 0, w: h.workers[i%2], how: tc.how, over: filepath.Join(h.over, strconv.Itoa(i))}
				if err := h.take(x, h.images[0].dir); err != nil {
					t.Fatal(err)
				}
				holders = append(holders, x)
			}
			if ok, err := h.remove(t.Context(), 0, func() {}); err != nil || !ok {
				t.Fatalf("removed: %t, %v", ok, err)
			}
			delete(h.images, 0)
			free := func() error { return freeAll(t, h.p) }
			if tc.lease {
				free = func() error { return h.sweep(t.Context()) }
			}
			if err := free(); err != nil {
				t.Fatal(err)
			}
			for range 20 {
				if err := h.settle(t.Context()); err != nil {
					t.Fatal(err)
				}
				for _, x := range holders {
					if a := x.w.do(order{Do: "check", Hold: x.id}); strings.Contains(a.Err, "are those of") {
						t.Logf("as expected: %s", a.Err)
						return
					}
				}
			}
			t.Error("nobody saw the bytes of another image: TestHolders could not fail")
		})
	}
}

// Verifying an image notices a lease on one of its live files, through an overlay too.
func TestLeaseControl(t *testing.T) {
	pl := holderPlaces[0]
	pl.slots = 400
	h := newHouse(t, newBed(t, pl, newSeed(t)))
	if err := h.settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, over := range []string{"", filepath.Join(h.over, "1")} {
		verifies := func() string {
			return h.workers[1].do(order{
				Do: "verify", Dir: h.images[0].dir, Over: over, Shape: h.shape, Seed: h.seed, N: 0,
			}).Err
		}
		before := verifies()
		release := leaseAny(t, h.images[0].dir)
		during := verifies()
		release()
		if before != "" || !strings.Contains(during, "has a lease") {
			t.Errorf("overlay %q: %q without a lease, %q with one", over, before, during)
		}
	}
}

// leaseAny takes a write lease on a file below dir that nobody has open, until release is called.
func leaseAny(t *testing.T, dir string) (release func()) {
	t.Helper()
	var f *os.File
	err := filepath.WalkDir(dir, func(p string, de fs.DirEntry, err error) error {
		if err != nil || !de.Type().IsRegular() {
			return err
		}
		if f, err = os.Open(p); err != nil {
			return err
		}
		if _, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
			f.Close()
			return fmt.Errorf("lease on %q: %w", p, err)
		}
		return fs.SkipAll
	})
	if err != nil || f == nil {
		t.Fatalf("no lease below %q: %v", dir, err)
	}
	return func() { f.Close() }
}

// freeAll frees without asking the kernel.
func freeAll(t *testing.T, p *pool.Pool) error {
	erased, err := p.Erase(t.Context(), p.Dead())
	if err != nil {
		return err
	}
	return p.Free(t.Context(), erased)
}
