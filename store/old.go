package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Version 1 of the program had its pool in <root>/pool/region, unless the configuration said otherwise, and its index in
// <root>/pool/index.db. Images are made again in a pool of this version; the old one stays as long as something that was
// mounted from it lives.
const (
	oldRegion = "region"
	oldIndex  = "index.db"
	// oldSuffix is added to the name of a pool of version 1 whose path the configuration names: the new pool takes its
	// place. Nothing that is mounted minds.
	oldSuffix = ".v1"
)

// oldPool is what is left of a pool of version 1. A device has no file that could be removed.
type oldPool struct{ region, index string }

// findOldPool finds a pool of version 1, and moves it out of the way of the one that is configured.
func findOldPool(root string, p *Pool) (*oldPool, error) {
	index := filepath.Join(root, "pool", oldIndex)
	if _, err := os.Lstat(index); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	old := &oldPool{region: filepath.Join(root, "pool", oldRegion), index: index}
	switch p.Kind {
	case region.KindFile, region.KindTmpfs, region.KindHugetlbfs:
	default:
		old.region = ""
		return old, nil
	}
	if p.Path == "" {
		return old, nil
	}
	moved := p.Path + oldSuffix
	if isOld(p.Path) {
		if err := unix.Renameat2(unix.AT_FDCWD, p.Path, unix.AT_FDCWD, moved, unix.RENAME_NOREPLACE); err != nil {
			return nil, fmt.Errorf("move the pool of an earlier version from %q to %q: %w", p.Path, moved, err)
		}
	}
	if _, err := os.Lstat(moved); err == nil {
		old.region = moved
	}
	return old, nil
}

// isOld reports whether a file holds a pool of an earlier version.
func isOld(path string) bool {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	_, err = pool.ReadCatalogue(f)
	return errors.Is(err, pool.ErrVersion)
}

// retire unmounts what earlier pools and epochs left mounted and nothing uses, and removes a pool of version 1 that
// nothing stands on.
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
	if user == "" && old.region != "" {
		used, err := fileInUse(old.region)
		if err != nil {
			return err
		}
		if used {
			user = "a file system or a process that no mount table shows"
		}
	}
	if user != "" {
		log.G(ctx).WithField("pool", old.region).WithField("user", user).
			Info("a pool of version 1 stays until nothing that was mounted from it is left")
		return nil
	}
	for _, path := range []string{old.region, old.index} {
		if path == "" {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	log.G(ctx).WithField("pool", old.region).Info("removed a pool of version 1")
	s.mu.Lock()
	s.old = nil
	s.mu.Unlock()
	return nil
}

// fileInUse reports whether anything has a file open: a process, a loop device, a mount. The kernel refuses a write lease
// then.
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
