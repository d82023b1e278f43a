package qemu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
)

// flipsEnv sets the number of flipped bits of contents, and of metadata, on each kernel in TestFlips.
const flipsEnv = "DAXFS_TEST_FLIPS"

// Bits flip in the persistent memory below a running pool, whose images are mounted with DAX. One
// scrub finds each flip in contents, and the image is rebuilt: nobody gets those contents any more,
// and another image never changes. Check finds each flip in metadata that changes what a reader sees.
func TestFlips(t *testing.T) {
	rounds := 12
	if s := os.Getenv(flipsEnv); s != "" {
		var err error
		if rounds, err = strconv.Atoi(s); err != nil {
			t.Fatalf("%s: %v", flipsEnv, err)
		}
	}
	onEach(t, func(t *testing.T, k Kernel) {
		for done := 0; done < rounds; done += mostFlips {
			flipBelow(t, k, min(rounds-done, mostFlips), uint64(12+done))
		}
	})
}

// mostFlips is the number of flips of contents below one machine: each leaves another image in the
// pool, and the next scrub has to tell which images hold its flip.
const mostFlips = 50

// flipBelow boots a machine and flips bits of its memory: rounds in contents, and as many in metadata.
func flipBelow(t *testing.T, k Kernel, rounds int, seed uint64) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "memory")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Each flip of contents takes a slot, of which there is one for every 512 KiB, and a window of 2 MiB.
	if err := f.Truncate(64<<20 + int64(rounds)<<21); err != nil {
		t.Fatal(err)
	}
	r := boot(t, Machine{
		Kernel: k, Memory: path, Via: VirtioPmem, Task: task.Task{Name: "flips", Rounds: rounds, Seed: seed},
	})
	err = r.Serve(func(q task.Request) (reply task.Reply) {
		err := fmt.Errorf("operation %q: %w", q.Op, errors.ErrUnsupported)
		if q.Op == task.OpFlip {
			err = flipBit(f, q.Off, q.Bit)
		}
		if err != nil {
			reply.Error = err.Error()
		}
		return reply
	})
	if err != nil {
		t.Fatal(err)
	}
	a, err := r.Wait()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("kernel %s, seed %d: %d flips of contents found, %d files verified, "+
		"%d flips of metadata, %d of them in bytes that nothing reads",
		a.Kernel, seed, a.Flips, a.Verified, a.MetaFlips, a.Silent)
	if a.Flips != rounds || a.MetaFlips != rounds || a.Silent > rounds/2 {
		t.Errorf("%d flips of contents and %d of metadata, %d of those silent, expected %d of each", a.Flips,
			a.MetaFlips, a.Silent, rounds)
	}
}

// flipBit flips a bit of the file below the guest's memory.
func flipBit(f *os.File, off int64, bit int) error {
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, off); err != nil {
		return err
	}
	b[0] ^= 1 << bit
	_, err := f.WriteAt(b, off)
	return err
}
