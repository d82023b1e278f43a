package stack

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
)

// Rootfs returns the root directory of a running container, as mounted by its shim.
func (s *Stack) Rootfs(id string) string {
	return filepath.Join(s.Run, "state/io.containerd.runtime.v2.task", Namespace, id, "rootfs")
}

// Comparable omits from listings what containerd's overlayfs snapshotter makes up: the root's time is
// that of the unpack, and link counts are those of a lower layer.
var Comparable = listing.Options{NoRootTime: true, NoLinkCounts: true}

// ImageTree lists an image through a view of a snapshotter. Flags are for ctr, such as another namespace.
func (s *Stack) ImageTree(ref, snapshotter string, flags ...string) (lines []string, err error) {
	dir, err := os.MkdirTemp(s.Run, "tree-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(dir)
	ctr := func(args ...string) error {
		_, err := s.output("ctr", slices.Concat(flags, []string{"image"}, args)...)
		return err
	}
	if err := ctr("mount", "--snapshotter", snapshotter, ref, dir); err != nil {
		return nil, err
	}
	defer func() {
		e := ctr("unmount", "--rm", "--snapshotter", snapshotter, dir)
		err = errors.Join(err, e)
	}()
	return listing.Tree(dir, Comparable)
}

// Snapshots lists the keys of the snapshots that containerd has.
func (s *Stack) Snapshots(snapshotter string) ([]string, error) {
	out, err := s.output("ctr", "snapshot", "--snapshotter", snapshotter, "ls")
	if err != nil {
		return nil, err
	}
	header, table, _ := strings.Cut(out, "\n")
	column := strings.Index(header, "PARENT") // keys may contain spaces
	var keys []string
	for line := range strings.Lines(table) {
		keys = append(keys, strings.TrimSpace(line[:column]))
	}
	return keys, nil
}

// OverlayTree lists a committed snapshot of containerd's overlayfs snapshotter.
func (s *Stack) OverlayTree(name string) (lines []string, err error) {
	dir, err := os.MkdirTemp(s.Run, "tree-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(dir)
	// The command prints the mount command of the view. containerd removes the view, to which nothing
	// refers, but the mount consists of the committed snapshots.
	command, err := s.output("ctr", "snapshot", "--snapshotter", "overlayfs", "view", "--target", dir,
		"view-"+filepath.Base(dir), name)
	if err != nil {
		return nil, err
	}
	if err := run(exec.Command("sh", "-c", command)); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, 0)) }()
	return listing.Tree(dir, Comparable)
}

// Compare fails unless an image, unpacked for both snapshotters, shows the same tree with daxfs as with overlayfs.
func (s *Stack) Compare(ref string, flags ...string) error {
	want, err := s.ImageTree(ref, "overlayfs", flags...)
	if err != nil {
		return err
	}
	got, err := s.ImageTree(ref, "daxfs", flags...)
	if err != nil {
		return err
	}
	if err := listing.Diff(want, got); err != nil {
		return fmt.Errorf("%s with daxfs is not what it is with overlayfs: %w", ref, err)
	}
	return nil
}

// Compare fails the test unless an image shows the same tree with daxfs as with overlayfs.
func (s *T) Compare(ref string, flags ...string) {
	s.t.Helper()
	if err := s.Stack.Compare(ref, flags...); err != nil {
		s.t.Error(err)
	}
}

// ImageTree lists an image by a view of a snapshotter.
func (s *T) ImageTree(ref, snapshotter string) []string {
	s.t.Helper()
	lines, err := s.Stack.ImageTree(ref, snapshotter)
	s.must(err)
	return lines
}

// ImageMounts lists the mount points of images. Each may serve many containers.
func (s *Stack) ImageMounts() ([]string, error) {
	points, err := s.Mounts()
	if err != nil {
		return nil, err
	}
	var list []string
	for _, p := range points {
		if strings.HasPrefix(p, filepath.Join(s.DaemonRoot(), "images")+"/") {
			list = append(list, p)
		}
	}
	return list, nil
}

// ImageMounts lists the mount points of images.
func (s *T) ImageMounts() []string {
	s.t.Helper()
	list, err := s.Stack.ImageMounts()
	s.must(err)
	return list
}
