package integration

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// Removing containers, then images, frees everything, down to an empty pool, no mount and no
// directory. What is not removed is unchanged.
func TestRemove(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := stack.New(t, stack.Options{Mode: m})
		refs := map[string]string{}
		for _, name := range []string{"special", "layers", "python"} {
			refs[name] = push(t, s, name)
			s.Pull(refs[name], "daxfs")
			s.Ctr("run", "--detach", "--snapshotter", "daxfs", refs[name], name, "sleep", "1000000")
		}
		// Remove the image first; its container stays and works.
		s.Ctr("image", "rm", "--sync", refs["layers"])
		if out, err := s.Exec("layers", "cat", "/l/top"); err != nil || out != "layer 69\n" {
			t.Errorf("container of a removed image: %q, %v", out, err)
		}
		for _, name := range []string{"layers", "special"} {
			s.Ctr("task", "rm", "--force", name)
			s.Ctr("container", "rm", name)
		}
		s.Ctr("image", "rm", "--sync", refs["special"])
		s.Must(s.Collect())
		if out, err := s.Exec("python", "/usr/bin/python3", "/app/main.py"); err != nil ||
			!strings.HasPrefix(out, `{"app"`) {
			t.Errorf("the container that stays: %q, %v", out, err)
		}
		await(t, "two images are unmounted", func() bool { return len(s.ImageMounts()) == 1 })

		s.Ctr("task", "rm", "--force", "python")
		s.Ctr("container", "rm", "python")
		s.Ctr("image", "rm", "--sync", refs["python"])
		nothingLeft(t, s)
	})
}

// nothingLeft fails the test unless the daemon, without snapshots, has freed everything. It restarts the daemon.
func nothingLeft(t *testing.T, s *stack.T) {
	t.Helper()
	s.Must(s.Collect())
	if out := s.Ctr("snapshot", "--snapshotter", "daxfs", "ls"); strings.Count(out, "\n") != 1 {
		t.Errorf("snapshots that containerd still has:\n%s", out)
	}
	await(t, "all images are unmounted", func() bool { return len(s.ImageMounts()) == 0 })
	s.Must(s.StopDaemon(syscall.SIGTERM))
	report, err := s.CheckPool()
	if err != nil {
		t.Errorf("check of the pool: %v", err)
	}
	if report.ExtentCount != 0 || report.Images != 0 || report.Layers != 0 {
		t.Errorf("the pool still has %d extents, images %q and layers %q", report.ExtentCount, report.ImageKeys,
			report.LayerKeys)
	}
	dirs, err := s.SnapshotDirs()
	if err != nil || len(dirs) != 0 {
		t.Errorf("directories of snapshots: %q, %v", dirs, err)
	}
	s.Must(s.StartDaemon())
}

// await waits for background work of the daemon.
func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for range 600 {
		if done() {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("after a minute it is still not so that %s", what)
}
