package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
	"github.com/daxfs/daxfs-snapshotter/store"
	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

// Daemon is an open daemon. It does not listen before Serve.
type Daemon struct {
	cfg     *config.Config
	store   *store.Store
	shared  *shared.Pools // nil if none is configured
	offers  *offers
	sn      *snapshotter.Snapshotter
	differ  *snapshotter.Differ
	blobs   *blobs
	metrics *metrics
	drivers []mount.Driver // the usable ones, in order of preference
	started time.Time
	sockets map[string]net.Listener // made by systemd, by address

	recording sync.Mutex // held while images of shared pools gain or lose names in containerd
}

// Open opens everything below the root, and waits only for the disk. The caller closes the daemon.
func Open(ctx context.Context, c *config.Config) (_ *Daemon, err error) {
	d := &Daemon{cfg: c, started: time.Now()}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if err := checkHelper(c.Mount.FUSEHelper); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.Root, 0o700); err != nil {
		return nil, err
	}
	if d.blobs, err = dialBlobs(c.Containerd.Address); err != nil {
		return nil, err
	}
	sc, err := storeConfig(c, d.blobs)
	if err != nil {
		return nil, err
	}
	d.drivers = sc.Drivers
	d.metrics = newMetrics(d, sc.Drivers)
	sc.Observe, sc.Evicted = d.metrics.observe, d.metrics.evicted
	if d.store, err = store.Open(ctx, sc); err != nil {
		return nil, err
	}
	if err := d.openShared(ctx, sc); err != nil {
		return nil, err
	}
	d.sn, err = snapshotter.New(ctx, c.Root, lowers{d.store}, snapshotter.Options{
		MountOptions: c.Mount.OverlayOptions,
		RemapIDs:     c.Mount.RemapIDs,
		Shared:       d.sharedImages(),
		Durable:      d.store.Durable(),
		Workers:      c.Layers.Workers,
		Remotes:      newRemotes(d),
		Observe:      d.metrics.observe,
		Fallback:     d.metrics.fallback,
	})
	if err != nil {
		return nil, fmt.Errorf("snapshotter: %w", err)
	}
	d.differ = snapshotter.NewDiffer(d.sn, d.blobs)
	logUse(ctx, sc.Drivers, d.store.Region())
	return d, nil
}

// checkHelper returns an error if a configured program cannot be run; otherwise each container would fail by itself.
func checkHelper(path string) error {
	if path == "" {
		return nil
	}
	st, err := os.Stat(path)
	if err == nil && (st.IsDir() || st.Mode().Perm()&0o111 == 0) {
		err = fmt.Errorf("%q is no program", path)
	}
	if err != nil {
		return fmt.Errorf("key %q: %w; it names the program daxfs", "mount.fuse_helper", err)
	}
	return nil
}

func storeConfig(c *config.Config, b store.Blobs) (store.Config, error) {
	all := allDrivers(c)
	drivers, err := mount.Select(all, c.Mount.Driver)
	return store.Config{
		Root: c.Root,
		Pool: store.Pool{
			Kind: c.Pool.Kind, Path: c.Pool.Path, Size: int64(c.Pool.Size), Phys: c.Pool.Phys, Windows: c.Pool.Windows,
			DAX: c.Pool.DAX,
		},
		Drivers:  drivers,
		Adopt:    all, // including drivers of an earlier mount.driver
		Limits:   layer.Limits{MaxBytes: int64(c.Layers.MaxSize), MaxEntries: c.Layers.MaxEntries},
		Packs:    c.Layers.Durability == config.DurabilityPack,
		Blobs:    b,
		Registry: registries(c),
		Readers:  &store.Readers{Mode: c.Pool.Readers, Leases: c.Pool.Leases},
	}, err
}

// Snapshotter returns the snapshotter. Close closes it.
func (d *Daemon) Snapshotter() *snapshotter.Snapshotter { return d.sn }

// Close stops all work and closes what Open opened. Mounts stay.
func (d *Daemon) Close() error {
	var errs []error
	if d.sn != nil {
		errs = append(errs, d.sn.Close())
	}
	if d.shared != nil {
		errs = append(errs, d.shared.Close())
	}
	if d.blobs != nil {
		errs = append(errs, d.blobs.Close())
	}
	if d.store != nil {
		errs = append(errs, d.store.Close())
	}
	return errors.Join(errs...)
}

// Healthy returns nil if the daemon can do its work: its metadata is readable, and its mounts and the
// pools of other owners that something stands on work.
func (d *Daemon) Healthy(ctx context.Context) error {
	if err := d.sn.Walk(ctx, func(context.Context, snapshots.Info) error { return ctx.Err() }); err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	used, _ := d.sharedTrouble()
	return errors.Join(d.store.Healthy(ctx), used)
}

// logUse logs once, at the start, how memory will be shared.
func logUse(ctx context.Context, drivers []mount.Driver, info region.Info) {
	for _, e := range mount.Explain(ctx, drivers, info) {
		if e.Picked {
			log.G(ctx).WithField("driver", e.Driver).WithField("pool", info.Kind).WithField("path",
				info.Path).Info(e.Sharing)
			return
		}
		if !e.Usable {
			log.G(ctx).WithField("driver", e.Driver).Debug("not usable: " + e.Why)
		}
	}
	log.G(ctx).WithField("pool", info.Kind).
		Warn("no mount driver works here: containers get plain directories, or fail to start; see daxfs doctor")
}
