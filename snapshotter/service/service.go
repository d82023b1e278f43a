package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/log"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// Service is an open daemon that does not listen yet.
type Service struct {
	cfg     *config.Config
	region  region.Region
	pool    *pool.Pool
	table   *mount.Table
	lowers  *lowers
	sn      *snapshotter.Snapshotter
	differ  *snapshotter.Differ
	blobs   *blobs
	metrics *metrics
}

// Open opens everything below the configured root. It waits for nothing but the disk; images are made later. The caller
// closes the service.
func Open(ctx context.Context, c *config.Config) (_ *Service, err error) {
	s := &Service{cfg: c}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.Root, 0o700); err != nil {
		return nil, err
	}
	if s.region, s.pool, err = openPool(ctx, c); err != nil {
		return nil, err
	}
	all := allDrivers(c)
	drivers, err := mount.Select(all, c.Mount.Driver)
	if err != nil {
		return nil, err
	}
	s.table, err = mount.Open(ctx, c.Root, drivers, mount.Options{
		Adopt: all, // those of another mount.driver than now
		Warn:  func(format string, args ...any) { log.L.Warnf(format, args...) },
	})
	if err != nil {
		return nil, err
	}
	if s.blobs, err = dialBlobs(c.Containerd.Address); err != nil {
		return nil, err
	}
	s.lowers = &lowers{
		find: s.blobs.find,
		pool: s.pool, table: s.table, private: private(s.region.Info()),
		limits: layer.Limits{MaxBytes: int64(c.Layers.MaxSize), MaxEntries: c.Layers.MaxEntries},
	}
	if s.region.Info().Persistent < region.PersistsReboot && c.Layers.Durability == config.DurabilityPack {
		if s.lowers.packs, err = openPacks(filepath.Join(c.Root, "packs")); err != nil {
			return nil, err
		}
	}
	if err := s.lowers.adopt(ctx); err != nil {
		return nil, err
	}
	s.metrics = newMetrics(s)
	s.sn, err = snapshotter.New(ctx, c.Root, s.lowers, snapshotter.Options{
		MountOptions: c.Mount.OverlayOptions,
		RemapIDs:     c.Mount.RemapIDs,
		Settle:       time.Duration(c.Layers.Settle),
		Workers:      c.Layers.Workers,
		Observe:      s.metrics.observe,
		Fallback:     s.metrics.fallback,
	})
	if err != nil {
		return nil, fmt.Errorf("snapshotter: %w", err)
	}
	s.differ = snapshotter.NewDiffer(s.sn, s.blobs)
	logUse(ctx, drivers, s.region.Info())
	return s, nil
}

// Snapshotter returns the snapshotter. It ends with the service.
func (s *Service) Snapshotter() *snapshotter.Snapshotter { return s.sn }

// Differ returns a differ that reads blobs from p instead of containerd.
func (s *Service) Differ(p content.Provider) *snapshotter.Differ {
	return snapshotter.NewDiffer(s.sn, p)
}

// Close ends all work and closes what Open opened. Mounts stay.
func (s *Service) Close() error {
	var errs []error
	if s.sn != nil {
		errs = append(errs, s.sn.Close())
	}
	if s.blobs != nil {
		errs = append(errs, s.blobs.Close())
	}
	if s.table != nil {
		errs = append(errs, s.table.Close())
	}
	if s.pool != nil {
		errs = append(errs, s.pool.Close())
	}
	if s.region != nil {
		errs = append(errs, s.region.Close())
	}
	return errors.Join(errs...)
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
	log.G(ctx).WithField("pool", info.Kind).Warn("no mount driver works here: containers get plain directories, or fail to start; see daxfs doctor")
}
