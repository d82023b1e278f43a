package daxfs

import (
	"cmp"
	"math"
	"slices"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// The core is laid out as
//
//	slot 0, unused | inodes, xattrs, inline tails, whole blocks, shared xattrs | DAXFS inodes | DAXFS entries | zeros
//
// A piece of up to one block never crosses a block boundary: old kernels cannot read such inodes, and
// an inline tail must share its inode's block. Later pieces fill the gaps at the ends of blocks.

// piece is one run of bytes in the EROFS part of the core.
type piece struct {
	off  int64
	ino  int32 // index in Plan.inodes
	kind pieceKind
}

type pieceKind uint8

const (
	pieceInode  pieceKind = iota // inode, xattrs, inline tail
	pieceBlocks                  // whole blocks of a directory or symlink
	pieceShared                  // all shared xattrs; ino is unused
)

func (p *Plan) layout() error {
	if err := p.layoutXattrs(); err != nil {
		return err
	}
	var names []dirent
	for i := range p.inodes.len() {
		if in := p.inodes.at(i); in.isDir() {
			names = p.dirents(names[:0], int32(i))
			in.size = dirSize(names)
		}
	}
	p.chooseEpoch()

	space := packer{}
	space.take(disk.ErofsSlot) // a nid of 0 would give inode number 0
	p.pieces = make([]piece, 0, p.inodes.len()+p.inodes.len()/8)
	for i := range p.inodes.len() {
		in := p.inodes.at(i)
		head := int64(in.headerSize() + in.xbytes)
		tail := int64(0)
		if in.isSymlink() {
			tail = in.size + 1 // its NUL makes it usable as the target of the DAXFS half, too
		} else if in.isDir() {
			tail = in.size % BlockSize
		}
		in.inline = tail > 0 && head+tail <= BlockSize
		if !in.inline {
			tail = 0
		}
		in.off = space.take(head + tail)
		p.pieces = append(p.pieces, piece{in.off, int32(i), pieceInode})
		if n := in.wholeBlocks(); n > 0 {
			in.blocks = space.takeBlocks(n)
			p.pieces = append(p.pieces, piece{in.blocks, int32(i), pieceBlocks})
		}
		if in.isSymlink() {
			in.v8Off = in.blocks
			if in.inline {
				in.v8Off = in.off + head
			}
		}
	}
	if err := p.placeShared(&space); err != nil {
		return err
	}
	slices.SortFunc(p.pieces, func(a, b piece) int { return cmp.Compare(a.off, b.off) })
	if nid := p.inodes.at(0).off / disk.ErofsSlot; nid > disk.ErofsMaxRootNid {
		return &TreeError{"/", invalid("the root inode has nid %d, expected at most %d", nid, disk.ErofsMaxRootNid)}
	}

	p.v8Table = roundUp(space.end(), disk.V8InodeSize)
	p.v8Names = p.v8Table + int64(p.stats.V8Inodes)*disk.V8InodeSize
	next := p.v8Names
	for i := range p.inodes.len() {
		if in := p.inodes.at(i); in.v8Entries > 0 {
			in.v8Off = next
			next += int64(in.v8Entries) * disk.V8DirentSize
		}
	}
	p.coreSize = roundUp(next, BlockSize)
	if p.coreSize/BlockSize > math.MaxUint32 {
		return invalid("metadata of %d bytes: block numbers have 32 bits", p.coreSize)
	}
	return nil
}

func (i *inode) headerSize() int {
	if i.extended {
		return disk.ErofsExtendedSize
	}
	return disk.ErofsCompactSize
}

// wholeBlocks returns the number of blocks of a directory or symlink outside its inode.
func (i *inode) wholeBlocks() int64 {
	switch {
	case i.isDir() && i.inline:
		return i.size / BlockSize
	case i.isDir():
		return roundUp(i.size, BlockSize) / BlockSize
	case i.isSymlink() && !i.inline:
		return 1 // with the NUL: a target has at most BlockSize-1 bytes
	}
	return 0
}

// chooseEpoch picks the most frequent time of inodes that would otherwise fit a compact inode, which
// has no time of its own. Reproducible images have one time for most files.
func (p *Plan) chooseEpoch() {
	uses := map[Time]int{}
	for i := range p.inodes.len() {
		if in := p.inodes.at(i); in.fitsCompact() {
			uses[in.mtime()]++
		}
	}
	best := 0
	for t, n := range uses {
		if n > best || n == best && (t.Sec < p.epoch.Sec || t.Sec == p.epoch.Sec && t.Nsec < p.epoch.Nsec) {
			best, p.epoch = n, t
		}
	}
	for i := range p.inodes.len() {
		in := p.inodes.at(i)
		in.extended = !in.fitsCompact() || in.mtime() != p.epoch
	}
}

func (i *inode) fitsCompact() bool {
	return i.uid <= math.MaxUint16 && i.gid <= math.MaxUint16 && i.nlink <= math.MaxUint16 && i.size <= math.MaxUint32
}

// layoutXattrs decides which xattrs are shared and how many bytes the xattrs of each inode take.
func (p *Plan) layoutXattrs() error {
	for x := range p.xattrs {
		a := &p.xattrs[x]
		a.shared = a.uses*len(a.enc) > a.uses*disk.ErofsXattrIDSize+len(a.enc)
	}
	for i := range p.inodes.len() {
		in := p.inodes.at(i)
		if len(in.xattrs) == 0 {
			continue
		}
		refs := make([]int32, 0, len(in.xattrs))
		var own []int32
		size := 0
		for _, x := range in.xattrs {
			if p.xattrs[x].shared && len(refs) < disk.ErofsXattrSharedMax {
				refs = append(refs, x)
				size += disk.ErofsXattrIDSize
				continue
			}
			own = append(own, x)
			size += len(p.xattrs[x].enc)
		}
		in.nshared = len(refs)
		in.xattrs = append(refs, own...)
		in.xbytes = disk.ErofsXattrHdrSize + size
		if limit := disk.ErofsXattrBytes(disk.ErofsXattrCountMax); in.xbytes > limit {
			return &TreeError{p.path(int32(i)), invalid("xattrs take %d bytes, expected at most %d", in.xbytes, limit)}
		}
	}
	return nil
}

// placeShared puts all shared xattrs into one run.
func (p *Plan) placeShared(space *packer) error {
	var size int64
	for x := range p.xattrs {
		if p.xattrs[x].shared {
			p.shared = append(p.shared, int32(x))
			size += int64(len(p.xattrs[x].enc))
		}
	}
	if size == 0 {
		return nil
	}
	slices.SortFunc(p.shared, func(a, b int32) int { return cmp.Compare(p.xattrs[a].enc, p.xattrs[b].enc) })
	off := space.take(size)
	if (off+size)/disk.ErofsXattrIDSize > math.MaxUint32 {
		return invalid("shared xattrs at %d: their numbers have 32 bits", off)
	}
	p.pieces = append(p.pieces, piece{off, -1, pieceShared})
	for _, x := range p.shared {
		p.xattrs[x].off = off
		off += int64(len(p.xattrs[x].enc))
	}
	return nil
}

// packer allocates space in a growing run of blocks.
type packer struct {
	blocks int64
	holes  []hole // free space, oldest first
}

type hole struct{ off, end int64 }

// maxHoles bounds the search. More holes gain nothing measurable: most pieces take one or two slots.
const maxHoles = 16

// take allocates n bytes at a slot boundary: up to a block within one block, more at the start of a block.
func (k *packer) take(n int64) int64 {
	n = roundUp(n, disk.ErofsSlot)
	for i := range k.holes {
		h := &k.holes[i]
		if h.end-h.off < n {
			continue
		}
		off := h.off
		if h.off += n; h.off == h.end {
			k.holes = slices.Delete(k.holes, i, i+1)
		}
		return off
	}
	off := k.takeBlocks((n + BlockSize - 1) / BlockSize)
	if end := k.blocks * BlockSize; off+n < end {
		if len(k.holes) == maxHoles {
			small := 0
			for i, h := range k.holes {
				if h.end-h.off < k.holes[small].end-k.holes[small].off {
					small = i
				}
			}
			k.holes = slices.Delete(k.holes, small, small+1)
		}
		k.holes = append(k.holes, hole{off + n, end})
	}
	return off
}

// takeBlocks allocates n whole blocks.
func (k *packer) takeBlocks(n int64) int64 {
	off := k.blocks * BlockSize
	k.blocks += n
	return off
}

// end returns the offset behind the last byte in use.
func (k *packer) end() int64 {
	end := k.blocks * BlockSize
	for _, h := range k.holes {
		if h.end == end {
			return h.off
		}
	}
	return end
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }
