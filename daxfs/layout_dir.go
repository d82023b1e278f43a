package daxfs

import (
	"slices"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
	"golang.org/x/sys/unix"
)

// dirents appends the EROFS entries of directory idx to dst: "." and ".." among the others in bytewise order.
func (p *Plan) dirents(dst []dirent, idx int32) []dirent {
	in := p.inodes.at(idx)
	dst = append(dst, in.kids...)
	for _, d := range [...]dirent{{".", idx}, {"..", in.parent}} {
		at, _ := slices.BinarySearchFunc(dst, d.name, func(a dirent, name string) int {
			return strings.Compare(a.name, name)
		})
		dst = slices.Insert(dst, at, d)
	}
	return dst
}

// dirFill returns how many of names fit one directory block, and the bytes that they take.
func dirFill(names []dirent) (n, size int) {
	for _, d := range names {
		need := disk.ErofsDirentSize + len(d.name)
		if size+need > BlockSize {
			break
		}
		size += need
		n++
	}
	return n, size
}

// dirSize returns the size of an EROFS directory: whole blocks, and the used bytes of the last block.
func dirSize(names []dirent) int64 {
	var total int64
	for {
		n, size := dirFill(names)
		if names = names[n:]; len(names) == 0 {
			return total + int64(size)
		}
		total += BlockSize
	}
}

// encodeDir writes one directory block of names to b, which is zeroed and at least as long as dirFill
// says. nid returns the inode of an entry.
func (p *Plan) encodeDir(b []byte, names []dirent, nid func(dirent) uint64) {
	at := len(names) * disk.ErofsDirentSize
	for i, d := range names {
		c := p.inodes.at(d.child)
		e := disk.ErofsDirent{Nid: nid(d), NameOff: uint16(at), Type: erofsType(c.mode)}
		e.Marshal(b[i*disk.ErofsDirentSize:])
		at += copy(b[at:], d.name)
	}
}

// dualNid returns the nid of an entry in a dual image.
func (p *Plan) dualNid(d dirent) uint64 { return p.inodes.at(d.child).nid() }

// nid returns the number of an inode in the EROFS half, which encodes its offset.
func (i *inode) nid() uint64 { return uint64(i.off) / disk.ErofsSlot }

func erofsType(mode uint32) uint8 {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return disk.ErofsFTReg
	case unix.S_IFDIR:
		return disk.ErofsFTDir
	case unix.S_IFCHR:
		return disk.ErofsFTChr
	case unix.S_IFBLK:
		return disk.ErofsFTBlk
	case unix.S_IFIFO:
		return disk.ErofsFTFifo
	case unix.S_IFSOCK:
		return disk.ErofsFTSock
	case unix.S_IFLNK:
		return disk.ErofsFTSymlink
	}
	return disk.ErofsFTUnknown
}
