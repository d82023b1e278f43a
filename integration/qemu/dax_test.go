package qemu

import (
	"slices"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

const bash = "/bin/bash"

// waiting is a dynamic program that reports its start and then waits for the end of its input.
var waiting = []string{bash, "-c", "echo up; read line"}

// In a guest that shares a pool, containers of different images run on the pool's own pages: all
// program text in memory is the host's shared memory, and a page of a file is the same page in all
// images with the file. Reading an image does not grow the page cache. An image added while the guest
// has the pool mounted works like the others.
func TestSharedPages(t *testing.T) {
	need(t)
	programs, err := testimage.Programs(bash)
	if err != nil {
		t.Fatal(err)
	}
	own := func(seed uint64) []testimage.Entry {
		return []testimage.Entry{testimage.File("own", 0o644, testimage.Noise(seed, 25<<20))}
	}
	for _, via := range []Via{VirtioPmem, Memmap} {
		t.Run(string(via), func(t *testing.T) {
			onEach(t, func(t *testing.T, k Kernel) {
				pool := poolOf(t, 128<<20,
					map[string][][]testimage.Entry{"one": {programs, own(1)}, "two": {own(2), programs}})
				r := boot(t, Machine{
					Kernel: k, Memory: pool.path, Via: via,
					Task: task.Task{
						Name: "share", Images: []string{"one", "two"}, Late: []string{"late"},
						Program: waiting, File: bash,
					},
				})
				if err := r.AwaitReady(); err != nil {
					t.Fatal(err)
				}
				pool.add(t, "late", [][]testimage.Entry{own(3), programs})
				if err := r.Resume(); err != nil {
					t.Fatal(err)
				}
				answer, err := r.Wait()
				if err != nil {
					t.Fatal(err)
				}
				checkShared(t, answer, 3)
			})
		})
	}
}

// checkShared checks that images share everything that they have in common.
func checkShared(t *testing.T, a task.Answer, images int) {
	t.Helper()
	t.Logf("kernel %s, mounts %q, page cache %+d KiB for %d bytes read", a.Kernel, a.Options, a.Cached, a.Read)
	for _, o := range a.Options {
		if !strings.Contains(o, "dax=always") {
			t.Errorf("mounted without DAX: %q", o)
		}
	}
	if len(a.Read) != images || len(a.Frames) != images || len(a.Text) != 2*images {
		t.Fatalf("%d images were read, %d were mapped and %d processes ran, want %d, %d and %d",
			len(a.Read), len(a.Frames), len(a.Text), images, images, 2*images)
	}
	// It may grow by metadata, which the kernel reads through the page cache of the device.
	for i, n := range a.Read {
		if most := int64(256); n < 25<<20 || a.Cached[i] > most {
			t.Errorf("image %d: the page cache grew by %d KiB while %d bytes were read, "+
				"want at most %d KiB for 25 MiB or more", i, a.Cached[i], n, most)
		}
		if len(a.Frames[i]) < 100 || !slices.Equal(a.Frames[i], a.Frames[0]) {
			t.Errorf("image %d has %q in other page frames than image 0: %x and %x", i, bash, a.Frames[i], a.Frames[0])
		}
	}
	type where struct {
		file string
		off  int64
	}
	first := map[where]uint64{}
	for i, pages := range a.Text {
		again := 0
		for _, p := range pages {
			if p.Frame < a.Memory[0] || p.Frame >= a.Memory[1] {
				t.Fatalf("process %d: page %d of %q is frame %#x, want one of the shared memory, %#x", i, p.Off/4096,
					p.File, p.Frame, a.Memory)
			}
			switch frame, ok := first[where{p.File, p.Off}]; {
			case !ok:
				first[where{p.File, p.Off}] = p.Frame
			case frame != p.Frame:
				t.Fatalf("process %d: page %d of %q is frame %#x, want %#x as in the processes before", i, p.Off/4096,
					p.File, p.Frame, frame)
			default:
				again++
			}
		}
		t.Logf("process %d: %d pages of text, %d in common with the processes before", i, len(pages), again)
		if i > 0 && again < 100 {
			t.Errorf("process %d has %d pages in common with those before, want 100 or more", i, again)
		}
	}
}

// The kernel shows the tree that tar unpacks.
func TestTree(t *testing.T) {
	need(t)
	entries := special(t)
	pool := poolOf(t, 64<<20, map[string][][]testimage.Entry{
		"other":   {{testimage.File("a", 0o644, testimage.Noise(1, 100))}},
		"special": {entries},
	})
	onEach(t, func(t *testing.T, k Kernel) {
		answer, err := boot(t, Machine{
			Kernel: k, Memory: pool.path, Via: VirtioPmem, Task: task.Task{Name: "list", Images: []string{"special"}},
		}).Wait()
		if err != nil {
			t.Fatal(err)
		}
		if err := listing.Diff(withoutRoot(unpacked(t, listing.Options{}, entries)),
			withoutRoot(answer.Trees[0])); err != nil {
			t.Error(err)
		}
	})
}

// withoutRoot drops the line of the root, whose time is in no layer.
func withoutRoot(lines []string) []string { return lines[1:] }
