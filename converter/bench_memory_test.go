package converter_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// helperEnv makes the test binary convert an image and print its peak memory. It is a separate
// process, because a peak cannot be reset and includes everything else.
const helperEnv = "DAXFS_TEST_CONVERT_MEMORY"

func convertHelper(memory string) error {
	n, err := strconv.ParseInt(memory, 10, 64)
	if err != nil {
		return err
	}
	src, err := source.Parse(os.Args[1], source.Config{})
	if err != nil {
		return err
	}
	defer src.Close()
	if _, err := converter.Convert(context.Background(), src, os.Args[2], converter.Options{Memory: n}); err != nil {
		return err
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	_, rest, _ := bytes.Cut(status, []byte("VmHWM:"))
	var kib int64
	if _, err := fmt.Sscan(string(rest), &kib); err != nil {
		return err
	}
	_, err = fmt.Println(kib)
	return err
}

// peakMemory converts an image in a separate process and returns its peak resident memory in bytes.
func peakMemory(tb testing.TB, src string, memory int64) int64 {
	tb.Helper()
	cmd := exec.Command(os.Args[0], src, filepath.Join(tb.TempDir(), "image"))
	cmd.Env = append(os.Environ(), fmt.Sprint(helperEnv, "=", memory))
	out, err := cmd.Output()
	if err != nil {
		tb.Fatalf("%v: %s", err, out)
	}
	var kib int64
	if _, err := fmt.Sscan(string(out), &kib); err != nil {
		tb.Fatal(err)
	}
	return kib << 10
}

// memoryBound returns the documented memory bound for an image of files with this many concurrent layers.
func memoryBound(memory int64, layers, files int) int64 {
	const program = 48 << 20 // memory of an idle process that imports all sources
	return program + max(memory, 32<<20) + int64(layers)*16<<20 + int64(files)<<10
}

// TestMemoryIsBounded: layers of 96 MiB wait for the first one within the limit.
func TestMemoryIsBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("slow: converts 1 GiB")
	}
	if slow.RaceDetector {
		t.Skip("the race detector's own memory is several times the program's")
	}
	var layers []ocitest.Layer
	for i := range uint64(3) {
		layers = append(layers, ocitest.Layer{Tar: treeTar(i, 96), Compression: ocitest.Gzip})
	}
	l := newLayout(t, layers...)
	for _, src := range []string{"oci:" + l.Dir, "docker://" + push(t, l.Dir)} {
		for _, memory := range []int64{16 << 20, 64 << 20} {
			got, most := peakMemory(t, src, memory), memoryBound(memory, len(layers), 300)
			t.Logf("%s, limit %d MiB: peak %d MiB, bound %d MiB", src, memory>>20, got>>20, most>>20)
			if got > most {
				t.Errorf("%s: with a limit of %d the peak is %d bytes, expected at most %d", src, memory, got, most)
			}
		}
	}
}

// BenchmarkMemory reports the peak for several limits and a realistic image; files need no limit.
func BenchmarkMemory(b *testing.B) {
	dir, _, unpacked := benchLayout(b, ocitest.Gzip)
	src := "docker://" + push(b, dir)
	for _, mib := range []int64{16, 64, 256} {
		b.Run(fmt.Sprintf("%dMiB", mib), func(b *testing.B) {
			b.SetBytes(unpacked)
			var peak int64
			for b.Loop() {
				peak = max(peak, peakMemory(b, src, mib<<20))
			}
			b.ReportMetric(float64(peak)/(1<<20), "peak-MiB")
		})
	}
}
