package converter_test

import (
	"context"
	"crypto/sha256"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
)

// benchImage is an image like Debian with Python or Node: four layers made from this machine's /usr,
// some 400 MB in tens of thousands of files.
var benchImage = sync.OnceValue(func() []ocitest.Layer {
	tb := &testing.B{}
	var layers []ocitest.Layer
	for _, l := range []struct {
		max  int64
		dirs []string
	}{
		{140 << 20, []string{"/usr/bin", "/usr/sbin", "/usr/lib/x86_64-linux-gnu"}},
		{150 << 20, []string{
			"/usr/lib/python3", "/usr/lib/python3.11", "/usr/include", "/usr/src", "/usr/lib/gcc",
			"/usr/lib/git-core",
		}},
		{110 << 20, []string{"/usr/share", "/usr/local"}},
		{2 << 20, []string{"/etc"}},
	} {
		layers = append(layers, ocitest.Layer{Tar: ocitest.TarTree(tb, l.max, l.dirs...)})
	}
	return layers
})

// benchLayout writes the image as a layout and returns directory, blobs and unpacked size.
func benchLayout(b *testing.B, c ocitest.Compression) (dir string, blobs []string, unpacked int64) {
	b.Helper()
	l := ocitest.NewLayout(b, filepath.Join(b.TempDir(), "layout"))
	layers := append([]ocitest.Layer(nil), benchImage()...)
	for i := range layers {
		layers[i].Compression = c
		unpacked += int64(len(layers[i].Tar))
	}
	l.Tag("", l.Manifest(ocitest.LinuxAMD64, layers...))
	img := benchFind(b, l.Dir)
	for _, y := range img.Layers {
		blobs = append(blobs, l.BlobPath(y.Desc.Digest))
	}
	return l.Dir, blobs, unpacked
}

func benchFind(b *testing.B, dir string) *source.Image {
	b.Helper()
	img, err := benchSource(b, dir).Image(context.Background(), source.Host())
	if err != nil {
		b.Fatal(err)
	}
	return img
}

func benchSource(b *testing.B, dir string) source.Source {
	b.Helper()
	src, err := source.Parse("oci:"+dir, source.Config{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { src.Close() })
	return src
}

func benchConvert(b *testing.B, dir, out string, o converter.Options) *converter.Result {
	b.Helper()
	res, err := converter.Convert(context.Background(), benchSource(b, dir), out, o)
	if err != nil {
		b.Fatal(err)
	}
	return res
}

// atOnce calls f for all items, with one goroutine per core.
func atOnce[T any](b *testing.B, items []T, f func(T) error) {
	b.Helper()
	var g errgroup.Group
	g.SetLimit(max(2, runtime.GOMAXPROCS(0)))
	for _, item := range items {
		g.Go(func() error { return f(item) })
	}
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
}

// decompressAndHash is the minimum work of a verified conversion, as a plain loop: read, hash,
// decompress with the same library, and hash all layers concurrently.
func decompressAndHash(b *testing.B, blobs []string) {
	b.Helper()
	atOnce(b, blobs, func(name string) error {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		z, err := gzip.NewReader(io.TeeReader(f, sha256.New()))
		if err != nil {
			return err
		}
		_, err = io.Copy(sha256.New(), z)
		return err
	})
}

// pipelined does the same with the reader of Convert.
func pipelined(b *testing.B, img *source.Image) {
	b.Helper()
	atOnce(b, img.Layers, func(l source.Layer) error {
		rc, err := l.Open(context.Background())
		if err != nil {
			return err
		}
		r, err := blob.NewReader(context.Background(), rc, blob.Spec{
			MediaType: l.Desc.MediaType, Digest: l.Desc.Digest, Size: l.Desc.Size, DiffID: l.DiffID,
		})
		if err != nil {
			return err
		}
		return r.Finish(nil)
	})
}

// cost is wall time, and the processor time of this process and its children. On a busy machine,
// processor time is the more reliable measure.
type cost struct{ wall, cpu time.Duration }

func (c cost) plus(d cost) cost { return cost{c.wall + d.wall, c.cpu + d.cpu} }

// timed runs f after a garbage collection.
func timed(f func()) cost {
	runtime.GC()
	start, before := time.Now(), cpuTime()
	f()
	return cost{time.Since(start), cpuTime() - before}
}

func cpuTime() (t time.Duration) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if unix.Getrusage(who, &u) == nil {
			t += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
	return t
}

// report adds the mean of a cost to the results.
func (c cost) report(b *testing.B, name string) {
	b.ReportMetric(c.wall.Seconds()/float64(b.N), name+"-s")
	b.ReportMetric(c.cpu.Seconds()/float64(b.N), name+"-cpu-s")
}

// BenchmarkConvertGzip alternates conversions from gzip layers with bare decompression and hashing: as a
// plain loop (the goal is x-decompress ≤ 1.15) and as a pipeline (x-pipelined), which keeps both cores busy.
func BenchmarkConvertGzip(b *testing.B) {
	dir, blobs, unpacked := benchLayout(b, ocitest.Gzip)
	img := benchFind(b, dir)
	out := filepath.Join(b.TempDir(), "image")
	var base, pipe, conv cost
	var res *converter.Result
	b.SetBytes(unpacked)
	b.ReportAllocs()
	for b.Loop() {
		base = base.plus(timed(func() { decompressAndHash(b, blobs) }))
		pipe = pipe.plus(timed(func() { pipelined(b, img) }))
		conv = conv.plus(timed(func() { res = benchConvert(b, dir, out, converter.Options{}) }))
		os.Remove(out) // or the next conversion would have to free its pages
	}
	base.report(b, "decompress")
	pipe.report(b, "pipelined")
	conv.report(b, "convert")
	b.ReportMetric(conv.wall.Seconds()/base.wall.Seconds(), "x-decompress")
	b.ReportMetric(conv.wall.Seconds()/pipe.wall.Seconds(), "x-pipelined")
	b.ReportMetric(conv.cpu.Seconds()/base.cpu.Seconds(), "x-decompress-cpu")
	b.ReportMetric(float64(res.Stats.Inodes), "inodes")
}

// copyAndHash is the minimum work of a verified conversion of uncompressed layers, as a plain loop:
// read, hash and write all layers concurrently.
func copyAndHash(b *testing.B, blobs []string, dir string) {
	b.Helper()
	atOnce(b, blobs, func(name string) error {
		in, err := os.Open(name)
		if err != nil {
			return err
		}
		defer in.Close()
		out, err := os.Create(filepath.Join(dir, filepath.Base(name)))
		if err != nil {
			return err
		}
		defer out.Close()
		h := sha256.New()
		buf := make([]byte, 128<<10) // like cp
		for {
			n, err := in.Read(buf)
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			h.Write(buf[:n])
			if _, err := out.Write(buf[:n]); err != nil {
				return err
			}
		}
	})
}

// BenchmarkConvertPlain alternates conversions from uncompressed layers with cp of the same blobs: the
// goal is x-cp ≤ 2. x-verified-copy compares with copying and hashing on all cores, which no
// conversion can avoid. The blobs are in the page cache, or on disk only.
func BenchmarkConvertPlain(b *testing.B) {
	for _, cached := range []bool{true, false} {
		b.Run(map[bool]string{true: "cached", false: "disk"}[cached], func(b *testing.B) { convertPlain(b, cached) })
	}
}

func convertPlain(b *testing.B, cached bool) {
	dir, blobs, unpacked := benchLayout(b, ocitest.None)
	out := filepath.Join(b.TempDir(), "image")
	copies := b.TempDir()
	var cp, verified, conv cost
	b.SetBytes(unpacked)
	b.ReportAllocs()
	remove := func() { // every copy writes new files, like every conversion
		os.Remove(out)
		for _, f := range blobs {
			os.Remove(filepath.Join(copies, filepath.Base(f)))
			if !cached {
				uncache(b, f)
			}
		}
	}
	for b.Loop() {
		remove()
		cp = cp.plus(timed(func() {
			args := append([]string{"--reflink=never"}, blobs...)
			if msg, err := exec.Command("cp", append(args, copies)...).CombinedOutput(); err != nil {
				b.Fatalf("cp: %v: %s", err, msg)
			}
		}))
		remove()
		verified = verified.plus(timed(func() { copyAndHash(b, blobs, copies) }))
		remove()
		conv = conv.plus(timed(func() { benchConvert(b, dir, out, converter.Options{}) }))
	}
	cp.report(b, "cp")
	conv.report(b, "convert")
	verified.report(b, "verified-copy")
	b.ReportMetric(conv.wall.Seconds()/cp.wall.Seconds(), "x-cp")
	b.ReportMetric(conv.wall.Seconds()/verified.wall.Seconds(), "x-verified-copy")
	b.ReportMetric(conv.cpu.Seconds()/cp.cpu.Seconds(), "x-cp-cpu")
}

// uncache leaves the contents of a file on disk only.
func uncache(b *testing.B, name string) {
	b.Helper()
	f, err := os.Open(name)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		b.Fatal(err)
	}
}
