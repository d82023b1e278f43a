// Package erofs mounts EROFS in three ways, which differ in what lies between memory and file system:
//
//   - DAX: a block device with DAX (pmem, virtio-pmem). Mapped files are the pool's own pages.
//   - File: the kernel reads an ordinary file itself, with direct I/O, so that it caches only the
//     pages of files, not those of the pool again.
//   - Loop: a block device, or a read-only loop device over a file, for tmpfs and kernels without File.
//
// Each way is a mount.Driver, to be chosen automatically or by name. None leaves devices behind: a
// loop device clears itself with its last user.
package erofs

import (
	"context"
	"fmt"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

const remedy = "load the erofs module (CONFIG_EROFS_FS, in every distribution since Linux 5.4)"

var _, _, _ mount.Driver = DAX{}, (*File)(nil), Loop{}

// unmount is Unmount for the drivers whose devices remove themselves.
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
