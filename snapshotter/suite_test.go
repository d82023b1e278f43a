package snapshotter_test

import (
	"context"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/daxfs/daxfs-snapshotter/internal/testns"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

func TestMain(m *testing.M) {
	flag.Parse()
	// containerd's suite needs this flag in addition to root. Our tests skip themselves without root.
	if os.Geteuid() == 0 {
		flag.Set("test.root", "true")
	}
	os.Exit(testns.Main(m))
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts file systems, which needs root")
	}
}

// TestSuite runs containerd's conformance tests. It calls us "overlayfs", because the suite knows only
// by name which snapshotters inherit overlayfs's inability to rename directories of a lower layer.
func TestSuite(t *testing.T) {
	needRoot(t)
	testsuite.SnapshotterSuite(t, "overlayfs",
		func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
			f := newFakeLowers(filepath.Join(root, "fake"))
			s, err := snapshotter.New(ctx, root, f, snapshotter.Options{})
			if err != nil {
				return nil, nil, err
			}
			return s, func() error { return errors.Join(s.Close(), f.reboot()) }, nil
		})
}
