// Package drivers lists every way of mounting an image that there is.
package drivers

import (
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/fusefs"
	"github.com/daxfs/daxfs-snapshotter/mount/kernel"
)

// All returns the drivers in the order in which "auto" tries them. Sharing decides first, then fidelity: DAX shares the
// pool's own pages; the three that cache pages once per host show everything, and among them those without a second copy
// of the image or without a server come first. The kernel module comes before FUSE because the memory that only those two
// can mount (a physical range, a dma-buf) is what it was made for.
func All() []mount.Driver {
	return []mount.Driver{erofs.DAX{}, &erofs.File{}, erofs.Loop{}, kernel.Driver{}, fusefs.Driver{}}
}
