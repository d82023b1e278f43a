package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool"
)

// Version 1 of the program had its pool in <root>/pool/region, unless configured otherwise, and its
// index in <root>/pool/index.db. Images are made again in a pool of this version. The old pool stays
// while a mount of it lives.
const (
	oldRegion = "region"
	oldIndex  = "index.db"
	// oldSuffix is appended to the name of a version 1 pool with a configured path: the new pool takes its
	// place. Mounts survive the renaming.
	oldSuffix = ".v1"
)

// oldShm was the default path of kind tmpfs.
const oldShm = "/dev/shm/daxfs-snapshotter.pool"

// oldPool lists the remains of version 1: the index and its pools, several if the configuration was
// changed. A pool on a device has no file to remove.
type oldPool struct {
	regions []string
	index   string
}

// findOldPool finds the pools of version 1, and renames one in the place of the configured pool.
func findOldPool(root string, p Pool) (*oldPool, error) {
	index := filepath.Join(root, "pool", oldIndex)
	if _, err := os.Lstat(index); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	old := &oldPool{index: index}
	candidates := []string{filepath.Join(root, "pool", oldRegion), oldShm}
	if p.Path != "" {
		moved := p.Path + oldSuffix
		if isOld(p.Path) {
			if err := unix.Renameat2(unix.AT_FDCWD, p.Path, unix.AT_FDCWD, moved, unix.RENAME_NOREPLACE); err != nil {
				return nil, fmt.Errorf("move the pool of version 1 from %q to %q: %w", p.Path, moved, err)
			}
		}
		candidates = append(candidates, moved)
	}
	for _, path := range candidates {
		if isOld(path) {
			old.regions = append(old.regions, path)
		}
	}
	return old, nil
}

// isOld reports whether a path is a file of ours with a pool of an earlier version.
func isOld(path string) bool {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() || int(st.Sys().(*syscall.Stat_t).Uid) != os.Geteuid() {
		return false
	}
	_, err = pool.ReadCatalogue(f)
	return errors.Is(err, pool.ErrVersion)
}

// retire removes unused mounts of earlier pools and epochs, and an unused pool of version 1.
func (s *Store) retire(ctx context.Context) error {
	s.epoch.RLock()
	defer s.epoch.RUnlock()
	left, err := s.table.RemoveStale(ctx, func(string) bool { return false })
	if err != nil {
		return err
	}
	s.mu.Lock()
	old := s.old
	s.mu.Unlock()
	if old == nil {
		return nil
	}
	user := ""
	for _, m := range left {
		if m.Version == 1 {
			user = fmt.Sprintf("%q, used by %s", m.Dir, m.UsedBy)
		}
	}
	for _, path := range old.regions {
		used, err := fileInUse(path)
		if err != nil {
			return err
		}
		if used && user == "" {
			user = "a file system or a process that no mount table shows"
		}
	}
	logger := log.G(ctx).WithField("pools", old.regions)
	if user != "" {
		logger.WithField("user", user).Info("a pool of version 1 stays while something is mounted from it")
		return nil
	}
	for _, path := range append(old.regions, old.index) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	logger.Info("removed what was left of version 1")
	s.mu.Lock()
	s.old = nil
	s.mu.Unlock()
	return nil
}

// fileInUse reports whether a file is open anywhere: then the kernel refuses a write lease.
func fileInUse(path string) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	if errors.Is(err, unix.EAGAIN) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("lease of %q: %w", path, err)
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	return false, err
}
