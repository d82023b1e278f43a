package qemu

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// Two virtual machines on one pool at the same time: both show the tree that tar unpacks, and the host has the pool's
// pages once.
func TestTwoMachines(t *testing.T) {
	need(t)
	entries := append(special(t), testimage.File("big", 0o644, testimage.Noise(7, 64<<20)))
	onEach(t, func(t *testing.T, k Kernel) {
		memory := poolOf(t, 256<<20, map[string][][]testimage.Entry{"special": {entries}}).path
		machine := Machine{
			Kernel: k, Memory: memory, Via: VirtioPmem,
			Task: task.Task{Name: "list", Images: []string{"special"}, Pause: true},
		}
		running := []*Running{boot(t, machine), boot(t, machine)}
		for _, r := range running {
			if err := r.AwaitReady(); err != nil {
				t.Fatal(err)
			}
		}
		var rss, pss int64
		for i, r := range running {
			mapped, share, err := mappedFile(r.PID(), memory)
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
		// A hole that a guest looks at, such as the end of the device when it looks for partitions, becomes pages of zeros.
		const holes = 1024
		if used := st.Blocks / 2; pss > used+holes {
			t.Errorf("the machines hold %d KiB of memory for a pool that has %d KiB", pss, used)
		}
		if 2*rss < 3*pss {
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

// mappedFile returns how much of a file a process has mapped and in memory, and its proportional part of that, in KiB.
func mappedFile(pid int, path string) (rss, pss int64, err error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	inside := false
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 0 && strings.Contains(fields[0], "-") {
			inside = strings.HasSuffix(lines.Text(), " "+path)
		}
		if !inside || len(fields) != 3 {
			continue
		}
		kib, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			continue // a line of another form
		}
		switch fields[0] {
		case "Rss:":
			rss += kib
		case "Pss:":
			pss += kib
		}
	}
	return rss, pss, lines.Err()
}
