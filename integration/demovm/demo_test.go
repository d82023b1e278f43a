package main

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }

// The demo's claims are true, and it leaves nothing behind: closing its stack fails if anything stays.
func TestDemo(t *testing.T) {
	if unavailable := testing.Short() || os.Getuid() != 0; unavailable {
		t.Skip("needs root, and not -short")
	}
	if _, err := exec.LookPath(qemu.Program); err != nil {
		t.Skip(err)
	}
	var out bytes.Buffer
	f, err := show(t.Context(), &out)
	t.Logf("%s", out.String())
	if err != nil {
		t.Fatal(err)
	}
	var rss int64
	for i, m := range machines {
		before, after := f.before[i], f.after[i]
		if after.pulled != 0 {
			t.Errorf("machine %q pulled %d bytes", m, after.pulled)
		}
		if n := after.content - before.content; n <= 0 || n > 64<<10 {
			t.Errorf("machine %q copied %d bytes of manifests, expected 1 to 64 KiB", m, n)
		}
		// Directories and databases only; the images have 110 MiB.
		if n := after.snapshots - before.snapshots; n > 1<<20 {
			t.Errorf("machine %q has %d bytes of its own for images", m, n)
		}
		if n := after.cached - before.cached; n > 16<<20 {
			t.Errorf("the page cache of machine %q grew by %d bytes", m, n)
		}
		if !strings.Contains(f.late[i], "hello from the late image") {
			t.Errorf("machine %q printed %q from the late image", m, f.late[i])
		}
		rss += f.mapped[i]
	}
	if 3*f.together > 2*rss {
		t.Errorf("the machines have mapped %d KiB of the pool, and that is %d KiB of memory: too little is shared",
			rss, f.together)
	}
	if !f.kept || !f.freed {
		t.Errorf("an image that a machine used was kept: %v, and freed afterwards: %v", f.kept, f.freed)
	}
}
