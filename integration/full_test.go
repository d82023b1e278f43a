package integration

import (
	"strings"
	"syscall"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// In a pool that is too small for an image, either the image still works correctly, or the error says
// how much space is missing. Existing images are not affected.
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

// Without the daemon calls of daxfs fail, with an error that names the socket; everything else works.
func TestDeadDaemon(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := stack.New(t, stack.Options{Mode: m})
		ref := push(t, s, "special")
		s.Must(s.StopDaemon(syscall.SIGKILL))
		if _, err := s.Try("ctr", "image", "pull", "--plain-http", "--snapshotter", "daxfs", ref); err == nil ||
			!strings.Contains(err.Error(), "daxfs.sock") {
			t.Errorf("pull without the daemon: %v, want an error that names daxfs.sock", err)
		}
		s.Pull(ref, "overlayfs")
		if out := s.Run(ref, "overlayfs", "other", "cat", "/etc/hostname"); out != "tiny\n" {
			t.Errorf("overlayfs without the daemon: %q", out)
		}
		s.Must(s.StartDaemon())
		// After a failure containerd reconnects only some seconds later.
		await(t, "containerd reaches the daemon again", func() bool {
			_, err := s.Try("ctr", "image", "pull", "--plain-http", "--snapshotter", "daxfs", ref)
			return err == nil
		})
		s.Compare(ref)
	})
}

// A container fills the disk of containerd and the daemon, with data and with names. Nothing else is
// affected, and both daemons can restart. After the container's removal the space is free, and the next one runs.
func TestFullDisk(t *testing.T) {
	for _, snapshotter := range []string{"overlayfs", "daxfs"} {
		t.Run(snapshotter, func(t *testing.T) {
			s := stack.New(t, stack.Options{Mode: stack.Streaming, Disk: 160 << 20})
			ref := push(t, s, "tiny")
			s.Pull(ref, snapshotter)
			s.Ctr("run", "--detach", "--snapshotter", snapshotter, ref, "bystander", "sleep", "1000000")
			_, before, err := s.Disk()
			s.Must(err)
			s.Ctr("run", "--detach", "--snapshotter", snapshotter, ref, "hog", "sleep", "1000000")
			const fill = "dd if=/dev/zero of=/fill bs=64k 2>/dev/null; mkdir /d; i=0; " +
				"while echo x > /d/$i && mkdir /d/d$i; do i=$((i+1)); done 2>/dev/null; echo full"
			if out, err := s.Exec("hog", "sh", "-c", fill); err != nil || out != "full\n" {
				t.Fatalf("fill the disk: %q, %v", out, err)
			}
			_, full, err := s.Disk()
			s.Must(err)
			_, err = s.Try("ctr", "run", "--rm", "--snapshotter", snapshotter, ref, "meanwhile", "true")
			t.Logf("%d bytes were free, now %d; another container: %v", before, full, err)
			for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
				s.Must(s.StopContainerd(sig))
				s.Must(s.StopDaemon(sig))
				s.Must(s.StartDaemon())
				s.Must(s.StartContainerd())
			}
			for _, id := range []string{"bystander", "hog"} {
				if out, err := s.Exec(id, "cat", "/etc/hostname"); err != nil || out != "tiny\n" {
					t.Errorf("container %q on a full disk: %q, %v", id, out, err)
				}
			}

			s.Ctr("task", "rm", "--force", "hog")
			s.Ctr("container", "rm", "hog")
			s.Must(s.Collect())
			await(t, "the space of the container is free", func() bool {
				_, after, err := s.Disk()
				s.Must(err)
				return after+4<<20 > before
			})
			if out := s.Run(ref, snapshotter, "next", "cat", "/etc/hostname"); out != "tiny\n" {
				t.Errorf("the next container printed %q", out)
			}
			if out, err := s.Exec("bystander", "cat", "/etc/hostname"); err != nil || out != "tiny\n" {
				t.Errorf("the container beside it: %q, %v", out, err)
			}
		})
	}
}
