package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// ServerLock is the name of a file beside the mount point of a table. A server that outlives the
// daemon holds a shared flock on it as long as it runs.
const ServerLock = "fuse.lock"

// Alive tells whether any file system of the pool lives: mounted here, in another namespace or by
// hand, or unmounted but in use by an overlay or a working directory. False is proof, on this kernel.
// True may be wrong for a while: a process that reads the pool file counts, too.
//
//   - A write lease on a file is refused while a loop device, a file-backed mount or a server has it
//     open.
//   - Opening a block device with O_EXCL fails while a file system holds it.
//   - A FUSE server holds a lock.
//   - The daxfs module counts its users.
func (t *Table) Alive(ctx context.Context) (bool, error) {
	if t.getLive() != nil || len(t.List()) > 0 {
		return true, nil
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if alive, err := locked(filepath.Join(t.liveDir(), ServerLock)); err != nil || alive {
		return alive, err
	}
	removeDir(t.liveDir()) // the lock kept it
	r := t.pool.Region
	if r.HasPhys || r.Kind == region.KindDMABuf {
		if alive, err := moduleUsed("daxfs"); err != nil || alive {
			return alive, err
		}
	}
	if t := r.Traits(); t.MapOnly && t.ByAddress {
		return false, nil // only the module and a server mount these
	}
	if r.BlockDevice != "" {
		free, err := sys.DeviceFree(r.BlockDevice)
		return !free, err
	}
	if r.FD >= 0 {
		only, err := sys.OnlyUser(r.FD)
		if err != nil {
			return false, fmt.Errorf("who uses %s: %w", t.pool.source(), err)
		}
		return !only, nil
	}
	f, err := os.Open(r.Path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	only, err := sys.OnlyUser(int(f.Fd()))
	if err != nil {
		return false, fmt.Errorf("who uses %s: %w", t.pool.source(), err)
	}
	return !only, nil
}

// awaitServer waits for the end of the server of an unmounted pool. It does not wait if somebody still
// uses the file system, for example through a lazily unmounted overlay.
func (t *Table) awaitServer(ctx context.Context, l *live) {
	const patience = 10 * time.Second // a server ends within milliseconds
	if l.driver.Name() != "fuse" {
		return
	}
	if gone, err := sys.DeviceNumberFree(l.root.Major, l.root.Minor); err != nil || !gone {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		if alive, err := locked(filepath.Join(t.liveDir(), ServerLock)); err != nil || !alive {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Millisecond):
		}
	}
}

// locked tells whether another process holds a lock on a file. A missing file is not locked.
func locked(path string) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case err == nil:
		return false, nil
	case errors.Is(err, unix.EWOULDBLOCK):
		return true, nil
	default:
		return false, fmt.Errorf("lock %q: %w", path, err)
	}
}

// moduleUsed tells whether a kernel module has users. Each of its file systems counts as one.
func moduleUsed(name string) (bool, error) {
	path := filepath.Join("/sys/module", name, "refcnt") // missing if the module is built in
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	n, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	if err != nil {
		return false, fmt.Errorf("%q: %w", path, err)
	}
	return n > 0, nil
}
