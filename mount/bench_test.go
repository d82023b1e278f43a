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
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// The benchmarks run one workload on every driver, and on the same tree in a tmpfs, in one run, and end with the ratios to
// erofs-loop. Absolute numbers of different runs say nothing about each other. The image lies in a tmpfs, but for erofs-file, which
// reads it from a disk file.

const bigFile = "big" // 128 MiB

// benchTree makes a tree in a tmpfs: one big file, and files small ones in directories of 100.
func benchTree(b *testing.B, files int) string {
	dir := filepath.Join(benchTmpfs(b), "tree")
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
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("file-with-a-usual-name-%d.py", i)), big[i:i+100], 0o644); err != nil {
			b.Fatal(err)
		}
	}
	return dir
}

func benchTmpfs(b *testing.B) string {
	dir := b.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { sys.Detach(dir) })
	return dir
}

// onEach runs a workload on every driver and on the tree itself, and logs the ratios. mount returns a fresh mount, with nothing
// cached; work gets its directory.
func onEach(b *testing.B, files int, bench func(b *testing.B, fresh func() (dir string, done func()))) {
	mounttest.Root(b)
	tree := benchTree(b, files)
	onTmpfs := filepath.Join(benchTmpfs(b), "image")
	mounttest.Mkfs(b, tree, onTmpfs)
	onDisk := filepath.Join(b.TempDir(), "image")
	if out, err := exec.Command("cp", onTmpfs, onDisk).CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	took := map[string]time.Duration{}
	var names []string
	run := func(name string, fresh func() (string, func())) {
		b.Run(name, func(b *testing.B) {
			bench(b, fresh)
			took[name] = b.Elapsed() / time.Duration(b.N)
		})
		names = append(names, name)
	}
	run("tmpfs", func() (string, func()) { return tree, func() {} })
	for _, d := range testDrivers() {
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
		run(d.Name(), func() (string, func()) {
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
		})
	}
	var out []string
	for _, n := range names {
		if took[n] > 0 && took["erofs-loop"] > 0 {
			out = append(out, fmt.Sprintf("%s %.2f", n, float64(took["erofs-loop"])/float64(took[n])))
		}
	}
	// Not Logf: that of a benchmark with sub-benchmarks shows with -v only.
	fmt.Printf("# %s: speed relative to erofs-loop: %s\n", b.Name(), strings.Join(out, ", "))
}

func mustRead(b *testing.B, path string, buf []byte) {
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

func BenchmarkSequentialCold(b *testing.B) {
	onEach(b, 0, func(b *testing.B, fresh func() (string, func())) {
		buf := make([]byte, 1<<20)
		b.SetBytes(128 << 20)
		for range b.N {
			b.StopTimer()
			dir, done := fresh()
			b.StartTimer()
			mustRead(b, filepath.Join(dir, bigFile), buf)
			b.StopTimer()
			done()
		}
	})
}

func BenchmarkSequentialWarm(b *testing.B) {
	onEach(b, 0, func(b *testing.B, fresh func() (string, func())) {
		buf := make([]byte, 1<<20)
		dir, done := fresh()
		defer done()
		mustRead(b, filepath.Join(dir, bigFile), buf)
		b.SetBytes(128 << 20)
		b.ResetTimer()
		for range b.N {
			mustRead(b, filepath.Join(dir, bigFile), buf)
		}
		b.StopTimer()
	})
}

// random reads 4096 pages in an order of its own.
func random(b *testing.B, dir string, buf []byte) {
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
	onEach(b, 0, func(b *testing.B, fresh func() (string, func())) {
		buf := make([]byte, 4096)
		for range b.N {
			b.StopTimer()
			dir, done := fresh()
			b.StartTimer()
			random(b, dir, buf)
			b.StopTimer()
			done()
		}
	})
}

func BenchmarkRandomWarm(b *testing.B) {
	onEach(b, 0, func(b *testing.B, fresh func() (string, func())) {
		buf := make([]byte, 4096)
		dir, done := fresh()
		defer done()
		mustRead(b, filepath.Join(dir, bigFile), make([]byte, 1<<20))
		b.ResetTimer()
		for range b.N {
			random(b, dir, buf)
		}
		b.StopTimer()
	})
}

// faults maps the big file and touches every page of it.
func faults(b *testing.B, dir string) {
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
	onEach(b, 0, func(b *testing.B, fresh func() (string, func())) {
		for range b.N {
			b.StopTimer()
			dir, done := fresh()
			b.StartTimer()
			faults(b, dir)
			b.StopTimer()
			done()
		}
	})
}

func BenchmarkMmapFaultsWarm(b *testing.B) {
	onEach(b, 0, func(b *testing.B, fresh func() (string, func())) {
		dir, done := fresh()
		defer done()
		faults(b, dir)
		b.ResetTimer()
		for range b.N {
			faults(b, dir)
		}
		b.StopTimer()
	})
}

// BenchmarkMount is what an image costs the first container that uses it, besides its check.
func BenchmarkMount(b *testing.B) {
	onEach(b, 0, func(b *testing.B, fresh func() (string, func())) {
		for range b.N {
			_, done := fresh()
			done()
		}
	})
}

func findLs(b *testing.B, dir string) {
	if out, err := exec.Command("sh", "-c", `find "$0" -ls >/dev/null`, dir).CombinedOutput(); err != nil {
		b.Fatalf("find: %v\n%s", err, out)
	}
}

func BenchmarkFindCold50000(b *testing.B) {
	onEach(b, 50_000, func(b *testing.B, fresh func() (string, func())) {
		for range b.N {
			b.StopTimer()
			dir, done := fresh()
			b.StartTimer()
			findLs(b, dir)
			b.StopTimer()
			done()
		}
	})
}

func BenchmarkFindWarm50000(b *testing.B) {
	onEach(b, 50_000, func(b *testing.B, fresh func() (string, func())) {
		dir, done := fresh()
		defer done()
		findLs(b, dir)
		b.ResetTimer()
		for range b.N {
			findLs(b, dir)
		}
		b.StopTimer()
	})
}
