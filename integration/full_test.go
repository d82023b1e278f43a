package integration

import (
	"strings"
	"syscall"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// A pool that is too small for an image: either the image is served all the same, and rightly, or the error says how
// much is missing. What was there before is not harmed.
func TestFullPool(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := stack.New(t, stack.Options{Mode: m, Config: "[pool]\nsize = \"32MiB\"\n"})
		tiny := push(t, s, "tiny")
		s.Pull(tiny, "daxfs")
		s.Ctr("run", "--detach", "--snapshotter", "daxfs", tiny, "before", "sleep", "1000000")

		base, err := testimage.Busybox()
		if err != nil {
			t.Fatal(err)
		}
		big := testimage.File("big", 0o644, testimage.Noise(1, 64<<20))
		img, err := testimage.Image(base, []testimage.Entry{big})
		if err != nil {
			t.Fatal(err)
		}
		ref := s.Push("big", img)
		_, err = s.Try("ctr", "image", "pull", "--plain-http", "--snapshotter", "daxfs", ref)
		if err == nil {
			var out string
			out, err = s.Try("ctr", "run", "--rm", "--snapshotter", "daxfs", ref, "big", "sha256sum", "/big")
			if want := sumOf([]testimage.Entry{big}, "big") + "  /big\n"; err == nil && out != want {
				t.Errorf("the big file is %q, want %q", out, want)
			}
		}
		t.Logf("an image of 64 MiB in a pool of 32 MiB: %v", err)
		if err != nil && !strings.Contains(err.Error(), "full") {
			t.Errorf("the error does not say that the pool is full: %v", err)
		}
		if out, err := s.Exec("before", "cat", "/etc/hostname"); err != nil || out != "tiny\n" {
			t.Errorf("the container from before: %q, %v", out, err)
		}
		if out := s.Run(tiny, "daxfs", "after", "cat", "/etc/hostname"); out != "tiny\n" {
			t.Errorf("another container of the first image: %q", out)
		}
	})
}

// Without the daemon nothing of daxfs works, with an error that names the socket; everything else does work.
func TestDeadDaemon(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := stack.New(t, stack.Options{Mode: m})
		ref := push(t, s, "special")
		s.Must(s.StopDaemon(syscall.SIGKILL))
		if _, err := s.Try("ctr", "image", "pull", "--plain-http", "--snapshotter", "daxfs", ref); err == nil || !strings.Contains(err.Error(), "daxfs.sock") {
			t.Errorf("pull without the daemon: %v, want an error that names daxfs.sock", err)
		}
		s.Pull(ref, "overlayfs")
		if out := s.Run(ref, "overlayfs", "other", "cat", "/etc/hostname"); out != "tiny\n" {
			t.Errorf("overlayfs without the daemon: %q", out)
		}
		s.Must(s.StartDaemon())
		// After a failure containerd waits for some seconds before it connects again.
		await(t, "containerd reaches the daemon again", func() bool {
			_, err := s.Try("ctr", "image", "pull", "--plain-http", "--snapshotter", "daxfs", ref)
			return err == nil
		})
		s.Compare(ref)
	})
}
