package service

import (
	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
)

// allDrivers returns the drivers in the order in which "auto" tries them.
func allDrivers(c *config.Config) []mount.Driver {
	return []mount.Driver{erofs.DAX{}, &erofs.File{}, erofs.Loop{}}
}
