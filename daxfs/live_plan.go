package daxfs

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io/fs"
	"math"
	"slices"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// errNoImage reports a slot without a published image.
var errNoImage = fmt.Errorf("no image is published there: %w", fs.ErrNotExist)

// InodeKey identifies a regular file that images of a live tree may share. It is the SHA-256 over
// digest and size of the contents, mode, owner, modification time, link count and extended attributes.
type InodeKey [32]byte

// LiveFile is a regular file, or a whole group of hard links, that images of a live tree may share.
type LiveFile struct {
	Key InodeKey
	// Seq numbers the files of one image that have the same key, from 0. Each needs its own inode:
	// overlayfs treats two names of one lower inode as hard links, whatever its link count.
	Seq int
	// Data are the contents.
	Data Data
	// Nid is the inode number, set once the plan is placed.
	Nid uint64
	// New is true if this image adds the inode.
	New bool
}

// LivePlan is the layout of one image in a live tree. NewLivePlan makes it from a tree, Resolve finds
// the regular files that have an inode already, PlaceLive positions the rest, WriteRun writes it, and
// Slot returns the bytes that publish it. A LivePlan belongs to one goroutine at a time.
type LivePlan struct {
	*Plan
	live  []liveInode
	files []liveFile // in the order of the tree

	scratch []byte // for key

	fileBlocks int64 // blocks of the run with inodes of regular files
	dirBlocks  int64 // blocks behind them, which belong to this image alone
	xattrOff   int64 // offset of the root's xattrs in the run, if it has any

	g    Geometry
	off  int64 // offset of the run
	slot int
}

// liveFile identifies a LiveFile by its inode. There may be millions, so keys are computed on demand.
type liveFile struct {
	seq int32
	ino int32 // index in inodes
}

// file returns the LiveFile of f. New is valid after Resolve, Nid after PlaceLive.
func (l *LivePlan) file(f *liveFile) LiveFile {
	in := l.inodes.at(f.ino)
	return LiveFile{Key: l.key(in), Seq: int(f.seq), Data: l.data(in), Nid: l.nid(f.ino), New: !l.live[f.ino].shared}
}

// liveInode is the additional state of an inode in a live tree.
type liveInode struct {
	at     int64 // of a new inode, its offset in the run; of a shared one, its nid
	xbytes int32 // bytes of the xattrs behind the inode
	inline bool
	shared bool // the inode already exists in the live tree
}

// nid returns the nid of an inode, or 0 for a new inode before PlaceLive.
func (l *LivePlan) nid(i int32) uint64 {
	switch li := &l.live[i]; {
	case li.shared:
		return uint64(li.at)
	case l.g.Slots == 0: // not placed
		return 0
	case i == 0:
		return l.g.SlotNid(l.slot)
	default:
		return l.g.nid(l.off + li.at)
	}
}

// NewLivePlan lays out the tree below root for a live tree. With window set, the plan can also be
// placed as a dual image over the same contents: call Plan.Place and Plan.WriteTo after Resolve.
// Errors are those of NewPlan.
func NewLivePlan(root *Node, o Options, window bool) (*LivePlan, error) {
	p, err := newTree(root, o)
	if err != nil {
		return nil, err
	}
	if window {
		if err := p.finish(); err != nil {
			return nil, err
		}
	}
	l := &LivePlan{Plan: p, live: make([]liveInode, p.inodes.len())}
	if err := l.sizes(); err != nil {
		return nil, err
	}
	l.listFiles()
	return l, nil
}

// sizes computes the sizes that do not depend on the place.
func (l *LivePlan) sizes() error {
	var names []dirent
	for i := range l.inodes.len() {
		in, li := l.inodes.at(i), &l.live[i]
		if len(in.xattrs) > 0 {
			size := disk.ErofsXattrHdrSize
			for _, x := range in.xattrs {
				size += len(l.xattrs[x].enc)
			}
			if limit := disk.ErofsXattrBytes(disk.ErofsXattrCountMax); size > limit {
				return &TreeError{l.path(int32(i)), invalid("xattrs take %d bytes, expected at most %d", size, limit)}
			}
			li.xbytes = int32(size)
		}
		if in.isDir() {
			names = l.dirents(names[:0], int32(i))
			in.liveSize = dirSize(names)
		}
	}
	if n := len(l.inodes.at(0).xattrs); n > slotXattrs {
		return &TreeError{"/", invalid("the root has %d xattrs, expected at most %d", n, slotXattrs)}
	}
	return nil
}

// listFiles collects the regular files and sets the Seq of files with equal keys.
func (l *LivePlan) listFiles() {
	l.files = make([]liveFile, 0, l.stats.Files)
	// Sort 8-byte prefixes of the keys: a map of all keys would take more memory than the files.
	type begin struct {
		key  uint64
		file int32
	}
	order := make([]begin, 0, l.stats.Files)
	for i := range l.inodes.len() {
		in := l.inodes.at(i)
		if !in.isRegular() {
			continue
		}
		key := l.key(in)
		order = append(order, begin{binary.LittleEndian.Uint64(key[:]), int32(len(l.files))})
		l.files = append(l.files, liveFile{ino: i})
	}
	slices.SortFunc(order,
		func(a, b begin) int { return cmp.Or(cmp.Compare(a.key, b.key), cmp.Compare(a.file, b.file)) })
	for len(order) > 0 {
		n := 1
		for n < len(order) && order[n].key == order[0].key {
			n++
		}
		if n > 1 {
			seen := map[InodeKey]int32{}
			for _, o := range order[:n] {
				f := &l.files[o.file]
				key := l.key(l.inodes.at(f.ino))
				f.seq = seen[key]
				seen[key]++
			}
		}
		order = order[n:]
	}
}

func (l *LivePlan) key(in *inode) InodeKey {
	d, b := l.data(in), l.scratch[:0]
	le := binary.LittleEndian
	b = append(b, d.Sum[:]...)
	b = le.AppendUint64(b, uint64(d.Size))
	for _, v := range [...]uint32{in.mode, in.uid, in.gid, in.nlink, in.nsec} {
		b = le.AppendUint32(b, v)
	}
	b = le.AppendUint64(b, uint64(in.sec))
	for _, x := range in.xattrs {
		b = le.AppendUint32(b, uint32(len(l.xattrs[x].enc)))
		b = append(b, l.xattrs[x].enc...)
	}
	l.scratch = b
	return sha256.Sum256(b)
}

// Resolve calls find for every regular file, in the order of the tree. find returns the nid of an
// existing inode to share, or 0 for a new inode; d is where the contents lie.
func (l *LivePlan) Resolve(find func(f LiveFile) (nid uint64, d Data, err error)) error {
	for k := range l.files {
		f := &l.files[k]
		idx := f.ino
		nid, d, err := find(l.file(f))
		if err != nil {
			return &TreeError{l.path(idx), err}
		}
		l.inodes.at(idx).addr = d.Off
		l.live[idx].at, l.live[idx].shared = int64(nid), nid != 0
	}
	return l.pack()
}

// pack lays out the run: inodes of new regular files first, then the part that belongs to this image
// alone. Each part takes whole blocks, so the second can be freed as a whole with the image.
func (l *LivePlan) pack() error {
	var files, dirs packer
	for i := range l.inodes.len() {
		in, li := l.inodes.at(i), &l.live[i]
		head := int64(disk.ErofsExtendedSize) + int64(li.xbytes)
		li.inline = false
		switch {
		case in.isRegular():
			if !li.shared {
				li.at = files.take(head)
			}
			continue
		case in.isSymlink():
			li.inline = head+in.size <= BlockSize
			if li.inline {
				head += in.size
			}
		case in.isDir():
			tail := in.liveSize % BlockSize
			li.inline = i != 0 && tail > 0 && head+tail <= BlockSize
			if li.inline {
				head += tail
			}
		}
		if i != 0 { // the slot is the root's inode
			li.at = dirs.take(head)
		}
		if n := li.wholeBlocks(in); n > 0 {
			in.liveBlocks = dirs.takeBlocks(n)
		}
	}
	if n := l.live[0].xbytes; n > 0 {
		l.xattrOff = dirs.take(int64(n))
	}
	l.fileBlocks, l.dirBlocks = files.blocks, dirs.blocks
	// The image's own part lies behind the inodes of files.
	shift := l.fileBlocks * BlockSize
	for i := range l.inodes.len() {
		if in, li := l.inodes.at(i), &l.live[i]; !in.isRegular() {
			li.at += shift
			if li.wholeBlocks(in) > 0 {
				in.liveBlocks += shift
			}
		}
	}
	l.xattrOff += shift
	if l.Size()/BlockSize > math.MaxUint32 {
		return invalid("metadata of %d bytes: block numbers have 32 bits", l.Size())
	}
	return nil
}

// wholeBlocks returns the number of blocks of a directory or symlink outside its inode.
func (li *liveInode) wholeBlocks(in *inode) int64 {
	switch {
	case in.isDir() && li.inline:
		return in.liveSize / BlockSize
	case in.isDir():
		return roundUp(in.liveSize, BlockSize) / BlockSize
	case in.isSymlink() && !li.inline:
		return 1
	}
	return 0
}

// Size returns the size of the run in bytes, a multiple of BlockSize. It is valid after Resolve.
func (l *LivePlan) Size() int64 { return (l.fileBlocks + l.dirBlocks) * BlockSize }

// FileSize returns the size of the run's first part: the inodes of regular files, which other images
// may share later. The rest of the run belongs to this image alone.
func (l *LivePlan) FileSize() int64 { return l.fileBlocks * BlockSize }

// FileCount is the number of regular files, hard links counted once.
func (l *LivePlan) FileCount() int { return len(l.files) }

// File returns the i-th regular file in the order of the tree, from 0. Nids of new inodes are valid
// after PlaceLive.
func (l *LivePlan) File(i int) LiveFile { return l.file(&l.files[i]) }

// FileData returns the contents of the i-th regular file, possibly of Size 0, and whether its inode is new.
func (l *LivePlan) FileData(i int) (d Data, isNew bool) {
	f := &l.files[i]
	return l.data(l.inodes.at(f.ino)), !l.live[f.ino].shared
}

// FilePath returns the first name of the i-th regular file.
func (l *LivePlan) FilePath(i int) string { return l.path(l.files[i].ino) }

// PlaceLive puts the run at off and the root at a slot. It returns an error that wraps ErrInvalid for
// a place outside of the tree, or one whose nids or block numbers do not fit their fields.
func (l *LivePlan) PlaceLive(g Geometry, off int64, slot int) error {
	if err := g.Validate(); err != nil {
		return err
	}
	end := int64(g.Blocks) * BlockSize
	switch {
	case slot < 0 || slot >= g.Slots:
		return invalid("slot %d of %d", slot, g.Slots)
	case off%BlockSize != 0 || off < g.TreeStart() || off > end-l.Size():
		return invalid("a run of %d bytes at %d, expected a multiple of %d between %d and %d", l.Size(), off, BlockSize,
			g.TreeStart(), end)
	case l.live[0].xbytes > 0 && (off+l.Size()-g.Head)/disk.ErofsXattrIDSize > math.MaxUint32:
		return &TreeError{"/", invalid("xattrs of the root at %d: the slot cannot refer to them", off)}
	}
	for i := range l.inodes.len() {
		in := l.inodes.at(i)
		if in.hasData() && (in.addr < 0 || in.addr > end-roundUp(in.size, BlockSize)) {
			return &TreeError{
				l.path(int32(i)),
				invalid("contents of %d bytes at %d: the tree ends at %d", in.size, in.addr, end),
			}
		}
	}
	l.g, l.off, l.slot = g, off, slot
	return nil
}
