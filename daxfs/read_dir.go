package daxfs

import (
	"bytes"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// fileTypes maps the type numbers of EROFS entries to file types.
var fileTypes = [...]uint32{
	disk.ErofsFTReg: unix.S_IFREG, disk.ErofsFTDir: unix.S_IFDIR, disk.ErofsFTChr: unix.S_IFCHR,
	disk.ErofsFTBlk:  unix.S_IFBLK,
	disk.ErofsFTFifo: unix.S_IFIFO, disk.ErofsFTSock: unix.S_IFSOCK, disk.ErofsFTSymlink: unix.S_IFLNK,
}

// dirBlock is one block of a directory: entries of 12 bytes, then their names.
type dirBlock struct {
	b     []byte
	off   int64 // in the image
	nid   uint64
	count int
}

// rawDirent is an entry whose name still points into the image.
type rawDirent struct {
	nid  uint64
	typ  uint32
	name []byte
	odd  bool // reserved bytes are not zero
}

// block reads the block of a directory that begins at pos, a multiple of BlockSize below its size.
func (f *FS) block(dir *Inode, pos int64) (dirBlock, error) {
	b, err := dir.View(pos, BlockSize)
	if err != nil {
		return dirBlock{}, err
	}
	at, _ := dir.piece(pos)
	d := dirBlock{b: b, off: at, nid: dir.Nid}
	if len(b) < disk.ErofsDirentSize {
		return d,
			corrupt(RuleDirBlock, at, dir.Nid, "directory block of %d bytes, expected at least %d", len(b),
				disk.ErofsDirentSize)
	}
	var first disk.ErofsDirent
	first.Unmarshal(b)
	n := int(first.NameOff)
	if n < disk.ErofsDirentSize || n%disk.ErofsDirentSize != 0 || n >= len(b) {
		return d,
			corrupt(RuleDirBlock, at, dir.Nid, "first name at %d, expected a multiple of %d below %d", n,
				disk.ErofsDirentSize, len(b))
	}
	d.count = n / disk.ErofsDirentSize
	return d, nil
}

func (d *dirBlock) entry(i int) (rawDirent, error) {
	var e disk.ErofsDirent
	e.Unmarshal(d.b[i*disk.ErofsDirentSize:])
	at := d.off + int64(i)*disk.ErofsDirentSize
	begin, end := int(e.NameOff), len(d.b)
	last := i+1 == d.count
	if !last {
		var next disk.ErofsDirent
		next.Unmarshal(d.b[(i+1)*disk.ErofsDirentSize:])
		end = int(next.NameOff)
	}
	if begin < d.count*disk.ErofsDirentSize || end > len(d.b) || begin >= end {
		return rawDirent{},
			corrupt(RuleDirBlock, at, d.nid,
				"name of entry %d at %d to %d, expected it to follow the one before within %d bytes",
				i, begin, end, len(d.b))
	}
	name := d.b[begin:end:end]
	if last {
		if z := bytes.IndexByte(name, 0); z >= 0 {
			name = name[:z]
		}
	}
	if err := checkStored(name, RuleDirName, at, d.nid); err != nil {
		return rawDirent{}, err
	}
	r := rawDirent{nid: e.Nid, name: name, odd: d.b[i*disk.ErofsDirentSize+11] != 0}
	if int(e.Type) < len(fileTypes) {
		r.typ = fileTypes[e.Type]
	}
	return r, nil
}

// checkStored checks a stored name; "." and ".." pass.
func checkStored(name []byte, rule Rule, at int64, ino uint64) error {
	switch {
	case len(name) == 0 || len(name) > MaxName:
		return corrupt(rule, at, ino, "name of %d bytes, expected 1 to %d", len(name), MaxName)
	case bytes.IndexByte(name, '/') >= 0:
		return corrupt(rule, at, ino, "name %q holds a slash", name)
	case bytes.IndexByte(name, 0) >= 0:
		return corrupt(rule, at, ino, "name %q holds a NUL", name)
	}
	return nil
}

// lookup searches like the kernel: first for the last block whose first name is not above name, then in it.
func (f *FS) lookup(dir *Inode, name string) (Dirent, error) {
	var found dirBlock
	lo, hi := int64(0), (dir.Size+BlockSize-1)/BlockSize
	for lo < hi {
		mid := lo + (hi-lo)/2
		b, err := f.block(dir, mid*BlockSize)
		if err != nil {
			return Dirent{}, err
		}
		first, err := b.entry(0)
		if err != nil {
			return Dirent{}, err
		}
		if string(first.name) <= name {
			found, lo = b, mid+1
		} else {
			hi = mid
		}
	}
	i, j := 0, found.count
	for i < j {
		mid := (i + j) / 2
		e, err := found.entry(mid)
		if err != nil {
			return Dirent{}, err
		}
		switch {
		case string(e.name) == name:
			return Dirent{Nid: e.nid, Type: e.typ, Name: name}, nil
		case string(e.name) < name:
			i = mid + 1
		default:
			j = mid
		}
	}
	return Dirent{}, fs.ErrNotExist
}

// entries uses cursors of the form block offset + 12 × number of the entry in its block, like the kernel.
func (f *FS) entries(dir *Inode, cursor int64, fn func(Dirent) bool) error {
	if cursor < 0 || cursor%BlockSize%disk.ErofsDirentSize != 0 {
		return badCursor(dir, cursor)
	}
	for pos := cursor &^ (BlockSize - 1); pos < dir.Size; pos += BlockSize {
		b, err := f.block(dir, pos)
		if err != nil {
			return err
		}
		for i := int(max(cursor-pos, 0)) / disk.ErofsDirentSize; i < b.count; i++ {
			e, err := b.entry(i)
			if err != nil {
				return err
			}
			next := pos + int64(i+1)*disk.ErofsDirentSize
			if i+1 == b.count {
				next = pos + BlockSize
			}
			if !fn(Dirent{Nid: e.nid, Type: e.typ, Name: string(e.name), Next: next}) {
				return nil
			}
		}
	}
	return nil
}

func (f *FS) parent(in *Inode) (uint64, bool, error) {
	e, err := f.lookup(in, "..")
	return e.Nid, true, err
}
