package daxfs

import (
	"fmt"
	"io"
	"io/fs"

	"golang.org/x/sys/unix"
)

// MaxName and MaxTarget are the maximum lengths of a directory entry's name and of a symlink target, in bytes.
const (
	MaxName   = 255
	MaxTarget = 4095
)

// Stat holds the attributes of one inode. FileInfo.Sys returns a *Stat.
type Stat struct {
	// Nid is the number by which a half finds the inode; stat(2) shows it as the inode number.
	Nid uint64
	// Mode holds the file type (S_IFMT) and the permission bits exactly as stat(2) reports them.
	Mode uint32
	// Nlink is the number of links as stored.
	Nlink uint32
	// UID and GID are the owner.
	UID, GID uint32
	// Rdev is the device number in the encoding of unix.Mkdev, or 0 if the inode is not a device.
	Rdev uint64
	// Mtime is the modification time, zero in the DAXFS half, which stores none.
	Mtime Time
	// Size is the size in bytes of a regular file, of a symlink target, or of a directory as stored.
	Size int64
	// Off is the offset of contiguous contents in the image, else -1 (also when Size is 0).
	Off int64

	h half
}

// Xattrs returns the extended attributes in stored order. Names are full names ("user.x"). The DAXFS half has none.
func (s *Stat) Xattrs() ([]Xattr, error) {
	in, err := s.h.inode(s.Nid)
	if err != nil {
		return nil, err
	}
	return in.Xattrs()
}

// half is one of the two filesystems of an image: *FS or *DAXFS. All code above it serves both.
type half interface {
	root() uint64
	inode(nid uint64) (Inode, error)
	// parent returns the parent of the directory in, and false if this half does not store it.
	parent(in *Inode) (uint64, bool, error)
	lookup(dir *Inode, name string) (Dirent, error)
	entries(dir *Inode, cursor int64, fn func(Dirent) bool) error
	xattrs(in *Inode) ([]Xattr, error)
	src() *source
}

// Inode is an inode of one half of an image: its attributes and access to its contents. It is a small
// value, safe for concurrent use.
type Inode struct {
	Stat

	base int64 // offset of the contents, or of their whole blocks if the tail is stored apart
	tail int64 // offset of the partial last block if it is stored apart (FLAT_INLINE), else 0
	// offset and size of the attributes stored with the inode; the size is 0 or includes their header
	xoff int64
	xlen int64
}

// Dirent is one entry of a directory.
type Dirent struct {
	// Nid is the inode, Type its file type (S_IFMT) according to the entry, or 0 if that is unknown.
	Nid  uint64
	Type uint32
	// Name is the name as stored. Reading never returns an empty name or one with '/' or NUL.
	Name string
	// Next is the cursor of the following entry.
	Next int64
}

// IsDir reports whether the inode is a directory.
func (in *Inode) IsDir() bool { return in.Mode&unix.S_IFMT == unix.S_IFDIR }

// IsRegular reports whether the inode is a regular file.
func (in *Inode) IsRegular() bool { return in.Mode&unix.S_IFMT == unix.S_IFREG }

// IsSymlink reports whether the inode is a symbolic link.
func (in *Inode) IsSymlink() bool { return in.Mode&unix.S_IFMT == unix.S_IFLNK }

// Lookup returns the inode number of a name in a directory, or fs.ErrNotExist. "." and ".." are not
// names. It takes O(log n) in the EROFS half and O(n) in the DAXFS half.
func (in Inode) Lookup(name string) (uint64, error) {
	if !in.IsDir() {
		return 0, fmt.Errorf("daxfs: inode %d: %w", in.Nid, unix.ENOTDIR)
	}
	if name == "." || name == ".." || len(name) > MaxName {
		return 0, fs.ErrNotExist
	}
	e, err := in.h.lookup(&in, name)
	return e.Nid, err
}

// Entries calls fn for the entries of a directory from cursor on, in stored order (by name in the EROFS
// half), until fn returns false. It skips "." and "..". A cursor is 0 or the Next of an entry; any other
// value is safe and gives an error or some entries. Memory use does not depend on the size of the directory.
func (in Inode) Entries(cursor int64, fn func(Dirent) bool) error {
	if !in.IsDir() {
		return fmt.Errorf("daxfs: inode %d: %w", in.Nid, unix.ENOTDIR)
	}
	return in.h.entries(&in, cursor, func(e Dirent) bool {
		if e.Name == "." || e.Name == ".." {
			return true
		}
		return fn(e)
	})
}

// Target returns the target of a symbolic link: 1 to MaxTarget bytes, without NUL.
func (in Inode) Target() (string, error) {
	if !in.IsSymlink() {
		return "", fmt.Errorf("daxfs: inode %d: %w", in.Nid, unix.EINVAL)
	}
	if in.Size < 1 || in.Size > MaxTarget {
		return "",
			in.bad(in.rule(RuleSymlink, RuleV8Symlink), "target of %d bytes, expected 1 to %d", in.Size, MaxTarget)
	}
	b := make([]byte, in.Size)
	if _, err := in.ReadAt(b, 0); err != nil {
		return "", err
	}
	for _, c := range b {
		if c == 0 {
			return "", in.bad(in.rule(RuleSymlink, RuleV8Symlink), "target %q holds a NUL", b)
		}
	}
	return string(b), nil
}

// Xattrs returns the extended attributes in stored order, each with its full name.
func (in Inode) Xattrs() ([]Xattr, error) { return in.h.xattrs(&in) }

// Xattr returns one extended attribute by its full name, and false if the inode has none of that name.
func (in Inode) Xattr(name string) ([]byte, bool, error) {
	xs, err := in.Xattrs()
	if err != nil {
		return nil, false, err
	}
	for _, x := range xs {
		if x.Name == name {
			return x.Value, true, nil
		}
	}
	return nil, false, nil
}

// Data returns the range of the image that holds the contents of a regular file, or false if they are
// not contiguous. A file of size 0 has the range 0, 0.
func (in Inode) Data() (off, size int64, ok bool) {
	switch {
	case !in.IsRegular():
		return 0, 0, false
	case in.Size == 0:
		return 0, 0, true
	}
	return in.Off, in.Size, in.Off >= 0
}

// ReadAt reads the contents of a regular file, a symlink target, or the stored bytes of a directory.
func (in Inode) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("daxfs: negative offset %d", off)
	}
	n := 0
	for n < len(p) && off < in.Size {
		at, max := in.piece(off)
		k := min(int64(len(p)-n), max)
		if err := in.h.src().readFull(p[n:n+int(k)], at); err != nil {
			return n, err
		}
		n += int(k)
		off += k
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// View returns up to n bytes of contents from off on: fewer than n only at the end or where the contents are
// in pieces, none after the end. If the image is in memory, it does not copy: the caller must not write to
// the bytes or use them after the image is unmapped. Otherwise it reads, and n bounds the memory used.
func (in Inode) View(off int64, n int) ([]byte, error) {
	if off < 0 || n < 0 {
		return nil, fmt.Errorf("daxfs: view of %d bytes at %d: %w", n, off, unix.EINVAL)
	}
	if off >= in.Size || n == 0 {
		return nil, nil
	}
	at, max := in.piece(off)
	return in.h.src().view(at, int(min(int64(n), max)))
}

// piece returns the place in the image of the contents at off (< Size), and how many bytes lie there.
func (in *Inode) piece(off int64) (at, n int64) {
	if in.tail != 0 {
		full := (in.Size - 1) &^ (BlockSize - 1)
		if off >= full {
			return in.tail + off - full, in.Size - off
		}
		return in.base + off, full - off
	}
	return in.base + off, in.Size - off
}

// rule returns erofs or v8, according to the inode's half.
func (in *Inode) rule(erofs, v8 Rule) Rule {
	if _, ok := in.h.(*DAXFS); ok {
		return v8
	}
	return erofs
}

func (in *Inode) bad(r Rule, format string, args ...any) error {
	return corrupt(r, -1, in.Nid, format, args...)
}
