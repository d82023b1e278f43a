package service

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/daxfs/daxfs-snapshotter/config"
)

// TestSuite runs containerd's conformance tests through the socket, with a real pool and real mounts. The name
// "overlayfs" tells the suite which limits of overlayfs we inherit; see package snapshotter.
func TestSuite(t *testing.T) {
	for _, f := range flavours {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			f.need(t)
			testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				c := f.config(root)
				cl, err := start(ctx, c, nil)
				if err != nil {
					return nil, nil, err
				}
				return cl.remote, func() error {
					return errors.Join(cl.settle(ctx), cl.purge(ctx), cl.end(), removePool(c))
				}, nil
			})
		})
	}
}

// removePool removes a pool that is not below the root of the daemon.
func removePool(c *config.Config) error {
	if c.Pool.Path == "" {
		return nil
	}
	return os.Remove(c.Pool.Path)
}
