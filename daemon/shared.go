package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/snapshotter"
	"github.com/daxfs/daxfs-snapshotter/store"
	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

// sharedInterval is how often the pools of other owners are checked for new images.
const sharedInterval = 2 * time.Second

func (d *Daemon) sharedRoot() string { return filepath.Join(d.cfg.Root, "shared") }

// openShared opens the configured pools of other owners.
func (d *Daemon) openShared(ctx context.Context, sc store.Config) (err error) {
	if len(d.cfg.Shared.Pools) == 0 {
		return nil
	}
	c := shared.Config{Root: d.sharedRoot(), Own: d.store.Pool().ID(), Drivers: sc.Drivers, Adopt: sc.Adopt}
	for _, name := range d.cfg.Shared.Pools {
		c.Pools = append(c.Pools, shared.Source{Name: name, Lease: d.cfg.Shared.Leases[name]})
	}
	if d.shared, err = shared.Open(ctx, c); err != nil {
		return err
	}
	d.offers, err = openOffers(filepath.Join(d.sharedRoot(), "attached.json"))
	return err
}

// sharedImages returns the pools for the snapshotter; nil if there are none.
func (d *Daemon) sharedImages() snapshotter.Shared {
	if d.shared == nil {
		return nil
	}
	return sharedImages{d.shared}
}

// sharedImages converts errors to containerd's kinds.
type sharedImages struct{ pools *shared.Pools }

func (s sharedImages) Claim(ctx context.Context, chain digest.Digest) error {
	return toErrdefs(s.pools.Claim(ctx, chain))
}

func (s sharedImages) Lower(ctx context.Context, chain digest.Digest) (string, error) {
	dir, err := s.pools.Lower(ctx, chain)
	return dir, toErrdefs(err)
}

func (s sharedImages) Sweep(ctx context.Context, needed func(digest.Digest) bool) error {
	return toErrdefs(s.pools.Sweep(ctx, needed))
}

// sharedStatus returns the state of the pools of other owners.
func (d *Daemon) sharedStatus() []shared.Status {
	if d.shared == nil {
		return []shared.Status{}
	}
	return d.shared.Status()
}

// sharedTrouble returns the errors of pools of other owners: of those in use here, and of the others.
func (d *Daemon) sharedTrouble() (used, unused error) {
	for _, p := range d.sharedStatus() {
		switch {
		case p.Lost != "" && p.Error == "":
			used = errors.Join(used, fmt.Errorf("shared pool %q: %s", p.Name, p.Lost))
		case p.Error == "":
		case p.Claimed > 0:
			used = errors.Join(used,
				fmt.Errorf("shared pool %q, of which %d images are in use here: %s", p.Name, p.Claimed, p.Error))
		default:
			unused = errors.Join(unused, fmt.Errorf("shared pool %q cannot be used: %s", p.Name, p.Error))
		}
	}
	return used, unused
}

// watchShared looks for new images in pools of other owners until stop is called, and attaches the configured ones.
func (d *Daemon) watchShared(ctx context.Context) (stop func()) {
	if d.shared == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(sharedInterval)
		defer tick.Stop()
		for first := true; ; {
			d.shared.Refresh(ctx)
			if first && d.blobs.up() {
				err := d.endAttaches(ctx)
				first = err != nil
				if err != nil && ctx.Err() == nil && !errdefs.IsUnavailable(err) {
					log.G(ctx).WithError(err).Debug("leases of interrupted attachments still exist")
				}
			}
			for _, ns := range d.cfg.Shared.Attach {
				d.attachNew(log.WithLogger(ctx, log.G(ctx).WithField("namespace", ns)), ns)
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}()
	return func() {
		cancel()
		<-ended
	}
}
