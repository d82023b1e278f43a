package integration

import (
	"fmt"
	"syscall"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// drivers are the drivers that work on a host without special memory.
var drivers = []string{"erofs-file", "erofs-loop", "fuse"}

// driverConfig selects a driver by name.
func driverConfig(driver string) string { return fmt.Sprintf("[mount]\ndriver = %q\n", driver) }

// Containers do not notice any end of the daemon, with any driver. The next daemon adopts the mount.
func TestDaemonRestart(t *testing.T) {
	for _, driver := range drivers {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			t.Run(driver+"/"+sig.String(), func(t *testing.T) {
				s := stack.New(t, stack.Options{Mode: stack.Streaming, Config: driverConfig(driver)})
				ref := push(t, s, "python")
				s.Pull(ref, "daxfs")
				s.Ctr("run", "--detach", "--snapshotter", "daxfs", ref, "before", "sleep", "1000000")
				works := func(id string) {
					t.Helper()
					// These files were not read before: they come through the mount now.
					out, err := s.Exec(id, "/usr/bin/python3", "/app/main.py")
					if err != nil || out != `{"app": "one", "prefix": "/usr"}`+"\n" {
						t.Errorf("container %q: %q, %v", id, out, err)
					}
				}
				mounts := s.ImageMounts()
				s.Must(s.StopDaemon(sig))
				works("before")
				s.Must(s.StartDaemon())
				works("before")
				s.Ctr("run", "--detach", "--snapshotter", "daxfs", ref, "after", "sleep", "1000000")
				works("after")
				if now := s.ImageMounts(); len(mounts) != 1 || len(now) != 1 || now[0] != mounts[0] {
					t.Errorf("mounts of the image: %q before, %q after the restart, want the same one", mounts, now)
				}
				s.Ctr("task", "rm", "--force", "before")
				s.Ctr("container", "rm", "before")
				works("after")
			})
		}
	}
}

// containerd restarts: its containers are still there, and it can start more.
func TestContainerdRestart(t *testing.T) {
	s := stack.New(t, stack.Options{Mode: stack.Streaming})
	ref := push(t, s, "tiny")
	s.Pull(ref, "daxfs")
	s.Ctr("run", "--detach", "--snapshotter", "daxfs", ref, "before", "sleep", "1000000")
	s.Must(s.StopContainerd(syscall.SIGKILL))
	s.Must(s.StartContainerd())
	if out, err := s.Exec("before", "cat", "/etc/hostname"); err != nil || out != "tiny\n" {
		t.Errorf("the container from before: %q, %v", out, err)
	}
	if out := s.Run(ref, "daxfs", "after", "cat", "/etc/hostname"); out != "tiny\n" {
		t.Errorf("a container after: %q", out)
	}
}
