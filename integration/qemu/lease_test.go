package qemu

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/pool/lease"
)

// A guest claims an image in each kind of lease region, and the owner, the host, reads the claim in
// the memory behind it. The guest also reads what the owner writes.
func TestLeases(t *testing.T) {
	kernel := need(t)[0]
	const size = 64 << 20
	for name, m := range map[string]struct {
		Machine
		from int64 // start of the region in the file
	}{
		"block device": {Machine{Via: VirtioPmem, Task: task.Task{Lease: "/dev/pmem0"}}, 0},
		"DAX device": {Machine{
			Via: Memmap, Modules: []string{"dax_pmem", "device_dax"},
			Task: task.Task{Lease: "/dev/dax0.0", DevDAX: true},
		}, 2 << 20}, // behind the description of the device
		"physical range": {Machine{
			Via: Reserved, Task: task.Task{Phys: behind, Lease: fmt.Sprintf("%#x+%d", behind+2<<20, 1<<20)},
		}, 2 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := m
			m.Kernel, m.RAM, m.Task.Name = kernel, ramMiB, "lease"
			m.Memory = filepath.Join(t.TempDir(), "memory")
			if err := os.WriteFile(m.Memory, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(m.Memory, size); err != nil {
				t.Fatal(err)
			}
			r := boot(t, m.Machine)
			if err := r.AwaitReady(); err != nil {
				t.Fatal(err)
			}
			owner, err := lease.NewRegions([]string{fmt.Sprintf("%s@%d+%d", m.Memory, m.from, 1<<20)})
			if err != nil {
				t.Fatal(err)
			}
			users := func() []string {
				t.Helper()
				list, err := owner.Users(task.LeasePool, task.LeaseImage)
				if err != nil {
					t.Fatal(err)
				}
				return list
			}
			if got := users(); !slices.Equal(got, []string{task.LeaseReader}) {
				t.Errorf("the image is used by %q, want %q", got, task.LeaseReader)
			}
			if n, err := owner.Void(task.LeaseReader, false); err != nil || n != 1 {
				t.Errorf("the owner ended %d claims, want 1: %v", n, err)
			}
			if err := r.Resume(); err != nil {
				t.Fatal(err)
			}
			answer, err := r.Wait()
			if err != nil {
				t.Fatal(err)
			}
			if len(answer.Output) != 1 || !strings.Contains(answer.Output[0], lease.ErrLost.Error()) {
				t.Errorf("the guest's next claim: %q, want %q", answer.Output, lease.ErrLost)
			}
			if got := users(); len(got) != 0 {
				t.Errorf("the image is used by %q, want nobody", got)
			}
		})
	}
}
