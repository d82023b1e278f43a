package integration

import (
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// The stack itself works: ctr and nerdctl run an image on overlayfs. Without that, no failure is about daxfs.
func TestStackItself(t *testing.T) {
	s := stack.New(t, stack.Options{Mode: stack.None})
	img, err := testimage.Tiny()
	if err != nil {
		t.Fatal(err)
	}
	ref := s.Push("tiny", img)
	s.Pull(ref, "overlayfs")
	if out := s.Run(ref, "overlayfs", "one", "echo", "hello"); out != "hello\n" {
		t.Errorf("ctr run printed %q", out)
	}
	out := s.Nerdctl("--snapshotter", "overlayfs", "run", "--rm", "--net=none", ref, "cat", "/etc/hostname")
	if out == "" {
		t.Error("nerdctl run printed nothing")
	}
}
