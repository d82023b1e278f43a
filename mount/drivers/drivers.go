// Package drivers lists all ways of mounting.
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

// All returns the drivers in the order in which "auto" tries them. Sharing decides first, then
// fidelity: DAX shares the pool's own pages. The next three cache pages once per host and show
// everything; among them, those without a second copy of the pool or without a server come first. The
// kernel module comes before FUSE because it was made for the memory that only those two can mount (a
// physical range, a dma-buf).
func All() []mount.Driver {
	return []mount.Driver{erofs.DAX{}, &erofs.File{}, erofs.Loop{}, kernel.Driver{}, fusefs.Driver{}}
}

// Resolve returns a directory in the form that drivers need: absolute, without symbolic links. It
// works on mount points whose server is dead.
func Resolve(dir string) (string, error) { return sys.Real(dir) }

// Of returns the driver of the mount on dir, a result of Resolve, and the root of the table that the
// mount belongs to, if any. It fails with mount.ErrNotFound unless one of the drivers mounted
// something there.
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
