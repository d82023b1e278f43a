package integration

import (
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// Every pulled image shows, entry by entry, the same tree as with containerd's overlayfs snapshotter.
func TestPull(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := stack.New(t, stack.Options{Mode: m})
		for n, i := range images {
			t.Run(i.name, func(t *testing.T) {
				ref := push(t, s, i.name)
				s.Pull(ref, "overlayfs")
				s.Pull(ref, "daxfs")
				s.Compare(ref)
				// Walking over a layer without a directory needs an image of it until the next cleanup.
				if got := len(s.ImageMounts()); got < n+1 || m == stack.Streaming && got > n+1 {
					t.Errorf("mounts of images: %q, want one for each that was looked at", s.ImageMounts())
				}
			})
		}
	})
}

// Layers unpacked in parallel give the same tree: whiteouts work although no layer sees the one below.
func TestPullParallel(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := stack.New(t, stack.Options{Mode: m, ParallelUnpacks: 4})
		for _, name := range []string{"special", "layers"} {
			ref := push(t, s, name)
			s.Pull(ref, "overlayfs")
			s.Pull(ref, "daxfs")
			s.Compare(ref)
		}
	})
}

// Clients that unpack by themselves send no labels and no hints.
func TestPullByClient(t *testing.T) {
	s := stack.New(t, stack.Options{Mode: stack.Walking})
	for _, name := range []string{"special", "layers"} {
		ref := push(t, s, name)
		s.Pull(ref, "overlayfs")
		s.Ctr("image", "pull", "--local", "--plain-http", "--snapshotter", "daxfs", ref)
		s.Compare(ref)
	}
}
