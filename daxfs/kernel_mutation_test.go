package daxfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// mutationRun returns number and seed of the mutations for TestKernelMutations: DAXFS_TEST_MUTATIONS
// is a number, or a number, a colon and a seed.
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

// TestKernelMutations changes the metadata of rich images. The running kernel mounts every image that
// Check accepts: it must show the same as our reader, and run programs with their capabilities.
//
// Mounts dominate the cost, so one mount tests several mutations that are apart and that Check accepts
// together.
func TestKernelMutations(t *testing.T) {
	const run = 256 // mutations of one image, in order: the groups do not depend on the number of processors
	count, seed := mutationRun(t)
	progs := newPrograms(t)
	images := make([]*mutator, 4)
	for i := range images {
		images[i] = newMutator(t, richImage(t, seed+uint64(i)))
	}
	var next, tried, taken, mounts, failed atomic.Uint64
	t.Run("run", func(t *testing.T) {
		for worker := range runtime.GOMAXPROCS(0) {
			t.Run(fmt.Sprint(worker), func(t *testing.T) {
				t.Parallel()
				mountNamespace(t)
				bed := newMutationBed(t, seed, progs)
				for failed.Load() < 10 {
					first := next.Add(run) - run
					if first >= count {
						break
					}
					last := min(first+run, count)
					bed.run(images[first/run%uint64(len(images))], first, last)
					tried.Add(last - first)
					failed.Add(bed.failed)
					bed.failed = 0
				}
				taken.Add(bed.taken)
				mounts.Add(bed.mounts)
			})
		}
	})
	if next.Load() == 0 {
		return // no own namespace and no mounts
	}
	t.Logf("%d mutations of seed %d: Check takes %d, which were in %d mounts; programs ran %d times",
		tried.Load(), seed,
		taken.Load(), mounts.Load(), progs.runs)
	if taken.Load() < count/20 || progs.runs == 0 {
		t.Error("Check takes too few mutations, or no program ran: this shows nothing")
	}
}

// mutationBed has one file on disk, which is mounted repeatedly. After a crash of the machine it holds
// the mounted image.
type mutationBed struct {
	t     *testing.T
	seed  uint64
	progs *programs
	mnt   string
	name  string
	file  *os.File
	have  []byte // content of the file
	buf   []byte

	groups []*mutationGroup // not yet mounted, oldest first

	taken, mounts, failed uint64
}

func newMutationBed(t *testing.T, seed uint64, progs *programs) *mutationBed {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image.daxfs")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &mutationBed{t: t, seed: seed, progs: progs, mnt: t.TempDir(), name: name, file: f}
}

// run makes the mutations from first up to last and mounts those that Check accepts.
func (bed *mutationBed) run(m *mutator, first, last uint64) {
	bed.buf = make([]byte, len(m.sound))
	for n := first; n < last; n++ {
		b, _ := m.mutate(bed.buf, bed.seed, n)
		if daxfs.Check(daxfs.Mem(b), int64(len(b)), nil) != nil || bytes.Equal(b, m.sound) {
			continue
		}
		bed.taken++
		if slices.ContainsFunc(bed.groups, func(g *mutationGroup) bool { return g.join(m.sound, b, n) }) {
			continue
		}
		if len(bed.groups) == openGroups {
			bed.flush(m)
		}
		bed.groups = append(bed.groups, &mutationGroup{bytes.Clone(b), []uint64{n}})
	}
	for len(bed.groups) > 0 {
		bed.flush(m)
	}
}

// flush mounts the oldest group. After a failure it mounts each member alone, to identify the faulty one.
func (bed *mutationBed) flush(m *mutator) {
	g := bed.groups[0]
	bed.groups = bed.groups[1:]
	bad := bed.look(g.b)
	if len(bad) == 0 {
		return
	}
	bed.failed++
	for _, n := range g.numbers {
		b, what := m.mutate(make([]byte, len(m.sound)), bed.seed, n)
		if alone := bed.look(b); len(alone) > 0 {
			bed.t.Errorf("mutation %d of seed %d, %s: %q", n, bed.seed, what, alone)
			return
		}
	}
	bed.t.Errorf("mutations %d of seed %d together: %q", g.numbers, bed.seed, bad)
}

// look mounts an image and returns the differences of the kernel and the DAXFS half from our reader.
func (bed *mutationBed) look(b []byte) (bad []string) {
	f, err := daxfs.OpenBytes(b)
	if err != nil {
		return []string{err.Error()}
	}
	if err := bed.write(b); err != nil {
		bed.t.Fatal(err)
	}
	bed.mounts++
	done, err := bed.mount()
	if err != nil {
		return []string{"mount: " + err.Error()}
	}
	defer done()
	halves := &recorder{TB: bed.t}
	mustAgree(halves, b)
	return append(compareView(f, bed.mnt, bed.progs), halves.errors...)
}

// mutationGroup is an image with several mutations.
type mutationGroup struct {
	b       []byte
	numbers []uint64
}

const (
	openGroups = 6
	groupSize  = 8
	apart      = 512 // bytes: a piece of the image has only one mutation
)

// join adds mutation n, with the result b, and returns false if it does not fit the others.
func (g *mutationGroup) join(sound, b []byte, n uint64) bool {
	if len(g.numbers) == groupSize || len(b) != len(sound) || len(g.b) != len(sound) {
		return false
	}
	var pieces []int
	for off := 0; off < len(b); off += apart {
		end := min(off+apart, len(b))
		if bytes.Equal(b[off:end], sound[off:end]) {
			continue
		}
		if !bytes.Equal(g.b[off:end], sound[off:end]) {
			return false
		}
		pieces = append(pieces, off)
	}
	move := func(from []byte) {
		for _, off := range pieces {
			end := min(off+apart, len(b))
			copy(g.b[off:end], from[off:end])
		}
	}
	move(b)
	if daxfs.Check(daxfs.Mem(g.b), int64(len(g.b)), nil) != nil {
		move(sound)
		return false
	}
	g.numbers = append(g.numbers, n)
	return true
}

// write writes b to the file.
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

// mount mounts the file itself, or a loop device if the kernel cannot mount files.
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
		// A program started by another worker briefly inherits our files.
		if err := unix.Unmount(bed.mnt, unix.MNT_DETACH); err != nil {
			bed.t.Fatalf("unmount: %v", err)
		}
	}, nil
}
