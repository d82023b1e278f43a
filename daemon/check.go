package daemon

import (
	"context"

	"github.com/daxfs/daxfs-snapshotter/store"
)

// Check compares the daemon's records with the real state: snapshots, directories, layers, packs,
// images, mounts, loop devices. It passes each contradiction and each leftover to report. It is exact
// after Flush and Cleanup, while no other operation is under way.
func (d *Daemon) Check(ctx context.Context, report func(msg string)) error {
	facts, err := d.sn.Check(ctx, report)
	if err != nil {
		return err
	}
	images := map[string][]store.Layer{}
	for key, layers := range facts.Images {
		for _, f := range layers {
			images[key] = append(images[key], store.Layer{Key: f.Key, Dir: f.Dir, Claim: store.Claim(f.Claim)})
		}
	}
	return d.store.Check(ctx, uses{facts.Uses}, images, report)
}
