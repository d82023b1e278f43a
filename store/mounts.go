package store

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// MountAt mounts an image, named as for Find, on a directory that a user chose; restrict adds nosuid
// and nodev. The mount holds the image.
func (s *Store) MountAt(ctx context.Context, name, dir string, restrict bool) (Info, error) {
	dir, err := cleanDir(dir)
	if err != nil {
		return Info{}, err
	}
	info, unlock, err := s.findLocked(ctx, name)
	if err != nil {
		return Info{}, err
	}
	defer unlock()
	key := canonical(info.Key)
	s.epoch.RLock()
	defer s.epoch.RUnlock()
	m, err := s.pool.Image(s.poolKey(key)) // a sweep may have been faster
	if s.pool.ImageDamaged(info.Key) && errors.Is(err, pool.ErrNotFound) {
		m, _, err = s.build(ctx, s.recorded(key))
	}
	if err != nil {
		return Info{}, err
	}
	if _, err := s.table.Mount(ctx, s.mountable(m)); err != nil {
		return Info{}, err
	}
	// The holder comes first: a crash leaves a holder without a mount, which the next sweep drops.
	holder := holderMount + dir
	err = errors.Join(
		s.amendImage(key, func(r *imageRecord) { r.Holders = add(r.Holders, holder) }), s.pool.FlushRecords())
	if err != nil {
		return Info{}, err
	}
	// Nothing reports a user's overlay over it: an overlay keeps its own mount of its lower.
	if err := s.noteLoose(); err != nil {
		return Info{}, errors.Join(err, s.dropHolder(key, holder))
	}
	if err := s.table.Bind(ctx, m.Key, dir, restrict); err != nil {
		return Info{}, errors.Join(err, s.dropHolder(key, holder))
	}
	return s.info(m), nil
}

// UnmountAt undoes MountAt. Errors: mount.ErrBusy, mount.ErrNotFound.
func (s *Store) UnmountAt(ctx context.Context, dir string) error {
	dir, err := cleanDir(dir)
	if err != nil {
		return err
	}
	holder := holderMount + dir
	for key, r := range s.imageRecords() {
		if !slices.Contains(r.Holders, holder) {
			continue
		}
		// An ordinary unmount fails while a process is inside, so afterwards none is.
		err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		switch {
		case errors.Is(err, unix.EBUSY):
			return fmt.Errorf("unmount %q: %w", dir, mount.ErrBusy)
		case err != nil && !errors.Is(err, unix.EINVAL): // EINVAL: no mount point any more
			return fmt.Errorf("unmount %q: %w", dir, err)
		}
		return s.dropHolder(key, holder)
	}
	return fmt.Errorf("no image of this pool is mounted on %q: %w", dir, mount.ErrNotFound)
}

// Mounts returns the directories on which users had images mounted, with the keys of the images.
func (s *Store) Mounts() map[string]string {
	out := map[string]string{}
	for key, r := range s.imageRecords() {
		for _, h := range r.Holders {
			if dir, ok := strings.CutPrefix(h, holderMount); ok {
				out[dir] = key
			}
		}
	}
	return out
}

func (s *Store) dropHolder(key, holder string) error {
	err := s.amendImage(key, func(r *imageRecord) {
		r.Holders = without(r.Holders, func(h string) bool { return h == holder })
	})
	return errors.Join(err, s.pool.FlushRecords())
}

// cleanDir returns the path of a directory without symbolic links.
func cleanDir(dir string) (string, error) {
	if !filepath.IsAbs(dir) {
		return "", fmt.Errorf("directory %q is not an absolute path: %w", dir, pool.ErrInvalid)
	}
	return filepath.EvalSymlinks(dir)
}
