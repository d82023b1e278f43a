package daemon

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/log"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/store"
)

const (
	// scrubDelay is the time from the start of the daemon to its first scrub: a boot has other work first.
	scrubDelay = time.Minute
	// scrubInterval is the least time from the start of one scrub to the start of the next.
	scrubInterval = time.Hour
)

// scrubLoop scrubs the pool repeatedly, at most rate bytes a second, until ctx ends. It first waits
// for delay. The next scrub starts delay after the last one ended, and not before interval after it
// began. A rate of 0 turns scrubbing off.
func (d *Daemon) scrubLoop(ctx context.Context, rate int64, delay, interval time.Duration) {
	for wait := delay; rate > 0; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		began := time.Now()
		if _, err := d.scrub(ctx, rate); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Error("not all contents of the pool can be read")
		}
		wait = max(delay, interval-time.Since(began))
	}
}

// scrub reads the contents of the pool and rebuilds the images that hold damaged ones.
func (d *Daemon) scrub(ctx context.Context, rate int64) (api.Scrub, error) {
	done, err := d.store.Scrub(ctx, rate)
	a := api.Scrub{Scrubbed: done, Findings: []pool.Finding{}}
	d.metrics.scrubbed.Add(float64(done.Bytes))
	for _, damage := range d.store.Pool().Damaged() {
		a.Findings = append(a.Findings, damage.Finding())
	}
	if len(a.Findings) > 0 {
		lost, herr := d.heal(ctx)
		if lost != nil {
			a.Lost = lost.Error()
		}
		err = errors.Join(err, herr)
	}
	return a, err
}

// heal rebuilds the images that hold damaged contents. lost names those that cannot be rebuilt.
func (d *Daemon) heal(ctx context.Context) (lost, err error) {
	// The snapshotter knows the sources of the layers.
	facts, err := d.sn.Check(ctx, func(string) {})
	if err != nil {
		return nil, err
	}
	layers := map[string][]store.Layer{}
	for key, list := range facts.Images {
		layers[key] = layersOf(list)
	}
	return d.store.Heal(ctx, layers), ctx.Err()
}
