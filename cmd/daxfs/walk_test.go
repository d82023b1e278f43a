package main

import (
	"bytes"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// imageOf converts an image of small files, 50 in a directory.
func imageOf(t *testing.T, files int) string {
	t.Helper()
	var entries []File
	for i := range files {
		entries = append(entries, Reg(fmt.Sprintf("dir-%d/file-%d", i/50, i), fmt.Sprint(i)))
	}
	dir := t.TempDir()
	l := ocitest.NewLayout(t, filepath.Join(dir, "layout"))
	l.Tag("", l.Manifest(ocitest.LinuxAMD64, ocitest.Layer{Tar: Tar(entries...)}))
	name := filepath.Join(dir, "image")
	runOK(t, "convert", "-q", "-o", name, "oci:"+l.Dir)
	return name
}

func runOK(t *testing.T, args ...string) {
	t.Helper()
	var stderr bytes.Buffer
	if status := run(t.Context(), append([]string{"daxfs"}, args...), nil, io.Discard, &stderr); status != statusOK {
		t.Fatalf("daxfs %s: status %d: %s", strings.Join(args, " "), status, stderr.String())
	}
}

// TestWalksAllocateLittle: walking through an image allocates no large buffer for each entry.
func TestWalksAllocateLittle(t *testing.T) {
	const few, many = 500, 2500
	small, large := imageOf(t, few), imageOf(t, many)
	allocated := func(args ...string) uint64 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		runOK(t, args...)
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}
	for _, args := range [][]string{{"export"}, {"ls", "-lR"}, {"ls", "--json", "-R"}, {"verify"}, {"inspect"}} {
		a, b := allocated(append(args, small)...), allocated(append(args, large)...)
		per := (int64(b) - int64(a)) / (many - few)
		t.Logf("daxfs %s: %d bytes for each entry", strings.Join(args, " "), per)
		if per > 8<<10 {
			t.Errorf("daxfs %s allocates %d bytes for each entry, expected at most %d",
				strings.Join(args, " "), per, 8<<10)
		}
	}
}
