package daxfs

import (
	"bytes"
	"fmt"
	"io"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// FS reads the EROFS half of an image. It implements fs.FS, fs.ReadDirFS, fs.StatFS, fs.ReadLinkFS and fs.ReadFileFS,
// and gives access by inode number through Root and Inode.
//
// It trusts no byte: whatever the image holds, a call returns or gives a *FormatError, in memory and
// time bounded by the request. It caches nothing and is safe for concurrent use. Faults that one call
// cannot see, such as overlapping files or wrong link counts, are found by Check.
//
// Names in paths need not be valid UTF-8, unlike fs.ValidPath requires: names in images are bytes.
type FS struct {
	s  source
	sb Super
	pathFS
}

// Super holds the fields of the EROFS superblock.
type Super struct {
	// Root is the nid of the root directory.
	Root uint64
	// Inodes is the number of inodes.
	Inodes uint64
	// Blocks is the number of blocks of BlockSize bytes that the image covers, from block 0.
	Blocks uint32
	// UUID is derived from the content if this package wrote the image.
	UUID [16]byte
	// Label is the volume name, up to 16 bytes.
	Label string
	// Time is the modification time of all compact inodes.
	Time Time
	// Compat and Incompat are the feature bits.
	Compat, Incompat uint32

	meta  int64 // offset of nid 0
	xattr int64 // offset of shared attribute 0
}

// Open reads the superblock of the EROFS half of an image of size bytes. It copies nothing if r is
// Mapped. The FS keeps r and does not close it.
//
// The error is a *FormatError that wraps ErrCorrupt or ErrUnsupported, or an error of r.
func Open(r io.ReaderAt, size int64) (*FS, error) {
	s, err := newSource(r, size)
	if err != nil {
		return nil, err
	}
	return openErofs(s)
}

// OpenBytes opens an image in memory.
func OpenBytes(b []byte) (*FS, error) { return Open(Mem(b), int64(len(b))) }

func openErofs(s source) (*FS, error) {
	f := &FS{s: s}
	f.pathFS = pathFS{f}
	if err := f.readSuper(); err != nil {
		return nil, err
	}
	in, err := f.inode(f.sb.Root)
	if err != nil {
		return nil, err
	}
	if !in.IsDir() {
		return nil,
			corrupt(RuleRoot, f.inodeOff(f.sb.Root), f.sb.Root,
				"mode of the root is %#o, expected a directory", in.Mode)
	}
	return f, nil
}

// Super returns the fields of the superblock.
func (f *FS) Super() Super { return f.sb }

// Root returns the nid of the root directory.
func (f *FS) Root() uint64 { return f.sb.Root }

// Inode returns an inode by its nid. Any number is safe; a number that no directory of this image
// names gives an error or nonsense.
func (f *FS) Inode(nid uint64) (Inode, error) { return f.inode(nid) }

func (f *FS) root() uint64 { return f.sb.Root }
func (f *FS) src() *source { return &f.s }

// erofsFeatures names the incompatible feature bits for error messages.
var erofsFeatures = []string{
	"lz4 zero padding", "big compressed clusters", "chunked files", "device table or second compression head",
	"compressed tails", "fragments or deduplication", "xattr prefixes", "48-bit addresses", "metadata box",
}

// incompatAllowed is the set of harmless incompatible features. Zero padding only affects compressed
// files, each of which is refused.
const incompatAllowed = 0x1

// readSuper reads and checks the superblock in this order: magic, fields that decide whether the rest
// can be understood, checksum, values.
func (f *FS) readSuper() error {
	const off = disk.ErofsSuperOff
	block, err := f.s.view(0, BlockSize)
	if err != nil {
		return err
	}
	if f.s.b != nil {
		block = bytes.Clone(block) // the checksum must cover the bytes that are used
	}
	var d disk.ErofsSuper
	d.Unmarshal(block[off:])
	if d.Magic != disk.ErofsMagic {
		return corrupt(RuleMagic, off, 0, "magic is %#x, expected %#x", d.Magic, uint32(disk.ErofsMagic))
	}
	if d.BlockBits != disk.ErofsBlockBits {
		return unsupported(RuleBlockSize, off+12, 0, "block size is 2^%d bytes, expected 2^%d", d.BlockBits,
			disk.ErofsBlockBits)
	}
	if bad := d.FeatureIncompat &^ incompatAllowed; bad != 0 {
		return unsupported(RuleFeature, off+80, 0, "incompatible features %#x (%s)", bad, featureNames(bad))
	}
	if d.FeatureCompat&disk.ErofsCompatChecksum != 0 {
		if sum := disk.ErofsChecksum(block); sum != d.Checksum {
			return corrupt(RuleChecksum, off+4, 0, "checksum is %#x, expected %#x", d.Checksum, sum)
		}
	}
	if d.DirBlockBits != 0 || d.ExtraDevices != 0 {
		return unsupported(RuleFeature, off+86, 0,
			"%d extra devices and directory blocks of 2^%d blocks, expected 0 and 0",
			d.ExtraDevices, d.DirBlockBits)
	}
	f.sb = Super{
		Root: uint64(d.RootNid), Inodes: d.Inos, Blocks: d.Blocks, UUID: d.UUID,
		Label:  strings.TrimRight(string(d.Label[:]), "\x00"),
		Time:   Time{d.EpochSec, d.EpochNsec},
		Compat: d.FeatureCompat, Incompat: d.FeatureIncompat,
		meta: int64(d.MetaBlock) * BlockSize, xattr: int64(d.XattrBlock) * BlockSize,
	}
	switch {
	case d.EpochNsec > 999_999_999:
		return corrupt(RuleTime, off+32, 0, "nanoseconds of the epoch are %d, expected less than 1e9", d.EpochNsec)
	case int64(d.Blocks)*BlockSize > f.s.size:
		return corrupt(RuleBlocks, off+36, 0, "%d blocks, the image holds %d", d.Blocks, f.s.size/BlockSize)
	case f.sb.meta >= f.s.size:
		return corrupt(RuleAreas, off+40, 0, "metadata begins at block %d, the image holds %d", d.MetaBlock,
			f.s.size/BlockSize)
	case f.sb.xattr >= f.s.size:
		return corrupt(RuleAreas, off+44, 0, "shared xattrs begin at block %d, the image holds %d", d.XattrBlock,
			f.s.size/BlockSize)
	}
	return nil
}

func featureNames(bits uint32) string {
	var names []string
	for i := range 32 {
		switch {
		case bits&(1<<i) == 0:
		case i < len(erofsFeatures):
			names = append(names, erofsFeatures[i])
		default:
			names = append(names, fmt.Sprintf("unknown bit %d", i))
		}
	}
	return strings.Join(names, ", ")
}
