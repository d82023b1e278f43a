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
	// scrubDelay is how long the daemon serves before it begins to scrub: after a boot there is other work.
	scrubDelay = time.Minute
	// scrubInterval is the least time from the beginning of a scrub to that of the next one.
	scrubInterval = time.Hour
)

// scrubLoop scrubs the pool again and again, at most rate bytes a second, until ctx ends: for the first time after
// delay, and then delay after the last one and interval after the last one began. It does nothing if rate is 0.
func (d *Daemon) scrubLoop(ctx context.Context, rate int64, delay, interval time.Duration) {
	for wait := delay; rate > 0; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		began := time.Now()
		if _, err := d.scrub(ctx, rate); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Error("the contents of the pool cannot be read through")
		}
		wait = max(delay, interval-time.Since(began))
	}
}

// scrub reads the contents of the pool, and makes images again that hold damaged ones.
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

// heal makes images again that hold damaged contents. lost says which cannot be.
func (d *Daemon) heal(ctx context.Context) (lost, err error) {
	// The snapshotter knows where layers can be restored from.
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
