package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// FromDir reads a directory on disk as it is: it keeps and counts character devices 0:0 and the attributes of
// overlayfs. Contents of regular files go into s in the order of their paths; the order of changes depends on
// names only. Only root sees trusted.* attributes; they are missing if another user reads the directory.
//
// The directory must be at rest. A file that shrinks meanwhile is an error; other changes may go
// unnoticed, but FromDir never follows a symbolic link or opens a device, FIFO or socket, whatever is
// swapped meanwhile. dir itself may be a symbolic link. FromDir holds one file descriptor for each level.
func FromDir(ctx context.Context, dir string, s Store, lim Limits) (*Layer, error) {
	return fromDir(ctx, dir, s, lim, false)
}

// FromUpper reads the upper directory of an overlay mount like FromDir, but turns the marks of
// overlayfs into changes: character devices 0:0 and files with the xattr overlay.whiteout become
// removals, directories with overlay.opaque become opaque, and all other trusted.overlay.* and
// user.overlay.* attributes are left out. A redirected directory or a file without its contents
// (metacopy) is ErrUnsupported: their data lies outside of the directory.
func FromUpper(ctx context.Context, dir string, s Store, lim Limits) (*Layer, error) {
	return fromDir(ctx, dir, s, lim, true)
}

func fromDir(ctx context.Context, dir string, s Store, lim Limits, upper bool) (*Layer, error) {
	d := dirReader{builder: newBuilder(FromDirectory, lim), store: s, upper: upper, seen: make(map[inode]string)}
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	f := os.NewFile(uintptr(root), dir)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: dir, Err: err}
	}
	if err := d.directory(ctx, f, "", &st); err != nil {
		return nil, err
	}
	return d.layer, nil
}

type inode struct{ dev, ino uint64 }

type dirReader struct {
	*builder
	store Store
	upper bool             // interpret the marks of overlayfs
	seen  map[inode]string // first path of inodes with several names
	list  []byte           // buffers for extended attributes
	value []byte
}

// directory adds the open directory f and everything below it.
func (d *dirReader) directory(ctx context.Context, f *os.File, p string, st *unix.Stat_t) error {
	n, marks, err := d.attributes(f, st)
	if err != nil {
		return entryError(p, err)
	}
	if marks.redirect || marks.metacopy {
		return entryError(p, unsupportedf("overlayfs redirected the directory; mount with redirect_dir=off"))
	}
	if err := d.add(Change{Op: OpAdd, Path: p, Node: n}); err != nil {
		return entryError(p, err)
	}
	if marks.opaque {
		if err := d.add(Change{Op: OpOpaque, Path: p}); err != nil {
			return entryError(p, err)
		}
	}
	names, err := f.Readdirnames(-1)
	if err != nil {
		return entryError(p, err)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		child := name
		if p != "" {
			child = p + "/" + name
		}
		if err := d.entry(); err != nil {
			return entryError(child, err)
		}
		if err := d.child(ctx, f, name, child, marks.whiteouts); err != nil {
			if _, ok := errors.AsType[*EntryError](err); ok || ctx.Err() != nil {
				return err
			}
			return entryError(child, err)
		}
	}
	return nil
}

// child adds one entry of dir. If whiteouts is true, files in dir may be whiteouts in xattr form.
func (d *dirReader) child(ctx context.Context, dir *os.File, name, p string, whiteouts bool) error {
	if err := d.lim.checkPath(p); err != nil {
		return err
	}
	// O_PATH does not open the device or FIFO behind the name, and the type cannot change between the
	// check and the use.
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("openat", err)
	}
	f := os.NewFile(uintptr(fd), p)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFDIR {
		open, err := reopen(f, unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer open.Close()
		return d.directory(ctx, open, p, &st)
	}
	if kind == unix.S_IFCHR && st.Rdev == 0 {
		d.layer.Stats.Whiteouts++
		if d.upper {
			return d.add(Change{Op: OpRemove, Path: p})
		}
	}
	if st.Nlink > 1 {
		id := inode{st.Dev, st.Ino}
		if first, ok := d.seen[id]; ok {
			return d.add(Change{Op: OpLink, Path: p, LinkTo: first})
		}
		d.seen[id] = p
	}
	n, marks, err := d.attributes(f, &st)
	if err != nil {
		return err
	}
	if marks.redirect || marks.metacopy {
		return unsupportedf("overlayfs keeps the contents in another layer; mount with metacopy=off")
	}
	if marks.whiteout && whiteouts && kind == unix.S_IFREG && st.Size == 0 {
		d.layer.Stats.Whiteouts++
		return d.add(Change{Op: OpRemove, Path: p})
	}
	switch kind {
	case unix.S_IFREG:
		if err := d.file(ctx, f, &st, n); err != nil {
			return err
		}
	case unix.S_IFLNK:
		if n.Target, err = readlink(f); err != nil {
			return err
		}
		if err := d.keep(len(n.Target)); err != nil {
			return err
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Rdev = st.Rdev
	}
	return d.add(Change{Op: OpAdd, Path: p, Node: n})
}

// file stores the contents of the regular file behind f.
func (d *dirReader) file(ctx context.Context, f *os.File, st *unix.Stat_t, n *daxfs.Node) error {
	if err := d.content(st.Size); err != nil {
		return err
	}
	if st.Size == 0 {
		return nil
	}
	open, err := reopen(f, 0)
	if err != nil {
		return err
	}
	defer open.Close()
	n.Data, err = d.store.Put(ctx, st.Size, open)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("shorter than its %d bytes: changed while it was read: %w", st.Size, err)
	}
	return err
}

// selfPath names the inode behind a descriptor. Resolving it follows no link behind the descriptor.
func selfPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// reopen opens the inode of an O_PATH descriptor for reading, not one that has taken its name since.
func reopen(f *os.File, flags int) (*os.File, error) {
	fd, err := unix.Open(selfPath(f), unix.O_RDONLY|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, os.NewSyscallError("open", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// readlink returns the target of the symbolic link behind an O_PATH descriptor.
func readlink(f *os.File) (string, error) {
	buf := make([]byte, maxTarget+1)
	n, err := unix.Readlinkat(int(f.Fd()), "", buf)
	if err != nil {
		return "", os.NewSyscallError("readlinkat", err)
	}
	target := string(buf[:n])
	return target, checkTarget(target)
}
