package qemu

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// kernelModule returns daxfs.ko, from the path in DAXFS_KO, and its kernel. The module is not part of this project.
func kernelModule(t *testing.T) (Kernel, map[string][]byte) {
	t.Helper()
	kernels := need(t)
	path := os.Getenv("DAXFS_KO")
	if path == "" {
		t.Skip("DAXFS_KO is not set: no kernel module daxfs.ko to test with")
	}
	module, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range kernels {
		if bytes.Contains(module, []byte("vermagic="+k.Release+" ")) {
			return k, map[string][]byte{"daxfs.ko": module}
		}
	}
	t.Fatalf("the module of DAXFS_KO=%q was built for none of the kernels: %+v", path, kernels)
	return Kernel{}, nil
}

const (
	ramMiB = 512          // of the guest
	behind = ramMiB << 20 // start of the shared memory
)

// The DAXFS half of images, in two overlapping windows of a pool and in a separate file, mounts with
// all checks of the kernel module, shows the tree of tar as far as it can, and runs static and dynamic
// programs. If the memory is also a block device, the same bytes mounted as EROFS meanwhile show everything.
func TestKernelModule(t *testing.T) {
	k, files := kernelModule(t)
	programs, err := testimage.Programs(bash)
	if err != nil {
		t.Fatal(err)
	}
	images := map[string][]testimage.Entry{"special": special(t), "odd": odd(t)}
	for key, entries := range images {
		have := map[string]bool{}
		for _, e := range entries {
			have[e.Name] = true
		}
		for _, e := range programs {
			if !have[e.Name] { // such as /bin
				entries = append(entries, e)
			}
		}
		images[key] = entries
	}
	layers := map[string][][]testimage.Entry{}
	var want, wantAll [][]string
	keys := []string{"special", "odd"}
	for _, key := range keys {
		layers[key] = [][]testimage.Entry{images[key]}
		want = append(want, unpacked(t, listing.Options{NoTimes: true, NoXattrs: true, NoSpecial: true}, images[key]))
		wantAll = append(wantAll, unpacked(t, listing.Options{}, images[key]))
	}
	for _, c := range []struct {
		name   string
		via    Via
		images []string
		memory func(*testing.T) (path string, image int64)
		want   [][]string
	}{
		{
			"windows of a pool in reserved memory", Reserved, keys,
			func(t *testing.T) (string, int64) { return poolOf(t, 128<<20, layers).path, 0 }, want,
		},
		{
			"windows of a pool in persistent memory", Memmap, keys,
			func(t *testing.T) (string, int64) { return poolOf(t, 128<<20, layers).path, 0 },
			slices.Concat(want, wantAll),
		},
		{
			"image file", Reserved, nil,
			func(t *testing.T) (string, int64) { return imageFile(t, images["special"]) }, want[:1],
		},
		{
			"odd image file", Reserved, nil,
			func(t *testing.T) (string, int64) { return imageFile(t, images["odd"]) }, want[1:],
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			memory, image := c.memory(t)
			m := Machine{
				Kernel: k, Memory: memory, Via: c.via, Files: files, RAM: ramMiB,
				Task: task.Task{
					Name: "daxfs", Module: "/daxfs.ko", Images: c.images, ImageSize: image,
					Program: []string{bash, "-c", "read line </etc/hostname; echo $line; /bin/busybox uname -s"},
				},
			}
			if c.via == Reserved {
				info, err := os.Stat(m.Memory)
				if err != nil {
					t.Fatal(err)
				}
				m.Task.Phys, m.Task.Size = behind, info.Size()
			}
			answer, err := boot(t, m).Wait()
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("kernel %s, mounts %q", answer.Kernel, answer.Options)
			if len(answer.Trees) != len(c.want) {
				t.Fatalf("%d trees were listed, want %d", len(answer.Trees), len(c.want))
			}
			for i, want := range c.want {
				if err := listing.Diff(withoutRoot(want), withoutRoot(answer.Trees[i])); err != nil {
					t.Errorf("%s: %v", answer.Options[i], err)
				}
			}
			for _, out := range answer.Output {
				if out != "tiny\nLinux\n" {
					t.Errorf("a program run from the mount printed %q", out)
				}
			}
			if n := 2 * max(len(c.images), 1); len(answer.Output) != n {
				t.Errorf("programs ran %d times, want %d: once from each mount and once from an overlay over it",
					len(answer.Output), n)
			}
		})
	}
}

// An image in a dma-buf is mounted from its descriptor, and the mount keeps the buffer.
func TestKernelModuleDMABuf(t *testing.T) {
	k, files := kernelModule(t)
	entries := special(t)
	image, size := imageFile(t, entries)
	body, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	files["image"] = body
	answer, err := boot(t, Machine{
		Kernel: k, Memory: image, Via: Reserved, Files: files, RAM: ramMiB, Modules: []string{"vgem"},
		Task: task.Task{
			Name: "dmabuf", Module: "/daxfs.ko", ImageSize: size,
			Program: []string{"/bin/busybox", "cat", "/etc/hostname"},
		},
	}).Wait()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("kernel %s, mount %q", answer.Kernel, answer.Options)
	want := unpacked(t, listing.Options{NoTimes: true, NoXattrs: true, NoSpecial: true}, entries)
	if err := listing.Diff(withoutRoot(want), withoutRoot(answer.Trees[0])); err != nil {
		t.Error(err)
	}
	if !slices.Equal(answer.Output, []string{"tiny\n"}) {
		t.Errorf("the program printed %q", answer.Output)
	}
}

// What the kernel module shares: read(2) does not grow the page cache, but mapped files are copied.
func TestKernelModuleMemory(t *testing.T) {
	k, files := kernelModule(t)
	programs, err := testimage.Programs(bash)
	if err != nil {
		t.Fatal(err)
	}
	memory := poolOf(t, 128<<20, map[string][][]testimage.Entry{
		"one": {programs, {testimage.File("own", 0o644, testimage.Noise(1, 90<<20))}},
	}).path
	info, err := os.Stat(memory)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := boot(t, Machine{
		Kernel: k, Memory: memory, Via: Reserved, Files: files, RAM: ramMiB,
		Task: task.Task{
			Name: "share", Module: "/daxfs.ko", Phys: behind, Size: info.Size(), Images: []string{"one"},
			Program: waiting,
		},
	}).Wait()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("kernel %s, mount %q, private clean pages of the processes %v KiB, page cache +%d KiB for %d bytes read",
		answer.Kernel, answer.Options, answer.Clean, answer.Cached, answer.Read)
	if answer.Read[0] < 90<<20 || answer.Cached[0] >= 1024 {
		t.Errorf("page cache grew by %d KiB while %d bytes were read, want less than 1024 KiB for 90 MiB or more",
			answer.Cached, answer.Read)
	}
	for i, kib := range answer.Clean {
		if kib == 0 {
			t.Errorf("process %d has no copies: docs/benchmarks.md and the driver say that it has", i)
		}
	}
}

// odd is a layer with the smallest and largest values that both halves can hold, and sizes around
// limits: of directories (arrays in one half, blocks in the other), of names, links, paths and numbers.
func odd(t *testing.T) []testimage.Entry {
	t.Helper()
	list, err := testimage.Busybox()
	if err != nil {
		t.Skip(err)
	}
	list = append(list, testimage.Dir("dirs", 0o7777).Owned(math.MaxUint32-1, math.MaxUint32-1))
	for _, n := range []int{0, 1, 14, 15, 16, 17, 271, 272, 273, 4096} {
		dir := fmt.Sprintf("dirs/%d", n)
		list = append(list, testimage.Dir(dir, 0o755))
		for i := range n {
			list = append(list, testimage.File(fmt.Sprintf("%s/%d", dir, i), 0o644, nil))
		}
	}
	list = append(list, testimage.Dir("names", 0o755))
	for i := range 300 {
		name := fmt.Sprintf("%03d", i)
		list = append(list, testimage.Symlink("names/"+name+strings.Repeat("n", 255-len(name)), name))
	}
	for c := 1; c < 256; c++ {
		if c != '/' && c != '.' {
			list = append(list, testimage.File("names/"+string([]byte{byte(c)}), 0o644, []byte{byte(c)}))
		}
	}
	for _, name := range []string{"...", "..a", ".a", " ", ".wh", "x.wh.y"} {
		list = append(list, testimage.File("names/"+name, 0o600, nil))
	}
	list = append(list, testimage.Dir("links", 0o755))
	for _, n := range []int{1, 2, 4080, 4094, 4095} {
		list = append(list, testimage.Symlink(fmt.Sprintf("links/%d", n), strings.Repeat("t", n)))
	}
	deep := "deep"
	list = append(list, testimage.Dir(deep, 0o755))
	for range 400 {
		deep += "/d"
		list = append(list, testimage.Dir(deep, 0o711))
	}
	list = append(list, testimage.File(deep+"/end", 0o444, []byte("end")))
	many := testimage.File("many-attributes", 0o6755, []byte("x")).Owned(math.MaxUint32-1, 1)
	for i := range 60 {
		many = many.Xattr(fmt.Sprintf("user.attribute.%d", i), strings.Repeat("v", i))
	}
	return append(list, many)
}

// imageFile makes a self-contained image of one layer, in a file padded to a multiple of 2 MiB.
func imageFile(t *testing.T, entries []testimage.Entry) (path string, size int64) {
	t.Helper()
	contents := &treetest.Store{}
	img, err := contents.Image(merge(t, contents, [][]testimage.Entry{entries}), daxfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, img, 0o600); err != nil {
		t.Fatal(err)
	}
	size = int64(len(img))
	if err := os.Truncate(path, (size+2<<20-1)&^(2<<20-1)); err != nil {
		t.Fatal(err)
	}
	return path, size
}
