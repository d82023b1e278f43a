// Package drivers lists every way of mounting that there is.
package drivers

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/fusefs"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/mount/kernel"
)

// All returns the drivers in the order in which "auto" tries them. Sharing decides first, then fidelity: DAX shares
// the pool's own pages; the three that cache pages once per host show everything, and among them those without a
// second copy of the pool or without a server come first. The kernel module comes before FUSE because the memory that
// only those two can mount (a physical range, a dma-buf) is what it was made for.
func All() []mount.Driver {
	return []mount.Driver{erofs.DAX{}, &erofs.File{}, erofs.Loop{}, kernel.Driver{}, fusefs.Driver{}}
}

// Resolve returns a directory as the drivers want it: absolute, without symbolic links. It works on mount points
// whose server is dead.
func Resolve(dir string) (string, error) { return sys.Real(dir) }

// Of returns the driver that mounted what is on dir, which Resolve gave, and the root of the table that it belongs
// to, if it belongs to one. It fails with mount.ErrNotFound if nothing is mounted there, or nothing that a driver
// makes.
func Of(dir string) (driver mount.Driver, table string, err error) {
	m, _, err := sys.Top(dir)
	switch {
	case err != nil:
		return nil, "", err
	case m == nil:
		return nil, "", fmt.Errorf("%q: %w", dir, mount.ErrNotFound)
	case m.FSType == "daxfs":
		driver = kernel.Driver{}
	case m.FSType == "fuse.daxfs":
		driver = fusefs.Driver{}
	case m.FSType != "erofs":
		return nil, "", fmt.Errorf("%q is a mount of type %q and not of an image: %w", dir, m.FSType, mount.ErrNotFound)
	case strings.HasPrefix(m.Source, "/dev/loop"):
		driver = erofs.Loop{}
	case strings.HasPrefix(m.Source, "/dev/"):
		driver = erofs.DAX{}
	default:
		driver = &erofs.File{}
	}
	for _, record := range []string{"image.json", "pool.json"} {
		switch _, err := os.Stat(filepath.Join(filepath.Dir(dir), record)); {
		case err == nil:
			return driver, filepath.Dir(filepath.Dir(filepath.Dir(dir))), nil
		case !errors.Is(err, fs.ErrNotExist):
			return nil, "", err
		}
	}
	return driver, "", nil
}
