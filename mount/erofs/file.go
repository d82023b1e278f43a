package erofs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// File mounts a file without any device. The zero value is ready to use.
type File struct {
	bug func() string // nil means Bug; replaced in tests
}

// Name returns "erofs-file".
func (*File) Name() string { return "erofs-file" }

// Sharing implements mount.Driver.
func (*File) Sharing() string {
	return "one page-cache copy of each distinct file on this host, shared by all containers, reclaimable, " +
		"and no other copy in memory; full fidelity"
}

// Windows implements mount.Driver.
func (*File) Windows() bool { return false }

// Probe implements mount.Driver. It mounts a tiny image in a file on the region's file system. Kernel
// versions say little, because distributions backport options and leave CONFIG_EROFS_FS_BACKED_BY_FILE
// out. Only the bug that Bug knows cannot be tried.
func (d *File) Probe(_ context.Context, r region.Info) error {
	if err := sys.HasFilesystem("erofs", remedy); err != nil {
		return err
	}
	path, err := backing(r)
	if err != nil {
		return err
	}
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%w: %w", err, mount.ErrUnsupported)
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%q is not an ordinary file: %w", path, mount.ErrUnsupported)
	}
	known := d.bug
	if known == nil {
		known = Bug
	}
	if text := known(); text != "" {
		return fmt.Errorf("%s: %w", text, mount.ErrUnsupported)
	}
	return tryFile(path)
}

// tryFile mounts a tiny image beside path, without attaching it to a directory.
func tryFile(path string) error {
	f, err := tempBeside(path)
	if err != nil {
		return nil // a read-only or full file system: only the real mount can tell
	}
	defer f.Close()
	if _, err := f.WriteAt(tinyImage(), 0); err != nil {
		return nil
	}
	err = sys.Do(fileMount(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), 0, false), "")
	return notFileBacked(err, path)
}

// tempBeside returns an unnamed file on the file system of path.
func tempBeside(path string) (*os.File, error) {
	dir := filepath.Dir(path)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), dir), nil
	}
	f, err := os.CreateTemp(dir, ".daxfs-probe-*")
	if err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

func fileMount(path string, off int64, restrict bool) sys.Mount {
	m := sys.Mount{Type: "erofs", Source: path, Options: []string{"directio"}, Restrict: restrict}
	if off != 0 {
		m.Options = append(m.Options, "fsoffset="+strconv.FormatInt(off, 10))
	}
	return m
}

// notFileBacked explains errors that mean: not on this kernel, or not on this file system.
func notFileBacked(err error, path string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOTBLK):
		return fmt.Errorf("the kernel cannot mount EROFS from a file on the file system of %q (tmpfs, overlay and "+
			"FUSE cannot; ext4, xfs and btrfs can, with CONFIG_EROFS_FS_BACKED_BY_FILE): %w",
			path, mount.ErrUnsupported)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("this kernel's EROFS has no directio option (Linux 6.13), or no fsoffset= for an image "+
			"inside of a file (Linux 6.17): %w: %w", err, mount.ErrUnsupported)
	}
	return err
}

// Mount implements mount.Driver.
func (d *File) Mount(_ context.Context, src mount.Source, dir string) error {
	if err := checkDir(src, dir); err != nil {
		return err
	}
	path, err := backing(src.Region)
	if err != nil {
		return err
	}
	return notFileBacked(sys.Do(fileMount(path, src.Off, src.Restrict), dir), path)
}

// Match implements mount.Driver. It compares the path and the offset that the kernel shows. The table
// checks the inode number, that is, whether the path still leads to the same file.
func (*File) Match(ctx context.Context, src mount.Source, dir string) error {
	m, err := sys.MatchTop(dir, "erofs", src.Restrict)
	if err != nil {
		return err
	}
	path, err := backing(src.Region)
	if err != nil {
		return err
	}
	off, _ := sys.MountOption(m, "fsoffset")
	if off == "" {
		off = "0"
	}
	if m.Source != path || off != strconv.FormatInt(src.Off, 10) {
		return fmt.Errorf("%q is mounted from %q at %s, expected %q at %d", dir, m.Source, off, path, src.Off)
	}
	return sys.Alive(ctx, dir)
}

// Unmount implements mount.Driver.
func (*File) Unmount(ctx context.Context, dir string) error { return unmount(ctx, dir) }

// tinyImage is an EROFS image of an empty root directory: superblock, inode, block of entries.
func tinyImage() []byte {
	const bs = 4096
	b, le := make([]byte, 3*bs), binary.LittleEndian
	sb := b[1024:]
	le.PutUint32(sb[0:], 0xE0F5E1E2) // magic
	sb[12] = 12                      // block size bits
	le.PutUint64(sb[16:], 1)         // inodes; root nid (14) is 0
	le.PutUint32(sb[36:], 3)         // blocks
	le.PutUint32(sb[40:], 1)         // metadata start block
	ino := b[bs:]                    // compact inode, flat plain
	le.PutUint16(ino[4:], unix.S_IFDIR|0o755)
	le.PutUint16(ino[6:], 2)  // links
	le.PutUint32(ino[8:], 27) // size: two entries of 12 bytes, "." and ".."
	le.PutUint32(ino[16:], 2) // data block
	dir := b[2*bs:]
	le.PutUint16(dir[8:], 24) // name offset of "."
	dir[10] = 2               // directory
	le.PutUint16(dir[20:], 25)
	dir[22] = 2
	copy(dir[24:], "...")
	return b
}
