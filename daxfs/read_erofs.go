package daxfs

import (
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// inodeOff returns the offset of an inode, outside of the image or negative for an invalid nid.
func (f *FS) inodeOff(nid uint64) int64 {
	if nid > uint64(f.s.size)/disk.ErofsSlot {
		return -1
	}
	return f.sb.meta + int64(nid)*disk.ErofsSlot
}

func (f *FS) inode(nid uint64) (Inode, error) {
	in, _, err := f.readInode(nid)
	return in, err
}

// readInode reads an inode and checks everything that makes its contents safe to read. The Inode is
// usable only if the error is nil; the raw inode holds the fields read so far.
func (f *FS) readInode(nid uint64) (Inode, disk.ErofsInode, error) {
	var raw disk.ErofsInode
	off := f.inodeOff(nid)
	if off < 0 || !f.s.holds(off, disk.ErofsCompactSize) {
		return Inode{}, raw, corrupt(RuleNid, off, nid, "the inode lies outside of the image of %d bytes", f.s.size)
	}
	// One read fetches an inode of either size.
	var buf [disk.ErofsExtendedSize]byte
	b, err := f.s.view(off, int(min(disk.ErofsExtendedSize, f.s.size-off)))
	if err != nil {
		return Inode{}, raw, err
	}
	n := copy(buf[:], b)
	if disk.ErofsInodeExtended(buf[:]) && n < disk.ErofsExtendedSize {
		return Inode{}, raw,
			corrupt(RuleNid, off, nid, "the inode of 64 bytes ends outside of the image of %d bytes", f.s.size)
	}
	raw.Unmarshal(buf[:])
	in := Inode{Stat: Stat{
		Nid: nid, Mode: uint32(raw.Mode), Nlink: raw.Nlink, UID: raw.UID, GID: raw.GID,
		Mtime: Time{raw.MtimeSec, raw.MtimeNsec}, Size: int64(raw.Size), Off: -1, h: f,
	}}
	if !raw.Extended {
		in.Mtime = f.sb.Time
	}
	if raw.Format>>4 != 0 {
		return in, raw,
			unsupported(RuleInodeFormat, off, nid, "format is %#x, expected bits 4 to 15 to be 0", raw.Format)
	}
	if in.Mtime.Nsec > 999_999_999 {
		return in, raw, corrupt(RuleTime, off, nid, "nanoseconds are %d, expected less than 1e9", in.Mtime.Nsec)
	}
	if raw.Size > uint64(f.s.size) {
		return in, raw, corrupt(RuleInodeSize, off, nid, "size is %d, the image has %d bytes", raw.Size, f.s.size)
	}
	end := off + int64(raw.HeaderSize())
	if raw.XattrCount != 0 {
		in.xoff, in.xlen = end, int64(disk.ErofsXattrBytes(raw.XattrCount))
		if !f.s.holds(in.xoff, in.xlen) {
			return in, raw,
				corrupt(RuleXattrBounds, off, nid, "%d bytes of xattrs at %d, the image has %d bytes", in.xlen,
					in.xoff, f.s.size)
		}
		end += in.xlen
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
		return in, raw, f.locate(&in, &raw, off, end)
	case unix.S_IFCHR, unix.S_IFBLK:
		in.Rdev = unix.Mkdev(disk.ErofsDecodeDev(raw.Union))
	case unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return in, raw, corrupt(RuleMode, off, nid, "mode is %#o, expected a file type", in.Mode)
	}
	if in.Size != 0 {
		return in, raw, corrupt(RuleInodeSize, off, nid, "size of a special file is %d, expected 0", in.Size)
	}
	return in, raw, nil
}

// locate finds the contents of an inode. end is the end of its metadata.
func (f *FS) locate(in *Inode, raw *disk.ErofsInode, off, end int64) error {
	blocks := in.Size
	switch raw.Layout {
	case disk.ErofsLayoutPlain:
	case disk.ErofsLayoutInline:
		if in.Size == 0 {
			break
		}
		blocks = (in.Size - 1) &^ (BlockSize - 1)
		in.tail = end
		n := in.Size - blocks
		if end%BlockSize+n > BlockSize {
			return corrupt(RuleInline, off, in.Nid, "%d bytes stored with the inode at %d cross a block", n, end)
		}
		if !f.s.holds(end, n) {
			return corrupt(RuleInline, off, in.Nid, "%d bytes stored with the inode at %d, the image has %d bytes",
				n, end, f.s.size)
		}
	default:
		return unsupported(RuleLayout, off, in.Nid, "data layout %d, expected plain (0) or inline (2)", raw.Layout)
	}
	in.base = int64(raw.Union) * BlockSize
	if blocks > 0 && !f.s.holds(in.base, blocks) {
		return corrupt(RuleDataBounds, off, in.Nid, "%d bytes of contents at %d, the image has %d bytes", blocks,
			in.base, f.s.size)
	}
	switch {
	case in.Size == 0:
	case in.tail == 0:
		in.Off = in.base
	case blocks == 0:
		in.Off = in.tail
	}
	return nil
}
