package pool

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// tmpfsRegion makes a region on the tmpfs that every Linux system has, or skips.
func tmpfsRegion(t testing.TB, size int64) (region.Region, string) {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "pooltest")
	if err != nil {
		t.Skip("no tmpfs at /dev/shm: ", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r, err := region.Open(region.Config{
		Kind: region.KindTmpfs, Path: filepath.Join(dir, "pool"),
		Size: size, Create: true,
	})
	if err != nil {
		t.Skip("no tmpfs at /dev/shm: ", err)
	}
	t.Cleanup(func() { r.Close() })
	return r, dir
}

// BenchmarkPut puts fresh contents into a pool on tmpfs and reports the ratio to copying the same
// bytes into a file on tmpfs: with write, and with memcpy into a mapping. Both fill fresh pages.
func BenchmarkPut(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 10, 1 << 20, 64 << 20} {
		b.Run(fmt.Sprintf("size=%dKiB", size>>10), func(b *testing.B) {
			const total = 256 << 20
			r, dir := tmpfsRegion(b, 2*total)
			p, err := Create(r, filepath.Join(dir, "index"), Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer p.Close()
			body := random(1, size)
			reader := bytes.NewReader(nil)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			var spent, written, mapped time.Duration
			for i := 0; i < b.N; {
				batch := p.Begin()
				n := min(total/size, b.N-i)
				start := time.Now()
				for k := range n {
					// Different first and last bytes make different contents.
					body[0], body[1], body[2], body[size-1] = byte(i+k), byte((i+k)>>8), byte((i+k)>>16), byte(i+k)
					reader.Reset(body)
					if _, err := batch.Put(ctx, int64(size), reader); err != nil {
						b.Fatal(err)
					}
				}
				spent += time.Since(start)
				i += n
				b.StopTimer()
				batch.Discard()
				written += plainWrite(b, filepath.Join(dir, "plain"), body, n)
				mapped += plainCopy(b, filepath.Join(dir, "plain"), body, n)
				b.StartTimer()
			}
			b.ReportMetric(written.Seconds()/spent.Seconds(), "x-write")
			b.ReportMetric(mapped.Seconds()/spent.Seconds(), "x-memcpy")
		})
	}
}

// plainWrite writes body n times in sequence into a fresh file.
func plainWrite(b *testing.B, path string, body []byte, n int) time.Duration {
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer os.Remove(path)
	defer f.Close()
	start := time.Now()
	for k := range n {
		if _, err := f.WriteAt(body, int64(k*len(body))); err != nil {
			b.Fatal(err)
		}
	}
	return time.Since(start)
}

// plainCopy copies body n times into a mapping of a fresh file.
func plainCopy(b *testing.B, path string, body []byte, n int) time.Duration {
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer os.Remove(path)
	defer f.Close()
	if err := f.Truncate(int64(n * len(body))); err != nil {
		b.Fatal(err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, n*len(body), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Munmap(m)
	start := time.Now()
	for k := range n {
		copy(m[k*len(body):], body)
	}
	return time.Since(start)
}

// BenchmarkCommonBeginning puts files of one size that differ only in their last bytes. The time per
// byte must not grow with the number of files.
func BenchmarkCommonBeginning(b *testing.B) {
	const size = 512 << 10
	for _, files := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("files=%d", files), func(b *testing.B) {
			body := random(1, size)
			reader := bytes.NewReader(nil)
			b.SetBytes(int64(files) * size)
			for range b.N {
				b.StopTimer()
				r, dir := tmpfsRegion(b, int64(files)*size*2+64<<20)
				p, err := Create(r, filepath.Join(dir, "index"), Options{})
				if err != nil {
					b.Fatal(err)
				}
				batch := p.Begin()
				b.StartTimer()
				for k := range files {
					body[size-2], body[size-1] = byte(k), byte(k>>8)
					reader.Reset(body)
					if _, err := batch.Put(ctx, size, reader); err != nil {
						b.Fatal(err)
					}
				}
				b.StopTimer()
				batch.Discard()
				if err := errors.Join(p.Close(), r.Close(), os.RemoveAll(dir)); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
