package daxfs

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// The live tree is an EROFS file system that stays mounted while images are added. Its root directory
// has a fixed set of names, the slots. The inode of a slot is invalid until an image is published there;
// from then on it is the root directory of that image. docs/pool-format.md is the normative description.

const (
	// MaxSlots is the largest number of slots of a live tree: slot names have exactly five digits.
	MaxSlots = 65472
	// slotSize is the size of a slot in bytes: an extended inode, and an xattr header with up to
	// slotXattrs references to shared xattrs.
	slotSize   = 128
	slotXattrs = (slotSize - disk.ErofsExtendedSize - disk.ErofsXattrHdrSize) / disk.ErofsXattrIDSize
	// SlotsPerBlock is the number of slots per block where the kernel does not read through a block device.
	SlotsPerBlock = BlockSize / slotSize

	liveRoot  = 1 // nid of the root directory; a nid of 0 would give inode number 0
	liveLabel = "daxfs pool"
	slotWidth = 5
)

// Geometry describes the superblock and the root directory of a live tree. It does not change while
// the tree is mounted. The zero value stands for no tree.
type Geometry struct {
	// UUID is the UUID of the superblock; each epoch of a pool has its own.
	UUID [16]byte
	// Slots is the number of names in the root directory, 2 to MaxSlots.
	Slots int
	// PerBlock is the number of slots per block: SlotsPerBlock, or 1 if kernels read the memory through a
	// block device, whose page cache would keep stale copies of the neighbouring slots.
	PerBlock int
	// Head is the offset of the block from which nids count, a positive multiple of BlockSize.
	Head int64
	// Blocks is the number of blocks that the file system covers, from block 0.
	Blocks uint32
}

// Validate returns an error that wraps ErrInvalid if no live tree can have this geometry.
func (g Geometry) Validate() error {
	switch {
	case g.Slots < 2 || g.Slots > MaxSlots:
		return invalid("a live tree of %d slots, expected 2 to %d", g.Slots, MaxSlots)
	case g.PerBlock != 1 && g.PerBlock != SlotsPerBlock:
		return invalid("%d slots in a block, expected 1 or %d", g.PerBlock, SlotsPerBlock)
	case g.Head < BlockSize || g.Head%BlockSize != 0:
		return invalid("a live tree that begins at %d, expected a positive multiple of %d", g.Head, BlockSize)
	case g.TreeStart() > int64(g.Blocks)*BlockSize:
		return invalid("a live tree whose slots end at %d in %d blocks", g.TreeStart(), g.Blocks)
	}
	return nil
}

// SlotName returns the name of slot i in the root directory.
func (g Geometry) SlotName(i int) string { return fmt.Sprintf("%0*d", slotWidth, i) }

// SlotOff returns the offset of the inode of slot i.
func (g Geometry) SlotOff(i int) int64 {
	return g.slotStart() + int64(i/g.PerBlock)*BlockSize + int64(i%g.PerBlock)*slotSize
}

// SlotNid returns the nid of slot i.
func (g Geometry) SlotNid(i int) uint64 { return g.nid(g.SlotOff(i)) }

// NidOff returns the offset of an inode.
func (g Geometry) NidOff(nid uint64) int64 { return g.Head + int64(nid)*disk.ErofsSlot }

func (g Geometry) nid(off int64) uint64 { return uint64(off-g.Head) / disk.ErofsSlot }

// TreeStart returns the offset of the first byte after the slots.
func (g Geometry) TreeStart() int64 {
	blocks := (g.Slots + g.PerBlock - 1) / g.PerBlock
	return g.slotStart() + int64(blocks)*BlockSize
}

// slotStart returns the offset of slot 0, behind the block of the root inode and the root directory.
func (g Geometry) slotStart() int64 { return g.Head + BlockSize + roundUp(g.rootSize(), BlockSize) }

func (g Geometry) rootSize() int64 {
	names, last := g.Slots, int64(0)
	first := (BlockSize - 2*disk.ErofsDirentSize - len("...")) / slotEntry // beside "." and ".."
	if names <= first {
		return int64(names*slotEntry + 2*disk.ErofsDirentSize + len("..."))
	}
	names -= first
	full := int64(names / slotsPerDirBlock)
	if rest := names % slotsPerDirBlock; rest > 0 {
		last = int64(rest * slotEntry)
	} else {
		full, last = full-1, slotsPerDirBlock*slotEntry
	}
	return (1+full)*BlockSize + last
}

const (
	slotEntry        = disk.ErofsDirentSize + slotWidth // bytes of a slot's name in the root directory
	slotsPerDirBlock = BlockSize / slotEntry
)

// FormatLive writes an empty live tree: the root directory, its slots, and block 0 last. Offsets in w
// count from block 0. The tree must not be mounted.
func FormatLive(w io.WriterAt, g Geometry) error {
	if err := g.Validate(); err != nil {
		return err
	}
	// Without a superblock nobody can mount a half-written tree.
	if _, err := w.WriteAt(make([]byte, BlockSize), 0); err != nil {
		return fmt.Errorf("clear the superblock: %w", err)
	}
	r := runWriter{w: w, pos: g.Head, buf: make([]byte, 0, writeBuffer)}
	root := disk.ErofsInode{
		Extended: true, Mode: unix.S_IFDIR | 0o700, Nlink: uint32(2 + g.Slots), Size: uint64(g.rootSize()),
		Union: uint32((g.Head + BlockSize) / BlockSize), Ino: liveRoot,
	}
	root.Marshal(r.at(g.NidOff(liveRoot), disk.ErofsExtendedSize))
	g.writeRootDir(&r)
	for i := range g.Slots {
		copy(r.at(g.SlotOff(i), slotSize), emptySlot())
	}
	r.at(g.TreeStart(), 0)
	r.flush()
	if r.err != nil {
		return r.err
	}
	if _, err := w.WriteAt(g.block0(), 0); err != nil {
		return fmt.Errorf("write the superblock: %w", err)
	}
	return nil
}

func (g Geometry) writeRootDir(r *runWriter) {
	type entry struct {
		name string
		nid  uint64
	}
	next := 0
	for at := g.Head + BlockSize; next < g.Slots; at += BlockSize {
		var names []entry
		size := 0
		if next == 0 {
			names = append(names, entry{".", liveRoot}, entry{"..", liveRoot})
			size = 2*disk.ErofsDirentSize + len("...")
		}
		for ; next < g.Slots && size+slotEntry <= BlockSize; next++ {
			names = append(names, entry{g.SlotName(next), g.SlotNid(next)})
			size += slotEntry
		}
		b := r.at(at, BlockSize)
		name := len(names) * disk.ErofsDirentSize
		for i, n := range names {
			e := disk.ErofsDirent{Nid: n.nid, NameOff: uint16(name), Type: disk.ErofsFTDir}
			e.Marshal(b[i*disk.ErofsDirentSize:])
			name += copy(b[name:], n.name)
		}
	}
}

// GrowLive writes the superblock of a live tree with a larger g.Blocks; the rest of g is unchanged.
// The tree must not be mounted: a kernel remembers the number of blocks.
func GrowLive(w io.WriterAt, g Geometry) error {
	if err := g.Validate(); err != nil {
		return err
	}
	_, err := w.WriteAt(g.block0(), 0)
	return err
}

func (g Geometry) block0() []byte {
	b := make([]byte, BlockSize)
	block := uint32(g.Head / BlockSize)
	sb := disk.ErofsSuper{
		Magic: disk.ErofsMagic, FeatureCompat: disk.ErofsCompatChecksum | disk.ErofsCompatMtime,
		BlockBits: disk.ErofsBlockBits, RootNid: liveRoot, Inos: uint64(1 + g.Slots), Blocks: g.Blocks,
		MetaBlock: block, XattrBlock: block, UUID: g.UUID,
	}
	copy(sb.Label[:], liveLabel)
	sb.Marshal(b[disk.ErofsSuperOff:])
	sb.Checksum = disk.ErofsChecksum(b)
	sb.Marshal(b[disk.ErofsSuperOff:])
	return b
}

// emptySlot returns a slot without an image. It already has the format bit of an extended inode, so a
// lookup during publication never takes the slot for a compact inode.
func emptySlot() []byte {
	b := make([]byte, slotSize)
	b[0] = 1
	return b
}

// errNotLive reports an EROFS file system that is not a live tree.
var errNotLive = fmt.Errorf("%w: not a live tree", ErrUnsupported)

// Live reads a live tree, image by image. Like FS it trusts no byte, caches nothing and is safe for concurrent use.
type Live struct {
	fs *FS
	g  Geometry
}

// OpenLive reads the superblock and the root directory of a live tree of size bytes.
//
// The error is a *FormatError, or wraps ErrUnsupported for another EROFS file system, or is an error of r.
func OpenLive(r io.ReaderAt, size int64) (*Live, error) {
	f, err := Open(r, size)
	if err != nil {
		return nil, err
	}
	root, err := f.inode(f.sb.Root)
	if err != nil {
		return nil, err
	}
	l := &Live{fs: f}
	l.g = Geometry{UUID: f.sb.UUID, Slots: int(root.Nlink) - 2, PerBlock: 1, Head: f.sb.meta, Blocks: f.sb.Blocks}
	if f.sb.Root != liveRoot || f.sb.Label != liveLabel {
		return nil, fmt.Errorf("%w: root %d, label %q", errNotLive, f.sb.Root, f.sb.Label)
	}
	var slots [2]uint64
	for i := range slots {
		slots[i], err = root.Lookup(l.g.SlotName(i))
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: slot %d: %w", errNotLive, i, err)
		}
		if err != nil { // a failed read says nothing about the file system
			return nil, err
		}
	}
	if slots[1]-slots[0] == slotSize/disk.ErofsSlot {
		l.g.PerBlock = SlotsPerBlock
	}
	if err := l.g.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotLive, err)
	}
	if slots[0] != l.g.SlotNid(0) || slots[1] != l.g.SlotNid(1) {
		return nil, fmt.Errorf("%w: slots are inodes %d and %d, expected %d and %d", errNotLive, slots[0], slots[1],
			l.g.SlotNid(0), l.g.SlotNid(1))
	}
	return l, nil
}

// Geometry returns what the superblock and the root directory say.
func (l *Live) Geometry() Geometry { return l.g }

// FS returns the whole file system, whose root is the directory of slots. Reading the inode of an
// empty slot gives an error that wraps ErrCorrupt, as in the kernel.
func (l *Live) FS() *FS { return l.fs }

// published reports whether slot i holds an image.
func (l *Live) published(i int) (bool, error) {
	b, err := l.fs.s.view(l.g.SlotOff(i), slotSize)
	if err != nil {
		return false, err
	}
	return b[4] != 0 || b[5] != 0, nil
}

// Image returns the image at slot i as a file system of its own. The error wraps fs.ErrNotExist if the
// slot is empty.
func (l *Live) Image(i int) (*FS, error) {
	if i < 0 || i >= l.g.Slots {
		return nil, fmt.Errorf("slot %d of %d: %w", i, l.g.Slots, errNoImage)
	}
	ok, err := l.published(i)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("slot %d: %w", i, errNoImage)
	}
	return l.fs.at(l.g.SlotNid(i))
}

// Erased returns a regular file's inode as it was before EraseInode. A FUSE server needs it for files
// that are still open: unlike a kernel it keeps no inodes in memory. The error wraps fs.ErrNotExist if
// the inode is not an erased one.
func (f *FS) Erased(nid uint64) (Inode, error) {
	in, raw, err := f.readInode(nid)
	if raw.Mode != erasedMode || raw.Size == 0 {
		return Inode{}, fmt.Errorf("erased inode %d: %w", nid, cmp.Or(err, fs.ErrNotExist))
	}
	in.Mode = unix.S_IFREG
	off := f.inodeOff(nid)
	return in, f.locate(&in, &raw, off, off+int64(raw.HeaderSize()))
}

// at returns the same file system with another root directory.
func (f *FS) at(root uint64) (*FS, error) {
	sub := &FS{s: f.s, sb: f.sb}
	sub.sb.Root = root
	sub.pathFS = pathFS{sub}
	in, err := sub.inode(root)
	if err != nil {
		return nil, err
	}
	if !in.IsDir() {
		return nil,
			corrupt(RuleRoot, sub.inodeOff(root), root, "mode of the root is %#o, expected a directory", in.Mode)
	}
	return sub, nil
}
