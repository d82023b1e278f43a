package pool

import (
	"context"
	"crypto/sha256"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// scrubPool is a pool with contents of size bytes, in files of 4 MiB and of 50,000 bytes.
func scrubPool(b *testing.B, r region.Region, size int64) *Pool {
	b.Helper()
	p, err := Create(r, filepath.Join(b.TempDir(), "index"), Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.Close() })
	for i := range size / (5 << 20) {
		bodies := [][]byte{random(uint64(i), 4<<20)}
		for k := range 20 {
			bodies = append(bodies, random(uint64(1000+20*i)+uint64(k), 50_000))
		}
		addImage(b, p, fmt.Sprint(i), bodies...)
	}
	return p
}

// BenchmarkScrub reads a pool in memory, and one in a file, as fast as one processor can. The file is
// read from the disk each time. GB/s is the reading speed:
//
//	go test ./pool -run '^$' -bench 'Scrub$|ScrubSlowly' -benchtime 5x
func BenchmarkScrub(b *testing.B) {
	const size = 512 << 20
	for name, open := range map[string]func(b *testing.B) region.Region{
		"memory": func(*testing.B) region.Region { return newSimRegion(2*size, &faults{}) },
		"file":   func(b *testing.B) region.Region { return openRegion(b, b.TempDir(), 2*size) },
	} {
		b.Run(name, func(b *testing.B) {
			p := scrubPool(b, open(b), size)
			read := int64(0)
			for b.Loop() {
				done, err := p.Scrub(ctx, ScrubOptions{}, func(d Damage) { b.Fatal(d) })
				if err != nil {
					b.Fatal(err)
				}
				read += done.Bytes
			}
			b.ReportMetric(float64(read)/1e9/b.Elapsed().Seconds(), "GB/s")
		})
	}
}

// defaultRate is the daemon's default.
var defaultRate = int64(config.Default().Pool.Scrub)

// BenchmarkScrubSlowly reads a pool at the daemon's default rate, and reports the processor use.
func BenchmarkScrubSlowly(b *testing.B) {
	p := scrubPool(b, openRegion(b, b.TempDir(), 64<<20), 32<<20)
	began, before := time.Now(), processorTime(b)
	for b.Loop() {
		if _, err := p.Scrub(ctx, ScrubOptions{Rate: defaultRate}, func(d Damage) { b.Fatal(d) }); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(100*float64(processorTime(b)-before)/float64(time.Since(began)), "%cpu")
}

func processorTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkScrubBeside measures how much a scrub at the default rate slows down work that takes all
// processors: computation, and moving memory. Runs of three seconds with and without a scrub
// alternate, and so does the order of each pair, because the speed of machines varies over time.
// lost-% is the median loss of work:
//
//	go test ./pool -run '^$' -bench ScrubBeside -benchtime 25x
func BenchmarkScrubBeside(b *testing.B) {
	const run = 3 * time.Second
	for name, work := range map[string]func(a, b []byte){
		"hash": func(a, _ []byte) { sha256.Sum256(a) },
		"copy": func(a, b []byte) { copy(a, b) },
	} {
		b.Run(name, func(b *testing.B) {
			p := scrubPool(b, openRegion(b, b.TempDir(), 512<<20), 256<<20)
			beside := func() float64 {
				ctx, stop := context.WithCancel(ctx)
				done := make(chan struct{})
				go func() {
					defer close(done)
					_, _ = p.Scrub(ctx, ScrubOptions{Rate: defaultRate}, func(Damage) { b.Error("damage") })
				}()
				n := workFor(run, work)
				stop()
				<-done
				return n
			}
			var lost []float64
			for b.Loop() {
				var with, without float64
				if len(lost)%2 == 0 {
					without, with = workFor(run, work), beside()
				} else {
					with, without = beside(), workFor(run, work)
				}
				lost = append(lost, 100*(1-with/without))
			}
			slices.Sort(lost)
			b.ReportMetric((lost[(len(lost)-1)/2]+lost[len(lost)/2])/2, "lost-%")
		})
	}
}

// workFor works on all processors, and returns the amount of work per second.
func workFor(d time.Duration, work func(a, b []byte)) float64 {
	var n atomic.Int64
	var workers sync.WaitGroup
	began := time.Now()
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			x, y := make([]byte, 4<<20), make([]byte, 4<<20)
			for time.Since(began) < d {
				work(x, y)
				n.Add(1)
			}
		})
	}
	workers.Wait()
	return float64(n.Load()) / time.Since(began).Seconds()
}
