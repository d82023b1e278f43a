package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// Daemon is an open daemon that does not listen yet.
type Daemon struct {
	cfg     *config.Config
	store   *store.Store
	sn      *snapshotter.Snapshotter
	differ  *snapshotter.Differ
	blobs   *blobs
	metrics *metrics
}

// Open opens everything below the configured root. It waits for nothing but the disk; images are made later. The caller
// closes the daemon.
func Open(ctx context.Context, c *config.Config) (_ *Daemon, err error) {
	d := &Daemon{cfg: c}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if err := c.Validate(); err != nil {
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
	if d.store, err = store.Open(ctx, sc); err != nil {
		return nil, err
	}
	d.metrics = newMetrics(d)
	d.sn, err = snapshotter.New(ctx, c.Root, lowers{d.store}, snapshotter.Options{
		MountOptions: c.Mount.OverlayOptions,
		RemapIDs:     c.Mount.RemapIDs,
		Durable:      d.store.Durable(),
		Workers:      c.Layers.Workers,
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

// storeConfig is what the configuration says about the store.
func storeConfig(c *config.Config, b store.Blobs) (store.Config, error) {
	all := allDrivers(c)
	drivers, err := mount.Select(all, c.Mount.Driver)
	return store.Config{
		Root: c.Root,
		Pool: store.Pool{
			Kind: c.Pool.Kind, Path: c.Pool.Path, Size: int64(c.Pool.Size), Phys: c.Pool.Phys, Windows: c.Pool.Windows,
		},
		Drivers: drivers,
		Adopt:   all, // those of another mount.driver than now
		Limits:  layer.Limits{MaxBytes: int64(c.Layers.MaxSize), MaxEntries: c.Layers.MaxEntries},
		Packs:   c.Layers.Durability == config.DurabilityPack,
		Blobs:   b,
	}, err
}

// Snapshotter returns the snapshotter. It ends with the daemon.
func (d *Daemon) Snapshotter() *snapshotter.Snapshotter { return d.sn }

// Differ returns a differ that reads blobs from p instead of containerd.
func (d *Daemon) Differ(p content.Provider) *snapshotter.Differ {
	return snapshotter.NewDiffer(d.sn, p)
}

// Close ends all work and closes what Open opened. Mounts stay.
func (d *Daemon) Close() error {
	var errs []error
	if d.sn != nil {
		errs = append(errs, d.sn.Close())
	}
	if d.blobs != nil {
		errs = append(errs, d.blobs.Close())
	}
	if d.store != nil {
		errs = append(errs, d.store.Close())
	}
	return errors.Join(errs...)
}

// Healthy returns nil if the daemon can do its work: its metadata answers, and so does what is mounted.
func (d *Daemon) Healthy(ctx context.Context) error {
	if err := d.sn.Walk(ctx, func(context.Context, snapshots.Info) error { return ctx.Err() }); err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	return d.store.Healthy(ctx)
}

// logUse tells the log once how memory will be shared.
func logUse(ctx context.Context, drivers []mount.Driver, info region.Info) {
	for _, e := range mount.Explain(ctx, drivers, info) {
		if e.Picked {
			log.G(ctx).WithField("driver", e.Driver).WithField("pool", info.Kind).WithField("path", info.Path).Info(e.Sharing)
			return
		}
		if !e.Usable {
			log.G(ctx).WithField("driver", e.Driver).Debug("not usable: " + e.Why)
		}
	}
	log.G(ctx).WithField("pool", info.Kind).
		Warn("no mount driver works here: containers get plain directories, or fail to start; see daxfs doctor")
}
