package daxfs

import (
	"fmt"
	"io"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// DAXFS reads the DAXFS half of an image as daxfs.ko does. It offers the methods of FS, with inode
// numbers for nids; there are no times, extended attributes or special files. It is as careful as FS,
// with one exception: directories do not store their parent, so a hostile half can give one directory
// many paths. Run Check before you walk an image.
type DAXFS struct {
	s  source
	sb disk.V8Super
	pathFS
}

// OpenDAXFS reads the superblock of the DAXFS half of an image of size bytes. See Open.
func OpenDAXFS(r io.ReaderAt, size int64) (*DAXFS, error) {
	s, err := newSource(r, size)
	if err != nil {
		return nil, err
	}
	return openV8(s)
}

func openV8(s source) (*DAXFS, error) {
	d := &DAXFS{s: s}
	d.pathFS = pathFS{d}
	if err := d.readSuper(); err != nil {
		return nil, err
	}
	in, err := d.inode(disk.V8RootIno)
	if err != nil {
		return nil, err
	}
	if !in.IsDir() {
		return nil,
			corrupt(RuleV8Root, d.inodeOff(disk.V8RootIno), disk.V8RootIno,
				"mode of the root is %#o, expected a directory", in.Mode)
	}
	return d, nil
}

// Root returns the inode number of the root directory, which is always 1.
func (d *DAXFS) Root() uint64 { return disk.V8RootIno }

// Inodes returns the number of inodes; they are numbered from 1.
func (d *DAXFS) Inodes() uint64 { return uint64(d.sb.InodeCount) }

// Inode returns an inode by its number. Any number is safe.
func (d *DAXFS) Inode(ino uint64) (Inode, error) { return d.inode(ino) }

func (d *DAXFS) root() uint64 { return disk.V8RootIno }
func (d *DAXFS) src() *source { return &d.s }

// base and end are the bounds of the base region, which readSuper checks against the image.
func (d *DAXFS) base() int64 { return int64(d.sb.BaseOff) }
func (d *DAXFS) end() int64  { return int64(d.sb.BaseOff + d.sb.BaseSize) }

// inodeOff returns the offset of inode ino, which is between 1 and the number of inodes.
func (d *DAXFS) inodeOff(ino uint64) int64 {
	return d.base() + int64(d.sb.InodeOff) + int64(ino-1)*disk.V8InodeSize
}

func (d *DAXFS) readSuper() error {
	b, err := d.s.view(0, disk.V8SuperSize)
	if err != nil {
		return err
	}
	sb := &d.sb
	sb.Unmarshal(b)
	size := uint64(d.s.size)
	switch {
	case sb.Magic != disk.V8Magic:
		return corrupt(RuleV8Magic, 0, 0, "magic is %#x, expected %#x", sb.Magic, uint32(disk.V8Magic))
	case sb.Version != disk.V8Version:
		return unsupported(RuleV8Version, 4, 0, "format version %d, expected %d", sb.Version, disk.V8Version)
	case sb.BlockSize != BlockSize:
		return unsupported(RuleV8BlockSize, 8, 0, "block size is %d bytes, expected %d", sb.BlockSize, BlockSize)
	case sb.BaseOff < BlockSize || sb.BaseOff > size || sb.BaseSize > size-sb.BaseOff:
		return corrupt(RuleV8Base, 24, 0, "base region of %d bytes at %d, expected it between %d and %d", sb.BaseSize,
			sb.BaseOff, BlockSize, size)
	case sb.InodeOff > sb.BaseSize || uint64(sb.InodeCount)*disk.V8InodeSize > sb.BaseSize-sb.InodeOff:
		return corrupt(RuleV8Table, 40, 0, "%d inodes at %d do not fit in the base region of %d bytes", sb.InodeCount,
			sb.InodeOff, sb.BaseSize)
	case sb.InodeCount == 0:
		return corrupt(RuleV8Table, 48, 0, "no inodes, expected at least the root")
	case sb.RootIno < 1 || sb.RootIno > sb.InodeCount:
		return corrupt(RuleV8Root, 52, 0, "root inode is %d, expected 1", sb.RootIno)
	}
	return nil
}

func (d *DAXFS) inode(ino uint64) (Inode, error) {
	in, _, err := d.readInode(ino)
	return in, err
}

// readInode reads an inode and checks everything that makes its contents safe to read. The Inode is
// usable only if the error is nil; the raw inode holds the fields read so far.
func (d *DAXFS) readInode(ino uint64) (Inode, disk.V8Inode, error) {
	var raw disk.V8Inode
	if ino < 1 || ino > uint64(d.sb.InodeCount) {
		return Inode{}, raw, corrupt(RuleV8Ino, -1, ino, "inode number, expected 1 to %d", d.sb.InodeCount)
	}
	off := d.inodeOff(ino)
	b, err := d.s.view(off, disk.V8InodeSize)
	if err != nil {
		return Inode{}, raw, err
	}
	raw.Unmarshal(b)
	in := Inode{Stat: Stat{
		Nid: ino, Mode: raw.Mode, Nlink: raw.Nlink, UID: raw.UID, GID: raw.GID, Size: int64(raw.Size), Off: -1, h: d,
	}}
	if raw.Ino != uint32(ino) {
		return in, raw, corrupt(RuleV8Ino, off, ino, "slot %d holds inode %d", ino, raw.Ino)
	}
	need := raw.Size // bytes that the kernel reads
	switch raw.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		if raw.Size%disk.V8DirentUnit != 0 {
			return in, raw,
				corrupt(RuleV8DirSize, off, ino, "size of a directory is %d, expected a multiple of %d", raw.Size,
					disk.V8DirentUnit)
		}
		// Entries are wider than the unit of the directory's size: see format.md.
		need = raw.Size / disk.V8DirentUnit * disk.V8DirentSize
	case unix.S_IFLNK:
		if raw.Size < 1 || raw.Size > MaxTarget {
			return in, raw,
				corrupt(RuleV8Symlink, off, ino, "target of %d bytes, expected 1 to %d", raw.Size, MaxTarget)
		}
		need++
	default:
		return in, raw,
			corrupt(RuleV8Mode, off, ino, "mode is %#o, expected a regular file, directory or symbolic link", raw.Mode)
	}
	if raw.Size > d.sb.BaseSize || need > 0 && (raw.DataOff > d.sb.BaseSize || need > d.sb.BaseSize-raw.DataOff) {
		return in, raw,
			corrupt(RuleV8Bounds, off, ino, "%d bytes at %d, the base region has %d", need, raw.DataOff, d.sb.BaseSize)
	}
	if raw.Size > 0 {
		in.base = d.base() + int64(raw.DataOff)
		in.Off = in.base
	}
	return in, raw, nil
}

// rawEntry decodes the directory entry b at offset off.
func (d *DAXFS) rawEntry(b []byte, off int64, dir uint64) (rawDirent, error) {
	var e disk.V8Dirent
	e.Unmarshal(b)
	if e.NameLen < 1 || e.NameLen > MaxName {
		return rawDirent{}, corrupt(RuleV8DirName, off, dir, "name of %d bytes, expected 1 to %d", e.NameLen, MaxName)
	}
	name := b[disk.V8DirentName:][:e.NameLen]
	if err := checkStored(name, RuleV8DirName, off, dir); err != nil {
		return rawDirent{}, err
	}
	if string(name) == "." || string(name) == ".." {
		return rawDirent{}, corrupt(RuleV8DirName, off, dir, "name %q is stored, expected none", name)
	}
	if e.Ino < 1 || e.Ino > d.sb.InodeCount {
		return rawDirent{},
			corrupt(RuleV8DirIno, off, dir, "entry %q has inode %d, expected 1 to %d", name, e.Ino, d.sb.InodeCount)
	}
	return rawDirent{nid: uint64(e.Ino), typ: e.Mode & unix.S_IFMT, name: name, odd: !isZero(b[10:disk.V8DirentName])},
		nil
}

// eachEntry calls fn for the entries of a directory from number i on, in stored order, until fn
// returns false. The entry is valid only during the call. It reads ahead a bounded number of entries.
func (d *DAXFS) eachEntry(dir *Inode, i int64, fn func(i int64, e rawDirent, off int64, err error) bool) error {
	const ahead = 60
	count := dir.Size / disk.V8DirentUnit
	for i < count {
		n := min(ahead, count-i)
		off := dir.base + i*disk.V8DirentSize
		b, err := d.s.view(off, int(n*disk.V8DirentSize))
		if err != nil {
			return err
		}
		for ; n > 0; n-- {
			e, err := d.rawEntry(b, off, dir.Nid)
			if !fn(i, e, off, err) {
				return nil
			}
			b, off, i = b[disk.V8DirentSize:], off+disk.V8DirentSize, i+1
		}
	}
	return nil
}

func (d *DAXFS) lookup(dir *Inode, name string) (Dirent, error) {
	found, bad := Dirent{}, error(fs.ErrNotExist)
	err := d.eachEntry(dir, 0, func(i int64, e rawDirent, _ int64, err error) bool {
		switch {
		case err != nil:
			bad = err
		case string(e.name) == name:
			found, bad = Dirent{Nid: e.nid, Type: e.typ, Name: name, Next: i + 1}, nil
		default:
			return true
		}
		return false
	})
	if err != nil {
		return Dirent{}, err
	}
	return found, bad
}

// entries uses the number of an entry as its cursor.
func (d *DAXFS) entries(dir *Inode, cursor int64, fn func(Dirent) bool) error {
	if cursor < 0 {
		return badCursor(dir, cursor)
	}
	var bad error
	err := d.eachEntry(dir, cursor, func(i int64, e rawDirent, _ int64, err error) bool {
		if err != nil {
			bad = err
			return false
		}
		return fn(Dirent{Nid: e.nid, Type: e.typ, Name: string(e.name), Next: i + 1})
	})
	if err != nil {
		return err
	}
	return bad
}

func (d *DAXFS) parent(*Inode) (uint64, bool, error) { return 0, false, nil }
func (d *DAXFS) xattrs(*Inode) ([]Xattr, error)      { return nil, nil }

func badCursor(dir *Inode, cursor int64) error {
	return fmt.Errorf("daxfs: inode %d: cursor %d is not one that a directory gave: %w", dir.Nid, cursor, unix.EINVAL)
}
