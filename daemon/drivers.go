package daemon

import (
	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/drivers"
	"github.com/daxfs/daxfs-snapshotter/mount/fusefs"
)

// allDrivers returns the drivers in the order in which "auto" tries them.
func allDrivers(c *config.Config) []mount.Driver {
	all := drivers.All()
	for i, d := range all {
		if _, ok := d.(fusefs.Driver); ok && c.Mount.FUSEHelper != "" {
			all[i] = fusefs.Driver{Command: []string{c.Mount.FUSEHelper, "mount", "--driver", "fuse", "--foreground"}}
		}
	}
	return all
}
