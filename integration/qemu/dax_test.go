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

// waiting is a dynamic program that says that it is up and then waits for the end of its input.
var waiting = []string{bash, "-c", "echo up; read line"}

// In a guest that shares a pool, containers of two images run on the pool's own pages: no process has file pages in
// RAM, reading everything grows no page cache, and a library that both images hold is the same physical page.
func TestSharedPages(t *testing.T) {
	k := need(t)
	for _, via := range []Via{VirtioPmem, Memmap} {
		t.Run(string(via), func(t *testing.T) {
			programs, err := testimage.Programs(bash)
			if err != nil {
				t.Fatal(err)
			}
			own := func(seed uint64) []testimage.Entry {
				return []testimage.Entry{testimage.File("own", 0o644, testimage.Noise(seed, 45<<20))}
			}
			memory := poolOf(t, 128<<20, map[string][][]testimage.Entry{
				"one": {programs, own(1)},
				"two": {own(2), programs},
			})
			answer, err := boot(t, Machine{
				Kernel: k, Memory: memory, Via: via, Files: dmsetup(t),
				Task: task.Task{Name: "share", Images: []string{"one", "two"}, Program: waiting, File: bash},
			}).Wait()
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("kernel %s, mounts %q, file pages of the processes %v KiB, page cache +%d KiB for %d bytes read",
				answer.Kernel, answer.Options, answer.PssFile, answer.Cached, answer.Read)
			for _, o := range answer.Options {
				if !strings.Contains(o, "dax=always") {
					t.Errorf("mounted without DAX: %q", o)
				}
			}
			if len(answer.PssFile) != 20 {
				t.Errorf("%d processes, want ten of each image", len(answer.PssFile))
			}
			for i, kib := range answer.PssFile {
				if kib != 0 {
					t.Errorf("process %d has %d KiB of file pages in RAM, want 0", i, kib)
				}
			}
			if answer.Read < 90<<20 || answer.Cached >= 1024 {
				t.Errorf("page cache grew by %d KiB while %d bytes were read, want less than 1024 KiB for 90 MiB or more", answer.Cached, answer.Read)
			}
			if len(answer.Frames) != 2 || len(answer.Frames[0]) < 100 || !slices.Equal(answer.Frames[0], answer.Frames[1]) {
				t.Errorf("%q has other page frames in the second image: %x and %x", bash, answer.Frames[0], answer.Frames[1])
			}
		})
	}
}

// The tree that the kernel shows is the one that tar unpacks.
func TestTree(t *testing.T) {
	k := need(t)
	entries := special(t)
	memory := poolOf(t, 64<<20, map[string][][]testimage.Entry{
		"other":   {{testimage.File("a", 0o644, testimage.Noise(1, 100))}},
		"special": {entries},
	})
	answer, err := boot(t, Machine{
		Kernel: k, Memory: memory, Via: VirtioPmem, Files: dmsetup(t), Task: task.Task{Name: "list", Images: []string{"special"}},
	}).Wait()
	if err != nil {
		t.Fatal(err)
	}
	if err := listing.Diff(withoutRoot(unpacked(t, listing.Options{}, entries)), withoutRoot(answer.Trees[0])); err != nil {
		t.Error(err)
	}
}

// withoutRoot drops the line of the root, whose time no layer names.
func withoutRoot(lines []string) []string { return lines[1:] }
