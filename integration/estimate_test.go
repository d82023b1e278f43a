package integration

import (
	"encoding/json"
	"io/fs"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// diskOf returns the disk space of everything below a directory.
func diskOf(t *testing.T, dir string) (n int64) {
	t.Helper()
	seen := map[uint64]bool{}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		if !seen[st.Ino] {
			seen[st.Ino] = true
			n += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// daxfs estimate, for images that containerd has for overlayfs, is within 3 % of their space there and
// of their space when they are pulled for daxfs.
func TestEstimateOfSwitch(t *testing.T) {
	s := stack.New(t, stack.Options{Mode: stack.Streaming})
	web, jobs, err := testimage.Twins()
	s.Must(err)
	refs := []string{s.Push("web", web), s.Push("jobs", jobs)}
	for _, ref := range refs {
		s.Pull(ref, "overlayfs")
	}
	cache, err := stack.CacheDir()
	s.Must(err)
	out, err := exec.Command(filepath.Join(cache, "own/daxfs"), "estimate", "--all", "--json", "--address",
		s.Stack.Run+"/containerd.sock",
		"--namespace", stack.Namespace).Output()
	s.Must(err)
	var said struct {
		Images         []struct{}
		Takes, Overlay int64
	}
	s.Must(json.Unmarshal(out, &said))
	near := func(what string, said, is int64) {
		t.Helper()
		off := 100 * float64(said-is) / float64(is)
		t.Logf("%s: estimated %d bytes, found %d: %+.2f %%", what, said, is, off)
		if off < -3 || off > 3 {
			t.Errorf("%s: estimated %d bytes, found %d: %.1f %% off", what, said, is, off)
		}
	}
	if len(said.Images) != 2 {
		t.Errorf("%d images were estimated, expected 2: %s", len(said.Images), out)
	}
	near("overlayfs", said.Overlay,
		diskOf(t, filepath.Join(s.Dir, "containerd/root/io.containerd.snapshotter.v1.overlayfs/snapshots")))
	pool := filepath.Dir(s.PoolFile())
	unix.Sync()
	before := diskOf(t, pool)
	for _, ref := range refs {
		s.Pull(ref, "daxfs")
		s.Run(ref, "daxfs", "c-"+filepath.Base(ref)[:3], "true") // builds the image
	}
	unix.Sync()
	near("daxfs", said.Takes, diskOf(t, pool)-before)
}
