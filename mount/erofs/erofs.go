// Package erofs mounts the EROFS half of an image, in three ways that differ in what stands between the memory and the
// file system:
//
//   - DAX: a block device with DAX (pmem, virtio-pmem). A dm-linear device makes the window a block device of its own; mapped
//     files are then the pool's own pages.
//   - File: the kernel reads the window of an ordinary file itself (fsoffset=), with direct I/O so that only the
//     files' pages are cached and not those of the image a second time.
//   - Loop: a read-only loop device over the window, for tmpfs and for kernels without the way above.
//
// Each way is a mount.Driver of its own, so that the first that works can be chosen, and each can be asked for by name. None
// leaves devices behind: a loop device clears itself with its last user, a device-mapper device is marked for deferred
// removal as soon as it is mounted.
package erofs

import (
	"context"
	"fmt"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

const remedy = "load the erofs module (CONFIG_EROFS_FS, in every distribution since Linux 5.4)"

var _, _, _ mount.Driver = DAX{}, (*File)(nil), Loop{}

// unmount is Unmount of the ways whose devices remove themselves.
func unmount(ctx context.Context, dir string) error {
	m, _, err := sys.Top(dir)
	if err != nil {
		return err
	}
	if m == nil {
		return nil
	}
	return sys.Unmount(ctx, dir)
}

func checkDir(src mount.Source, dir string) error {
	m, _, err := sys.Top(dir)
	if err != nil {
		return err
	}
	if m != nil {
		return fmt.Errorf("mount %s: %q is a mount point already (%s %q)", src, dir, m.FSType, m.Source)
	}
	return nil
}
