package daxfs

import (
	"cmp"
	"encoding/binary"
	"io"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// WriteRun writes the run of the image and nothing else. Offsets in w count from block 0 of the live
// tree. Readers see none of it before the slot is published.
func (l *LivePlan) WriteRun(w io.WriterAt) error {
	if l.g.Slots == 0 {
		return ErrNotPlaced
	}
	r := runWriter{w: w, pos: l.off, buf: make([]byte, 0, min(writeBuffer, max(BlockSize, l.Size())))}
	var names []dirent
	for _, pc := range l.order() {
		in, li := l.inodes.at(pc.ino), &l.live[pc.ino]
		if in.isDir() {
			names = l.dirents(names[:0], pc.ino)
		}
		at := l.off + pc.off
		switch {
		case pc.kind == pieceShared:
			b := r.at(at, int(li.xbytes))
			for _, x := range in.xattrs {
				b = b[copy(b, l.xattrs[x].enc):]
			}
		case pc.kind == pieceInode:
			l.writeInode(&r, at, pc.ino, names)
		case in.isSymlink():
			copy(r.at(at, BlockSize), in.target)
		default:
			rest := names
			for range li.wholeBlocks(in) {
				n, _ := dirFill(rest)
				l.encodeDir(r.at(at, BlockSize), rest[:n], l.liveNid(pc.ino))
				rest, at = rest[n:], at+BlockSize
			}
		}
	}
	r.at(l.off+l.Size(), 0)
	r.flush()
	return r.err
}

// order returns the pieces to write, in ascending order.
func (l *LivePlan) order() []piece {
	out := make([]piece, 0, int(l.inodes.len())+l.stats.Directories+1)
	for i := range l.inodes.len() {
		in, li := l.inodes.at(i), &l.live[i]
		if i != 0 && !li.shared {
			out = append(out, piece{li.at, int32(i), pieceInode})
		}
		if li.wholeBlocks(in) > 0 {
			out = append(out, piece{in.liveBlocks, int32(i), pieceBlocks})
		}
	}
	if l.live[0].xbytes > 0 {
		out = append(out, piece{l.xattrOff, 0, pieceShared})
	}
	slices.SortFunc(out, func(a, b piece) int { return cmp.Compare(a.off, b.off) })
	return out
}

// liveNid returns a function from entries of dir to nids. The ".." of an image is the directory of slots.
func (l *LivePlan) liveNid(dir int32) func(d dirent) uint64 {
	return func(d dirent) uint64 {
		if dir == 0 && d.name == ".." {
			return liveRoot
		}
		return l.nid(d.child)
	}
}

// inode returns the inode as stored, without xattrs.
func (l *LivePlan) inode(idx int32) disk.ErofsInode {
	in, li := l.inodes.at(idx), &l.live[idx]
	e := disk.ErofsInode{
		Extended: true, Layout: disk.ErofsLayoutPlain, Mode: uint16(in.mode), Nlink: in.nlink, Size: uint64(in.size),
		Union: in.rdev, Ino: uint32(l.nid(idx)), UID: in.uid, GID: in.gid, MtimeSec: in.sec, MtimeNsec: in.nsec,
	}
	if in.isDir() {
		e.Size = uint64(in.liveSize)
	}
	if li.inline {
		e.Layout = disk.ErofsLayoutInline
	}
	switch {
	case in.hasData():
		e.Union = uint32(in.addr / BlockSize)
	case li.wholeBlocks(in) > 0:
		e.Union = uint32((l.off + in.liveBlocks) / BlockSize)
	}
	return e
}

// writeInode writes one inode with its xattrs and its inline tail. names are the entries of a directory.
func (l *LivePlan) writeInode(r *runWriter, at int64, idx int32, names []dirent) {
	in, li := l.inodes.at(idx), &l.live[idx]
	head, xbytes := disk.ErofsExtendedSize, int(li.xbytes)
	tail := 0
	if li.inline {
		tail = int(in.size)
		if in.isDir() {
			tail = int(in.liveSize % BlockSize)
		}
	}
	b := r.at(at, head+xbytes+tail)
	e := l.inode(idx)
	if xbytes > 0 {
		e.XattrCount = uint16(1 + (xbytes-disk.ErofsXattrHdrSize)/disk.ErofsXattrIDSize)
		x := b[head+disk.ErofsXattrHdrSize:]
		for _, id := range in.xattrs {
			x = x[copy(x, l.xattrs[id].enc):]
		}
	}
	e.Marshal(b)
	b = b[head+xbytes:]
	switch {
	case tail == 0:
	case in.isSymlink():
		copy(b, in.target)
	default:
		for range li.wholeBlocks(in) {
			n, _ := dirFill(names)
			names = names[n:]
		}
		l.encodeDir(b, names, l.liveNid(idx))
	}
}

// Slot returns the bytes of the published slot: the root's inode and the references to its xattrs. They
// belong at Geometry.SlotOff. PublishSlot and RetractSlot write them in the order that readers need.
func (l *LivePlan) Slot() []byte {
	b := make([]byte, slotSize)
	in := l.inodes.at(0)
	e := l.inode(0)
	if n := len(in.xattrs); n > 0 {
		e.XattrCount = uint16(1 + n)
		x := b[disk.ErofsExtendedSize:]
		h := disk.ErofsXattrHeader{Shared: uint8(n)}
		h.Marshal(x)
		x = x[disk.ErofsXattrHdrSize:]
		at := l.off + l.xattrOff - l.g.Head
		for _, id := range in.xattrs {
			disk.PutErofsXattrID(x, uint32(at/disk.ErofsXattrIDSize))
			x = x[disk.ErofsXattrIDSize:]
			at += int64(len(l.xattrs[id].enc))
		}
	}
	e.Marshal(b)
	return b
}

// SlotSize is the size of a slot in bytes.
const SlotSize = slotSize

// modeOff is the offset of i_mode in an inode: the kernel refuses the inode while it is zero.
const modeOff = 4

// PublishSlot writes the bytes from Slot to slot i, the mode last: a concurrent lookup sees no inode
// or all of it. sync makes earlier writes durable, and visible to those that map the memory.
func PublishSlot(w io.WriterAt, g Geometry, i int, slot []byte, sync func() error) error {
	first := slices.Clone(slot[:slotSize])
	clear(first[modeOff : modeOff+2])
	if _, err := w.WriteAt(first, g.SlotOff(i)); err != nil {
		return err
	}
	if err := sync(); err != nil {
		return err
	}
	if _, err := w.WriteAt(slot[modeOff:modeOff+2], g.SlotOff(i)+modeOff); err != nil {
		return err
	}
	return sync()
}

// RetractSlot empties slot i, the mode first. A kernel that has the inode in memory keeps it. The slot
// must not be reused in the same epoch.
func RetractSlot(w io.WriterAt, g Geometry, i int) error {
	if _, err := w.WriteAt(make([]byte, 2), g.SlotOff(i)+modeOff); err != nil {
		return err
	}
	_, err := w.WriteAt(emptySlot(), g.SlotOff(i))
	return err
}

// EraseInode turns the inode of a nonempty regular file into a socket, which open(2) refuses with
// ENXIO. A kernel that has the old inode in memory keeps it. Zeros would also work, but the kernel
// logs each such inode. Only the two bytes of the mode change, in one write: nobody sees an inode of
// another size or place, and FS.Erased can read the rest.
func EraseInode(w io.WriterAt, g Geometry, nid uint64) error {
	b := binary.LittleEndian.AppendUint16(nil, erasedMode)
	_, err := w.WriteAt(b, g.NidOff(nid)+modeOff)
	return err
}

// erasedMode is the mode of erased inodes: a socket without permissions.
const erasedMode = unix.S_IFSOCK

// InodeSize is the size of an inode in a live tree in bytes, without its xattrs.
const InodeSize = disk.ErofsExtendedSize
