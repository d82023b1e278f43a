package daemon

import (
	"context"
	"errors"
	"flag"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// suite runs containerd's conformance tests, each on a snapshotter from open, and checks that all have
// run. The name "overlayfs" selects the limits of overlayfs that we inherit; see package snapshotter.
func suite(t *testing.T, open testsuite.SnapshotterFunc) {
	t.Helper()
	var ran atomic.Int32
	t.Cleanup(func() { // after all have ended: they run in parallel
		const tests = 21 // of containerd 2.4
		if n := ran.Load(); n != tests && !strings.Contains(flag.Lookup("test.run").Value.String(), "/") {
			t.Errorf("%d conformance tests ran, want %d", n, tests)
		}
	})
	testsuite.SnapshotterSuite(t, "overlayfs",
		func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
			ran.Add(1)
			return open(ctx, root)
		})
}

// TestSuite runs containerd's conformance tests through the socket, with a real pool and real mounts.
func TestSuite(t *testing.T) {
	slow.Skip(t, "mounts hundreds of layers; package snapshotter runs the suite, too")
	for _, f := range fewFlavours(3) {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			f.need(t)
			suite(t, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
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

// removePool removes a pool outside the root of the daemon.
func removePool(c *config.Config) error {
	if c.Pool.Path == "" {
		return nil
	}
	return os.Remove(c.Pool.Path)
}
