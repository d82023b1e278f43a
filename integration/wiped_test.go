package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// The daemon's directory was wiped below a containerd with images on it. A pull fails with a message
// that operations.md explains, and the remedy in the message works.
func TestWiped(t *testing.T) {
	s := stack.New(t, stack.Options{Mode: stack.Streaming})
	ref := push(t, s, "tiny")
	s.Pull(ref, "daxfs")
	s.Must(s.StopDaemon(syscall.SIGTERM))
	mounts, err := s.Mounts()
	s.Must(err)
	slices.Reverse(mounts)
	for _, m := range mounts {
		if strings.HasPrefix(m, s.DaemonRoot()+"/") {
			s.Must(syscall.Unmount(m, 0))
		}
	}
	s.Must(os.RemoveAll(s.DaemonRoot()))
	s.Must(s.StartDaemon())

	pull := []string{"image", "pull", "--plain-http", "--snapshotter", "daxfs", ref}
	if _, err := s.Try("ctr", pull...); err == nil || !strings.Contains(err.Error(), "target snapshot") ||
		!strings.Contains(err.Error(), "already exists") {
		t.Errorf("pull after the daemon's directory was wiped: %v", err)
	}
	s.Ctr("image", "rm", "--sync", ref)
	s.Ctr(pull...)
	if out := s.Run(ref, "daxfs", "c", "cat", "/etc/hostname"); out != "tiny\n" {
		t.Errorf("after the cure a container printed %q", out)
	}
	if left, err := filepath.Glob(filepath.Join(s.DaemonRoot(), "snapshots", "*")); err != nil || len(left) == 0 {
		t.Errorf("snapshots of the new directory: %q, %v", left, err)
	}
}
