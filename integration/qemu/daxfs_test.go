package qemu

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// The DAXFS half of an image, of a window of a pool and of a file of its own, mounts with all checks of the kernel
// module, shows what tar unpacks as far as it can, and runs programs, static and dynamic.
//
// DAXFS_KO is the path of daxfs.ko, built for the guest's kernel. The module is no part of this project.
func TestKernelModule(t *testing.T) {
	k := need(t)
	path := os.Getenv("DAXFS_KO")
	if path == "" {
		t.Skip("DAXFS_KO is not set: no kernel module daxfs.ko to test with")
	}
	module, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	programs, err := testimage.Programs(bash)
	if err != nil {
		t.Fatal(err)
	}
	entries := special(t)
	have := map[string]bool{}
	for _, e := range entries {
		have[e.Name] = true
	}
	for _, e := range programs {
		if !have[e.Name] { // such as /bin
			entries = append(entries, e)
		}
	}
	want := withoutRoot(unpacked(t, listing.Options{NoTimes: true, NoXattrs: true, NoSpecial: true}, entries))

	const ram = 512 << 20 // of the guest: the shared memory begins behind it
	for _, c := range []struct {
		name string
		via  Via
		make func(t *testing.T) (memory string, off, size int64)
	}{
		{"window of a pool in reserved memory", Reserved, func(t *testing.T) (string, int64, int64) {
			return window(t, entries)
		}},
		{"window of a pool in persistent memory", Memmap, func(t *testing.T) (string, int64, int64) {
			return window(t, entries)
		}},
		{"image file", Reserved, func(t *testing.T) (string, int64, int64) {
			memory := imageFile(t, entries)
			info, err := os.Stat(memory)
			if err != nil {
				t.Fatal(err)
			}
			return memory, 0, info.Size()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			memory, off, size := c.make(t)
			answer, err := boot(t, Machine{
				Kernel: k, Memory: memory, Via: c.via, Files: map[string][]byte{"daxfs.ko": module},
				Task: task.Task{
					Name: "daxfs", Module: "/daxfs.ko", Phys: uint64(ram + off), Size: size,
					Program: []string{bash, "-c", "read line </etc/hostname; echo $line; /bin/busybox uname -s"},
				},
			}).Wait()
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("kernel %s, mount %q", answer.Kernel, answer.Options)
			if err := listing.Diff(want, withoutRoot(answer.Trees[0])); err != nil {
				t.Error(err)
			}
			for _, out := range answer.Output {
				if out != "tiny\nLinux\n" {
					t.Errorf("a program run from the mount printed %q", out)
				}
			}
			if len(answer.Output) != 2 {
				t.Errorf("programs ran %d times, want once from the mount and once from an overlay over it", len(answer.Output))
			}
		})
	}
}

// window makes a pool of two images and returns its file and the window of the second.
func window(t *testing.T, entries []testimage.Entry) (memory string, off, size int64) {
	t.Helper()
	memory = poolOf(t, 64<<20, map[string][][]testimage.Entry{
		"other": {{testimage.File("a", 0o644, testimage.Noise(1, 100))}},
		"tree":  {entries},
	})
	f, err := os.Open(memory)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	catalogue, err := pool.ReadCatalogue(f)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range catalogue.Images {
		if m.Key == "tree" {
			return memory, m.Off, m.Size
		}
	}
	t.Fatal("the image is not in the catalogue")
	return "", 0, 0
}

// imageFile makes a self-contained image of one layer, filled up to a multiple of 2 MiB.
func imageFile(t *testing.T, entries []testimage.Entry) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Contents go through the same parser as everywhere; the builder stores them one after another.
	contents := &memoryStore{}
	root := merge(t, contents, [][]testimage.Entry{entries})
	b := daxfs.NewBuilder(f, daxfs.BuilderOptions{})
	first := map[*daxfs.Node]string{}
	var add func(path string, n *daxfs.Node)
	add = func(path string, n *daxfs.Node) {
		t.Helper()
		if name, ok := first[n]; ok {
			if err := b.Link(path, name); err != nil {
				t.Fatal(err)
			}
			return
		}
		first[n] = path
		own := *n
		own.Entries = nil
		var body io.Reader
		if n.Data.Size > 0 {
			body = bytes.NewReader(contents.get(n.Data))
		}
		if err := b.Add(path, own, body); err != nil {
			t.Fatal(err)
		}
		for name, child := range n.Entries {
			add(path+"/"+name, child)
		}
	}
	add("", root)
	if _, err := b.Finish(); err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate((info.Size() + 2<<20 - 1) &^ (2<<20 - 1)); err != nil {
		t.Fatal(err)
	}
	return path
}
