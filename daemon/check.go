package daemon

import (
	"context"

	"github.com/daxfs/daxfs-snapshotter/store"
)

// Check compares everything that the daemon knows with everything there is: snapshots, directories, records, layers,
// packs, images, mounts, loop devices. It tells report of each contradiction and of each thing that is left over. It is
// exact when nothing else is under way, after Flush and Cleanup.
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
