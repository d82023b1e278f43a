package sys

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Clone is a mount that is not attached to a directory yet. Closing it unattached removes it.
type Clone struct {
	fd int
	// Stat describes the root of the clone: the file that will be visible, wherever the path leads by now.
	Stat unix.Stat_t
}

// OpenClone clones the mount of path, with path as its root.
func OpenClone(path string) (*Clone, error) {
	return openClone(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW)
}

func openClone(dirfd int, path string, flags uint) (*Clone, error) {
	fd, err := unix.OpenTree(dirfd, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|flags)
	if err != nil {
		return nil, explain(fmt.Errorf("open_tree %q: %w", path, err))
	}
	c := &Clone{fd: fd}
	if err := unix.Fstat(fd, &c.Stat); err != nil {
		return nil, errors.Join(fmt.Errorf("stat the clone of %q: %w", path, err), c.Close())
	}
	return c, nil
}

// Attach makes the clone visible on dir; restrict adds nosuid and nodev.
func (c *Clone) Attach(dir string, restrict bool) error {
	if restrict {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
		if err := unix.MountSetattr(c.fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return explain(fmt.Errorf("mount_setattr nosuid,nodev for %q: %w", dir, err))
		}
	}
	if err := unix.MoveMount(c.fd, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return explain(fmt.Errorf("bind to %q: %w", dir, err))
	}
	return nil
}

// Close removes the clone if it was not attached.
func (c *Clone) Close() error { return unix.Close(c.fd) }

// SetPrivate takes the mount on dir out of its peer group, so that its clones share none.
func SetPrivate(dir string) error {
	if err := unix.Mount("", dir, "", unix.MS_PRIVATE, ""); err != nil {
		return explain(fmt.Errorf("make %q private: %w", dir, err))
	}
	return nil
}

// Root identifies the root of a mount, from statx(2).
type Root struct {
	Major, Minor uint32
	Ino          uint64
}

// MountRoot identifies the root of the mount on dir. It uses the kernel's caches and takes constant
// time, however many mounts there are. ok is false if dir is no mount point or does not exist.
func MountRoot(dir string) (r Root, ok bool, err error) {
	return mountRoot(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT)
}

// HoldMountRoot identifies the root of the mount on dir, and keeps that in memory until f is closed. f is
// nil if dir is no mount point or does not exist.
func HoldMountRoot(dir string) (f *os.File, r Root, err error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, Root{}, nil
	}
	if err != nil {
		return nil, Root{}, fmt.Errorf("open %q: %w", dir, err)
	}
	r, ok, err := mountRoot(fd, "", unix.AT_EMPTY_PATH)
	if err != nil || !ok {
		unix.Close(fd)
		return nil, Root{}, err
	}
	return os.NewFile(uintptr(fd), dir), r, nil
}

func mountRoot(dirfd int, dir string, flags int) (r Root, ok bool, err error) {
	var st unix.Statx_t
	err = unix.Statx(dirfd, dir, flags|unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st)
	if errors.Is(err, unix.ENOENT) {
		return Root{}, false, nil
	}
	if err != nil {
		return Root{}, false, fmt.Errorf("statx %q: %w", dir, err)
	}
	r = Root{Major: st.Dev_major, Minor: st.Dev_minor, Ino: st.Ino}
	return r, st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}
