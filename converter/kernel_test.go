package converter_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// TestTreeIsThatOfContainerd converts an image and compares the kernel's mount and our reader with the
// directory unpacked by containerd's applier.
func TestTreeIsThatOfContainerd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: the applier sets owners and makes devices")
	}
	tars := exampleLayers()
	dir := filepath.Join(t.TempDir(), "root")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	start := time.Now().Add(-time.Second) // file systems use a coarse clock
	for _, b := range tars {
		if _, err := archive.Apply(context.Background(), dir, bytes.NewReader(b)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := treetest.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	image, _, err := convert(t, "oci:"+newLayout(t, packed(tars, ocitest.Gzip)...).Dir, converter.Options{})
	if err != nil {
		t.Fatal(err)
	}
	compare := func(t *testing.T, got treetest.Tree, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		if d := treetest.Diff(want, got, treetest.DirTimesSince(start)); d != "" {
			t.Errorf("trees differ (-containerd +image):\n%s", d)
		}
	}
	t.Run("reader", func(t *testing.T) {
		got, err := readTree(image)
		compare(t, got, err)
	})
	t.Run("kernel", func(t *testing.T) {
		got, err := treetest.FromPath(mountErofs(t, image))
		compare(t, got, err)
	})
	t.Run("fsck", func(t *testing.T) {
		fsck, err := exec.LookPath("fsck.erofs")
		if err != nil {
			t.Skip("fsck.erofs of erofs-utils is not installed")
		}
		if msg, err := exec.Command(fsck, image).CombinedOutput(); err != nil {
			t.Errorf("fsck.erofs: %v\n%s", err, msg)
		}
	})
}

// mountErofs mounts an image for the duration of the test.
func mountErofs(t *testing.T, image string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if msg, err := exec.Command("mount", "-t", "erofs", "-o", "ro,loop", image, dir).CombinedOutput(); err != nil {
		t.Skipf("the kernel mounts no erofs here: %v: %s", err, msg)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil { // the loop device goes with it
			t.Errorf("unmount %q: %v", dir, err)
		}
	})
	return dir
}

// readTree reads an image with our reader.
func readTree(image string) (treetest.Tree, error) {
	b, err := os.ReadFile(image)
	if err != nil {
		return nil, err
	}
	f, err := daxfs.OpenBytes(b)
	if err != nil {
		return nil, err
	}
	nodes := map[uint64]*daxfs.Node{}
	var root *daxfs.Node
	err = f.Walk(func(path string, in daxfs.Inode) error {
		n := nodes[in.Nid]
		if n == nil {
			n = &daxfs.Node{Mode: in.Mode, UID: in.UID, GID: in.GID, Rdev: in.Rdev, Mtime: in.Mtime}
			nodes[in.Nid] = n
			var err error
			if n.Xattrs, err = in.Xattrs(); err != nil {
				return err
			}
			if in.IsSymlink() {
				if n.Target, err = in.Target(); err != nil {
					return err
				}
			}
			if off, size, ok := in.Data(); ok {
				n.Data = daxfs.Data{Off: off, Size: size}
			}
		}
		if path == "." {
			root = n
			return nil
		}
		parent, err := f.Lookup(filepath.Dir(path), false)
		if err != nil {
			return err
		}
		p := nodes[parent.Nid]
		if p.Entries == nil {
			p.Entries = map[string]*daxfs.Node{}
		}
		p.Entries[filepath.Base(path)] = n
		return nil
	})
	if err != nil {
		return nil, err
	}
	return treetest.FromNode(root, func(d daxfs.Data) (io.Reader, error) {
		return bytes.NewReader(b[d.Off : d.Off+d.Size]), nil
	})
}
