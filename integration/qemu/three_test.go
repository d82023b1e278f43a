package qemu

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// Three machines on one pool show the tree that tar unpacks, and the host has the pool's pages once.
func TestThreeMachines(t *testing.T) {
	need(t)
	entries := append(special(t), testimage.File("big", 0o644, testimage.Noise(7, 64<<20)))
	onEach(t, func(t *testing.T, k Kernel) {
		memory := poolOf(t, 256<<20, map[string][][]testimage.Entry{"special": {entries}}).path
		machine := Machine{
			Kernel: k, Memory: memory, Via: VirtioPmem,
			Task: task.Task{Name: "list", Images: []string{"special"}, Pause: true},
		}
		running := []*Running{boot(t, machine), boot(t, machine), boot(t, machine)}
		for _, r := range running {
			if err := r.AwaitReady(); err != nil {
				t.Fatal(err)
			}
		}
		var rss, pss int64
		for i, r := range running {
			mapped, share, err := r.Mapped(memory)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("machine %d: %d KiB of the pool mapped, its share %d KiB", i, mapped, share)
			rss, pss = rss+mapped, pss+share
		}
		var st unix.Stat_t
		if err := unix.Stat(memory, &st); err != nil {
			t.Fatal(err)
		}
		// Holes that a guest reads become zero pages, such as the end of the device, searched for partitions.
		const holes = 1024
		if used := st.Blocks / 2; pss > used+holes {
			t.Errorf("the machines hold %d KiB of memory for a pool that has %d KiB", pss, used)
		}
		if rss < 2*pss { // three times as much, except for pages that only one has read
			t.Errorf("the machines map %d KiB together and that is %d KiB of memory: too little is shared", rss, pss)
		}
		want := withoutRoot(unpacked(t, listing.Options{}, entries))
		for i, r := range running {
			if err := r.Resume(); err != nil {
				t.Fatal(err)
			}
			answer, err := r.Wait()
			if err != nil {
				t.Fatal(err)
			}
			if err := listing.Diff(want, withoutRoot(answer.Trees[0])); err != nil {
				t.Errorf("machine %d: %v", i, err)
			}
		}
	})
}
