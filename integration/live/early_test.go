package live

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A reader breaks the rule that no slot is looked up before its image is published. What it first
// sees, which the kernel caches, is still the whole image: the last two bytes make the slot valid. On
// block devices the rule is needed, because a lookup leaves old blocks in the cache of the device.
//
// The kernel logs each lookup of an empty slot, so the test makes few of them.
func TestLookEarly(t *testing.T) {
	for _, pl := range publishPlaces[:3] {
		t.Run(pl.String(), func(t *testing.T) {
			count := times(t, 30)
			pl.slots = count + 10
			b := newBed(t, pl, newSeed(t))
			if _, err := b.publish(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
			live, err := filepath.Glob(filepath.Join(b.root, "live", "*", "mnt"))
			if err != nil || len(live) != 1 {
				t.Fatalf("the pool is mounted on %q, %v", live, err)
			}
			rnd := rand.New(rand.NewPCG(b.seed, 7))
			early := 0
			for n := 1; n <= count; n++ {
				slot := filepath.Join(live[0], fmt.Sprintf("%05d", n))
				added := make(chan error, 1)
				go func() {
					_, err := b.add(t.Context(), n)
					added <- err
				}()
				seen := lookUntil(t, slot, added)
				if seen {
					early++
				}
				if _, err := verify(slot, b.want(n), rnd, false); err != nil {
					t.Errorf("image %d, which was seen early: %t: %v", n, seen, err)
				}
				if !seen {
					continue
				}
				if err := <-added; err != nil {
					t.Fatal(err)
				}
			}
			t.Logf("%d of %d images were seen before AddImage returned", early, count)
			if err := b.tab.Unmount(t.Context(), key(0)); err != nil {
				t.Error(err)
			}
		})
	}
}

// lookUntil looks a slot up until it is valid, or until the image was added. It returns true if the
// slot came first; the result of adding is then still pending.
func lookUntil(t *testing.T, slot string, added chan error) bool {
	t.Helper()
	for {
		var st unix.Stat_t
		err := unix.Lstat(slot, &st)
		if err == nil {
			return true
		}
		if !errors.Is(err, unix.EUCLEAN) {
			t.Fatalf("a slot that may be published: %v", err)
		}
		select {
		case err := <-added:
			if err != nil {
				t.Fatal(err)
			}
			return false
		case <-time.After(300 * time.Microsecond):
		}
	}
}
