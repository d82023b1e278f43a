package mount_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// The benchmarks run one workload on every driver, and on the same tree in a tmpfs, in one run, and
// report ratios to erofs-loop. Absolute numbers of different runs are not comparable. The image lies
// in a tmpfs, except for erofs-file, which reads it from a disk file. Run them with -benchtime 10x.

const bigFile = "big" // 128 MiB

// benchTree makes a tree in a tmpfs: one big file, and files small ones in directories of 100.
func benchTree(b *testing.B, files int) string {
	dir := filepath.Join(mounttest.Tmpfs(b, ""), "tree")
	if err := os.Mkdir(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	big := make([]byte, 128<<20)
	rand.Read(big)
	if err := os.WriteFile(filepath.Join(dir, bigFile), big, 0o644); err != nil {
		b.Fatal(err)
	}
	for i := range files {
		sub := filepath.Join(dir, fmt.Sprintf("dir-%04d", i/100))
		if i%100 == 0 {
			if err := os.Mkdir(sub, 0o755); err != nil {
				b.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("file-with-a-usual-name-%d.py", i)), big[i:i+100],
			0o644); err != nil {
			b.Fatal(err)
		}
	}
	return dir
}

// target is the tree as shown by one driver, or the tree itself.
type target struct {
	name string
	// fresh returns a new mount with nothing cached, and its unmount function.
	fresh func() (dir string, done func())
}

// compare runs f on all targets in turn, round by round, because the load of the machine varies. It
// reports the fastest run of each, and the ratios. If warm is set, each target is mounted once, and f
// runs once without being measured. Then the calling thread and its children do all the work, and
// compare measures their processor time: waiting does not count.
func compare(b *testing.B, files int, warm bool, f func(dir string)) {
	all := targets(b, files)
	if warm {
		for i, t := range all {
			dir, done := t.fresh()
			defer done()
			f(dir)
			all[i].fresh = func() (string, func()) { return dir, func() {} }
		}
	}
	start := time.Now()
	clock := func() time.Duration { return time.Since(start) }
	if warm {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		clock = func() time.Duration { return processorTime(b) }
	}
	best := map[string]time.Duration{}
	b.ResetTimer()
	for range b.N {
		for _, t := range all {
			dir, done := t.fresh()
			begin := clock()
			f(dir)
			if took := clock() - begin; best[t.name] == 0 || took < best[t.name] {
				best[t.name] = took
			}
			done()
		}
	}
	b.StopTimer()
	var ratios []string
	for _, t := range all {
		b.ReportMetric(float64(best[t.name].Nanoseconds()), t.name+"-ns")
		ratios = append(ratios, fmt.Sprintf("%s %.2f", t.name, float64(best["erofs-loop"])/float64(best[t.name])))
	}
	b.ReportMetric(0, "ns/op") // over all targets: meaningless
	b.Logf("speed relative to erofs-loop: %s", strings.Join(ratios, ", "))
}

// processorTime returns the time used by this thread and the children that ended.
func processorTime(b *testing.B) time.Duration {
	var t unix.Timespec
	var children unix.Rusage
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		b.Fatal(err)
	}
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &children); err != nil {
		b.Fatal(err)
	}
	return time.Duration(t.Nano() + children.Utime.Nano() + children.Stime.Nano())
}

// targets makes a tree and an image of it.
func targets(b *testing.B, files int) []target {
	mounttest.Root(b)
	tree := benchTree(b, files)
	onTmpfs := filepath.Join(mounttest.Tmpfs(b, ""), "image")
	mounttest.Mkfs(b, tree, onTmpfs)
	onDisk := filepath.Join(b.TempDir(), "image")
	if out, err := exec.Command("cp", onTmpfs, onDisk).CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	all := []target{{"tmpfs", func() (string, func()) { return tree, func() {} }}}
	for _, d := range []mount.Driver{&erofs.File{}, erofs.Loop{}, fuseDriver()} {
		path := onTmpfs
		if d.Name() == "erofs-file" {
			path = onDisk
		}
		st, err := os.Stat(path)
		if err != nil {
			b.Fatal(err)
		}
		src := mount.Source{Key: "k", Size: st.Size(), Region: region.Info{Kind: region.KindFile, Path: path, FD: -1}}
		if err := d.Probe(b.Context(), src.Region); err != nil {
			b.Logf("%s: %v", d.Name(), err)
			continue
		}
		all = append(all, target{d.Name(), func() (string, func()) {
			dir := b.TempDir()
			if err := d.Mount(b.Context(), src, dir); err != nil {
				b.Fatal(err)
			}
			return dir, func() {
				if err := d.Unmount(context.Background(), dir); err != nil {
					b.Error(err)
					sys.Detach(dir)
				}
			}
		}})
	}
	return all
}

func mustRead(b testing.TB, path string, buf []byte) {
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	for {
		_, err := f.Read(buf)
		if err == io.EOF {
			return
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

func sequential(b *testing.B, warm bool) {
	buf := make([]byte, 1<<20)
	compare(b, 0, warm, func(dir string) { mustRead(b, filepath.Join(dir, bigFile), buf) })
}

func BenchmarkSequentialCold(b *testing.B) { sequential(b, false) }
func BenchmarkSequentialWarm(b *testing.B) { sequential(b, true) }

// random reads 4096 pages in random order.
func random(b testing.TB, dir string, buf []byte) {
	f, err := os.Open(filepath.Join(dir, bigFile))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	r := mrand.New(mrand.NewPCG(1, 2))
	for range 4096 {
		if _, err := f.ReadAt(buf, r.Int64N(128<<20/4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRandomCold(b *testing.B) {
	buf := make([]byte, 4096)
	compare(b, 0, false, func(dir string) { random(b, dir, buf) })
}

func BenchmarkRandomWarm(b *testing.B) {
	buf := make([]byte, 4096)
	compare(b, 0, true, func(dir string) { random(b, dir, buf) })
}

// faults maps the big file and touches every page of it.
func faults(b testing.TB, dir string) {
	f, err := os.Open(filepath.Join(dir, bigFile))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, 128<<20, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		b.Fatal(err)
	}
	var sum byte
	for i := 0; i < len(m); i += 4096 {
		sum ^= m[i]
	}
	if err := unix.Munmap(m); err != nil {
		b.Fatal(err)
	}
	sink = sum
}

var sink byte

func BenchmarkMmapFaultsCold(b *testing.B) {
	compare(b, 0, false, func(dir string) { faults(b, dir) })
}

func BenchmarkMmapFaultsWarm(b *testing.B) {
	compare(b, 0, true, func(dir string) { faults(b, dir) })
}

func findLs(b testing.TB, dir string) {
	if out, err := exec.Command("sh", "-c", `find "$0" -ls >/dev/null`, dir).CombinedOutput(); err != nil {
		b.Fatalf("find: %v\n%s", err, out)
	}
}

func BenchmarkFindCold50000(b *testing.B) {
	compare(b, 50_000, false, func(dir string) { findLs(b, dir) })
}

func BenchmarkFindWarm50000(b *testing.B) {
	compare(b, 50_000, true, func(dir string) { findLs(b, dir) })
}

// BenchmarkMount measures the cost of an image for its first container, besides the check.
func BenchmarkMount(b *testing.B) {
	best := map[string]time.Duration{}
	all := targets(b, 0)[1:]
	b.ResetTimer()
	for range b.N {
		for _, t := range all {
			begin := time.Now()
			_, done := t.fresh()
			if took := time.Since(begin); best[t.name] == 0 || took < best[t.name] {
				best[t.name] = took
			}
			done()
		}
	}
	for name, d := range best {
		b.ReportMetric(float64(d.Nanoseconds()), name+"-ns")
	}
	b.ReportMetric(0, "ns/op")
}
