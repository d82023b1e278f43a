package daxfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// mutationRun is how many mutations TestKernelMutations makes, and its seed: DAXFS_TEST_MUTATIONS is a number, or a
// number and a seed with a colon between them.
func mutationRun(t *testing.T) (count, seed uint64) {
	t.Helper()
	v := os.Getenv("DAXFS_TEST_MUTATIONS")
	switch {
	case v != "":
	case testing.Short():
		return 200, 1
	default:
		return 2000, 1
	}
	number, text, ok := strings.Cut(v, ":")
	if !ok {
		text = "1"
	}
	count, err := strconv.ParseUint(number, 10, 32)
	seed, serr := strconv.ParseUint(text, 10, 64)
	if err != nil || serr != nil {
		t.Fatalf("DAXFS_TEST_MUTATIONS=%q, expected a number, or NUMBER:SEED", v)
	}
	return count, seed
}

// TestKernelMutations changes the metadata of rich images. The running kernel mounts every image that Check takes: it
// must show all that our reader shows, and run programs with the capabilities that they have.
func TestKernelMutations(t *testing.T) {
	count, seed := mutationRun(t)
	progs := newPrograms(t)
	images := make([]*mutator, 4)
	for i := range images {
		images[i] = newMutator(t, richImage(t, seed+uint64(i)))
	}
	var next, taken, failed atomic.Uint64
	t.Run("run", func(t *testing.T) {
		for worker := range runtime.GOMAXPROCS(0) {
			t.Run(fmt.Sprint(worker), func(t *testing.T) {
				t.Parallel()
				mountNamespace(t)
				bed := newMutationBed(t)
				for n := next.Add(1); n <= count && failed.Load() < 10; n = next.Add(1) {
					m := images[n/256%uint64(len(images))] // in runs: the file changes little
					took, sane := bed.try(m, seed, n, progs)
					if took {
						taken.Add(1)
					}
					if !sane {
						failed.Add(1)
					}
				}
			})
		}
	})
	t.Logf("%d mutations of seed %d: Check takes %d, programs ran %d times", count, seed, taken.Load(), progs.runs)
	if next.Load() == 0 {
		return // no namespace of our own, and no mounts
	}
	if taken.Load() < count/20 || progs.runs == 0 {
		t.Error("Check takes too few mutations, or no program ran: this shows nothing")
	}
}

// mutationBed has one file on disk, which is mounted again and again. After a crash of the machine, it holds the image
// that was mounted.
type mutationBed struct {
	t    *testing.T
	mnt  string
	name string
	file *os.File
	have []byte // what the file holds
	buf  []byte
}

func newMutationBed(t *testing.T) *mutationBed {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image.daxfs")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &mutationBed{t: t, mnt: t.TempDir(), name: name, file: f}
}

// try makes mutation n and mounts the image if Check takes it.
func (bed *mutationBed) try(m *mutator, seed, n uint64, progs *programs) (taken, sane bool) {
	t := bed.t
	if len(bed.buf) < len(m.sound) {
		bed.buf = make([]byte, len(m.sound))
	}
	b, what := m.mutate(bed.buf[:len(m.sound)], seed, n)
	if bytes.Equal(b, m.sound) || daxfs.Check(daxfs.Mem(b), int64(len(b)), nil) != nil {
		return false, true
	}
	f, err := daxfs.OpenBytes(b)
	if err != nil {
		t.Errorf("mutation %d of seed %d, %s: open: %v", n, seed, what, err)
		return true, false
	}
	if err := bed.write(b); err != nil {
		t.Fatal(err)
	}
	done, err := bed.mount()
	if err != nil {
		t.Errorf("mutation %d of seed %d, %s: mount: %v", n, seed, what, err)
		return true, false
	}
	bad := compareView(f, bed.mnt, progs)
	done()
	for _, line := range bad {
		t.Errorf("mutation %d of seed %d, %s: %s", n, seed, what, line)
	}
	return true, len(bad) == 0
}

// write makes the file what b is.
func (bed *mutationBed) write(b []byte) error {
	if len(bed.have) != len(b) {
		bed.have = make([]byte, len(b))
		if err := errors.Join(bed.file.Truncate(0), bed.file.Truncate(int64(len(b)))); err != nil {
			return err
		}
	}
	for off := 0; off < len(b); off += daxfs.BlockSize {
		block := b[off:min(off+daxfs.BlockSize, len(b))]
		if bytes.Equal(block, bed.have[off:off+len(block)]) {
			continue
		}
		if _, err := bed.file.WriteAt(block, int64(off)); err != nil {
			return err
		}
		copy(bed.have[off:], block)
	}
	return unix.Fdatasync(int(bed.file.Fd()))
}

// mount mounts the file itself, or a loop device where the kernel cannot mount files.
func (bed *mutationBed) mount() (done func(), err error) {
	source, detach := bed.name, func() {}
	err = unix.Mount(source, bed.mnt, "erofs", unix.MS_RDONLY, "")
	if errors.Is(err, unix.ENOTBLK) {
		source, detach = attachLoop(bed.t, bed.name, 0, int64(len(bed.have)))
		err = unix.Mount(source, bed.mnt, "erofs", unix.MS_RDONLY, "")
	}
	detach()
	if err != nil {
		return nil, err
	}
	return func() {
		if err := unix.Unmount(bed.mnt, 0); err != nil {
			bed.t.Fatalf("unmount: %v", err)
		}
	}, nil
}
