// Package disk encodes and decodes the on-disk structs of the two halves of a dual image, EROFS and
// DAXFS v8. It knows no trees or files, validates nothing and allocates nothing. docs/format.md says
// what the fields of a dual image must hold; tests pin all sizes and offsets.
package disk

import "encoding/binary"

// DAXFS, format version 8. All integers are little endian.
const (
	V8Magic      = 0x64617835 // superblock magic
	V8Version    = 8
	V8SuperSize  = 112 // bytes of the superblock in use; the kernel reserves the rest of block 0
	V8InodeSize  = 64
	V8DirentSize = 272 // distance between entries of a directory
	V8DirentUnit = 271 // bytes that a directory's size counts per entry
	V8NameMax    = 255
	V8RootIno    = 1 // the kernel takes this inode as the root and ignores the superblock's

	V8OverlayMagic   = 0x6f766c79
	V8OverlayVersion = 2
	V8OverlayHdrSize = 4096 // header, padded to a page
	V8OverlaySize    = 8192 // header and one page of empty buckets
	V8BucketSize     = 16
)

// V8Super is the DAXFS superblock, at offset 0 of block 0.
type V8Super struct {
	Magic         uint32 // 0
	Version       uint32 // 4
	BlockSize     uint32 // 8, must be the page size of the kernel
	Reserved      uint32 // 12
	TotalSize     uint64 // 16, bytes of the image
	BaseOff       uint64 // 24, start of the base region in the image
	BaseSize      uint64 // 32
	InodeOff      uint64 // 40, inode table, from BaseOff
	InodeCount    uint32 // 48
	RootIno       uint32 // 52
	DataOff       uint64 // 56, from BaseOff; informative
	OverlayOff    uint64 // 64, in the image
	OverlaySize   uint64 // 72
	OverlayBkts   uint32 // 80, a power of two
	OverlayShift  uint32 // 84, log2 of OverlayBkts
	PCacheOff     uint64 // 88, 0
	PCacheSize    uint64 // 96, 0
	PCacheSlots   uint32 // 104, 0
	PCacheHashSft uint32 // 108, 0
}

// Marshal writes 112 bytes to b.
func (s *V8Super) Marshal(b []byte) {
	b = b[:V8SuperSize]
	le := binary.LittleEndian
	le.PutUint32(b[0:], s.Magic)
	le.PutUint32(b[4:], s.Version)
	le.PutUint32(b[8:], s.BlockSize)
	le.PutUint32(b[12:], s.Reserved)
	le.PutUint64(b[16:], s.TotalSize)
	le.PutUint64(b[24:], s.BaseOff)
	le.PutUint64(b[32:], s.BaseSize)
	le.PutUint64(b[40:], s.InodeOff)
	le.PutUint32(b[48:], s.InodeCount)
	le.PutUint32(b[52:], s.RootIno)
	le.PutUint64(b[56:], s.DataOff)
	le.PutUint64(b[64:], s.OverlayOff)
	le.PutUint64(b[72:], s.OverlaySize)
	le.PutUint32(b[80:], s.OverlayBkts)
	le.PutUint32(b[84:], s.OverlayShift)
	le.PutUint64(b[88:], s.PCacheOff)
	le.PutUint64(b[96:], s.PCacheSize)
	le.PutUint32(b[104:], s.PCacheSlots)
	le.PutUint32(b[108:], s.PCacheHashSft)
}

// Unmarshal reads s from the first 112 bytes of b.
func (s *V8Super) Unmarshal(b []byte) {
	b = b[:V8SuperSize]
	le := binary.LittleEndian
	s.Magic = le.Uint32(b[0:])
	s.Version = le.Uint32(b[4:])
	s.BlockSize = le.Uint32(b[8:])
	s.Reserved = le.Uint32(b[12:])
	s.TotalSize = le.Uint64(b[16:])
	s.BaseOff = le.Uint64(b[24:])
	s.BaseSize = le.Uint64(b[32:])
	s.InodeOff = le.Uint64(b[40:])
	s.InodeCount = le.Uint32(b[48:])
	s.RootIno = le.Uint32(b[52:])
	s.DataOff = le.Uint64(b[56:])
	s.OverlayOff = le.Uint64(b[64:])
	s.OverlaySize = le.Uint64(b[72:])
	s.OverlayBkts = le.Uint32(b[80:])
	s.OverlayShift = le.Uint32(b[84:])
	s.PCacheOff = le.Uint64(b[88:])
	s.PCacheSize = le.Uint64(b[96:])
	s.PCacheSlots = le.Uint32(b[104:])
	s.PCacheHashSft = le.Uint32(b[108:])
}

// V8Inode is one slot of the inode table: inode number n is slot n-1.
type V8Inode struct {
	Ino      uint32 // 0
	Mode     uint32 // 4, type and permissions
	UID, GID uint32 // 8, 12
	Size     uint64 // 16, bytes; of a directory V8DirentUnit per entry
	DataOff  uint64 // 24, from V8Super.BaseOff
	Nlink    uint32 // 32
	// 36..63 are reserved.
}

// Marshal writes 64 bytes to b.
func (i *V8Inode) Marshal(b []byte) {
	b = b[:V8InodeSize]
	le := binary.LittleEndian
	le.PutUint32(b[0:], i.Ino)
	le.PutUint32(b[4:], i.Mode)
	le.PutUint32(b[8:], i.UID)
	le.PutUint32(b[12:], i.GID)
	le.PutUint64(b[16:], i.Size)
	le.PutUint64(b[24:], i.DataOff)
	le.PutUint32(b[32:], i.Nlink)
	clear(b[36:])
}

// Unmarshal reads i from the first 64 bytes of b.
func (i *V8Inode) Unmarshal(b []byte) {
	b = b[:V8InodeSize]
	le := binary.LittleEndian
	i.Ino = le.Uint32(b[0:])
	i.Mode = le.Uint32(b[4:])
	i.UID, i.GID = le.Uint32(b[8:]), le.Uint32(b[12:])
	i.Size = le.Uint64(b[16:])
	i.DataOff = le.Uint64(b[24:])
	i.Nlink = le.Uint32(b[32:])
}

// V8Dirent is the fixed part of a directory entry. The name is in bytes 16 to 270, followed by one
// byte of padding.
type V8Dirent struct {
	Ino     uint32 // 0
	Mode    uint32 // 4, the mode of the inode
	NameLen uint16 // 8
	// 10..15 are reserved.
}

// V8DirentName is the offset of the name in a directory entry.
const V8DirentName = 16

// Marshal writes the first 16 bytes of an entry to b.
func (d *V8Dirent) Marshal(b []byte) {
	b = b[:V8DirentName]
	binary.LittleEndian.PutUint32(b[0:], d.Ino)
	binary.LittleEndian.PutUint32(b[4:], d.Mode)
	binary.LittleEndian.PutUint16(b[8:], d.NameLen)
	clear(b[10:])
}

// Unmarshal reads d from the first 16 bytes of b.
func (d *V8Dirent) Unmarshal(b []byte) {
	b = b[:V8DirentName]
	d.Ino = binary.LittleEndian.Uint32(b[0:])
	d.Mode = binary.LittleEndian.Uint32(b[4:])
	d.NameLen = binary.LittleEndian.Uint16(b[8:])
}

// V8Overlay is the header of the hash-overlay region. Offsets count from the header.
type V8Overlay struct {
	Magic     uint32    // 0
	Version   uint32    // 4
	BucketOff uint64    // 8
	PoolOff   uint64    // 16
	PoolSize  uint64    // 24
	PoolAlloc uint64    // 32
	NextIno   uint64    // 40, above every inode number of the base
	Free      [3]uint64 // 48, heads of free lists; all ones = empty
}

// V8OverlayUsed is the size of the overlay header in bytes; the rest of its page is zero.
const V8OverlayUsed = 72

// Marshal writes 72 bytes to b.
func (o *V8Overlay) Marshal(b []byte) {
	b = b[:V8OverlayUsed]
	le := binary.LittleEndian
	le.PutUint32(b[0:], o.Magic)
	le.PutUint32(b[4:], o.Version)
	le.PutUint64(b[8:], o.BucketOff)
	le.PutUint64(b[16:], o.PoolOff)
	le.PutUint64(b[24:], o.PoolSize)
	le.PutUint64(b[32:], o.PoolAlloc)
	le.PutUint64(b[40:], o.NextIno)
	for i, f := range o.Free {
		le.PutUint64(b[48+8*i:], f)
	}
}

// Unmarshal reads o from the first 72 bytes of b.
func (o *V8Overlay) Unmarshal(b []byte) {
	b = b[:V8OverlayUsed]
	le := binary.LittleEndian
	o.Magic = le.Uint32(b[0:])
	o.Version = le.Uint32(b[4:])
	o.BucketOff = le.Uint64(b[8:])
	o.PoolOff = le.Uint64(b[16:])
	o.PoolSize = le.Uint64(b[24:])
	o.PoolAlloc = le.Uint64(b[32:])
	o.NextIno = le.Uint64(b[40:])
	for i := range o.Free {
		o.Free[i] = le.Uint64(b[48+8*i:])
	}
}
