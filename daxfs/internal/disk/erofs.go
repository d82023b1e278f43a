package disk

import (
	"encoding/binary"
	"hash/crc32"
)

// Constants of EROFS as mainline Linux reads it since 5.4, restricted to what a dual image uses: no
// compression, no chunks, no extra devices. All integers are little endian.
const (
	ErofsSuperOff  = 1024       // byte offset of the superblock in block 0
	ErofsSuperSize = 128        // bytes of the superblock without extension slots
	ErofsMagic     = 0xE0F5E1E2 // superblock magic
	ErofsBlockBits = 12         // log2 of the block size

	ErofsCompatChecksum = 0x1 // superblock checksum is present
	ErofsCompatMtime    = 0x2 // inode times are modification times

	ErofsSlot           = 32 // bytes of an inode slot; a nid counts slots from the metadata block address
	ErofsSlotBits       = 5  // log2 of ErofsSlot
	ErofsCompactSize    = 32 // bytes of a compact inode
	ErofsExtendedSize   = 64 // bytes of an extended inode
	ErofsMaxRootNid     = 1<<16 - 1
	ErofsLayoutPlain    = 0 // data in consecutive blocks
	ErofsLayoutInline   = 2 // as plain, but the last block follows inode and xattrs
	ErofsDirentSize     = 12
	ErofsNameMax        = 255
	ErofsXattrHdrSize   = 12    // bytes of the header in front of an inode's xattrs
	ErofsXattrEntSize   = 4     // bytes of the header of one xattr
	ErofsXattrIDSize    = 4     // bytes of one reference to a shared xattr; ids count units of this size
	ErofsXattrValueMax  = 65535 // bytes of one xattr value (16-bit field)
	ErofsXattrSharedMax = 255   // shared xattrs of one inode (8-bit field)
	ErofsXattrCountMax  = 65535 // i_xattr_icount (16-bit field)
	ErofsLabelSize      = 16
)

// File types of an EROFS directory entry.
const (
	ErofsFTUnknown = iota
	ErofsFTReg
	ErofsFTDir
	ErofsFTChr
	ErofsFTBlk
	ErofsFTFifo
	ErofsFTSock
	ErofsFTSymlink
)

// Xattr name indexes. An entry stores the rest of the name, which is empty for the two ACLs.
const (
	ErofsXattrUser       = 1 // "user."
	ErofsXattrACLAccess  = 2 // "system.posix_acl_access"
	ErofsXattrACLDefault = 3 // "system.posix_acl_default"
	ErofsXattrTrusted    = 4 // "trusted."
	ErofsXattrSecurity   = 6 // "security."
)

// ErofsXattrPrefix returns the prefix of an xattr name index, or "" for an index that Linux does not serve.
func ErofsXattrPrefix(index uint8) string {
	switch index {
	case ErofsXattrUser:
		return "user."
	case ErofsXattrACLAccess:
		return "system.posix_acl_access"
	case ErofsXattrACLDefault:
		return "system.posix_acl_default"
	case ErofsXattrTrusted:
		return "trusted."
	case ErofsXattrSecurity:
		return "security."
	}
	return ""
}

// ErofsSuper is the EROFS superblock.
type ErofsSuper struct {
	Magic           uint32   // 0
	Checksum        uint32   // 4, see ErofsChecksum
	FeatureCompat   uint32   // 8
	BlockBits       uint8    // 12
	ExtSlots        uint8    // 13, 16-byte extension slots after the superblock
	RootNid         uint16   // 14
	Inos            uint64   // 16, number of inodes
	EpochSec        int64    // 24, time of every compact inode
	EpochNsec       uint32   // 32
	Blocks          uint32   // 36, blocks of the filesystem
	MetaBlock       uint32   // 40, block address that nids count from
	XattrBlock      uint32   // 44, block address that shared xattr ids count from
	UUID            [16]byte // 48
	Label           [16]byte // 64, NUL padded
	FeatureIncompat uint32   // 80, 0 in a dual image
	Compression     uint16   // 84, 0
	ExtraDevices    uint16   // 86, 0
	DevTableSlot    uint16   // 88, 0
	DirBlockBits    uint8    // 90, 0: directory blocks are blocks
	XattrPrefixes   uint8    // 91, 0: no long xattr name prefixes
	XattrPrefixOff  uint32   // 92, 0
	PackedNid       uint64   // 96, 0
	XattrFilter     uint8    // 104, 0
	// 105..127 are reserved or belong to features that are not used: zero.
}

// Marshal writes the 128 bytes of s to b. It does not compute Checksum.
func (s *ErofsSuper) Marshal(b []byte) {
	b = b[:ErofsSuperSize]
	clear(b)
	le := binary.LittleEndian
	le.PutUint32(b[0:], s.Magic)
	le.PutUint32(b[4:], s.Checksum)
	le.PutUint32(b[8:], s.FeatureCompat)
	b[12], b[13] = s.BlockBits, s.ExtSlots
	le.PutUint16(b[14:], s.RootNid)
	le.PutUint64(b[16:], s.Inos)
	le.PutUint64(b[24:], uint64(s.EpochSec))
	le.PutUint32(b[32:], s.EpochNsec)
	le.PutUint32(b[36:], s.Blocks)
	le.PutUint32(b[40:], s.MetaBlock)
	le.PutUint32(b[44:], s.XattrBlock)
	copy(b[48:64], s.UUID[:])
	copy(b[64:80], s.Label[:])
	le.PutUint32(b[80:], s.FeatureIncompat)
	le.PutUint16(b[84:], s.Compression)
	le.PutUint16(b[86:], s.ExtraDevices)
	le.PutUint16(b[88:], s.DevTableSlot)
	b[90], b[91] = s.DirBlockBits, s.XattrPrefixes
	le.PutUint32(b[92:], s.XattrPrefixOff)
	le.PutUint64(b[96:], s.PackedNid)
	b[104] = s.XattrFilter
}

// Unmarshal reads s from the first 128 bytes of b.
func (s *ErofsSuper) Unmarshal(b []byte) {
	b = b[:ErofsSuperSize]
	le := binary.LittleEndian
	s.Magic = le.Uint32(b[0:])
	s.Checksum = le.Uint32(b[4:])
	s.FeatureCompat = le.Uint32(b[8:])
	s.BlockBits, s.ExtSlots = b[12], b[13]
	s.RootNid = le.Uint16(b[14:])
	s.Inos = le.Uint64(b[16:])
	s.EpochSec = int64(le.Uint64(b[24:]))
	s.EpochNsec = le.Uint32(b[32:])
	s.Blocks = le.Uint32(b[36:])
	s.MetaBlock = le.Uint32(b[40:])
	s.XattrBlock = le.Uint32(b[44:])
	copy(s.UUID[:], b[48:64])
	copy(s.Label[:], b[64:80])
	s.FeatureIncompat = le.Uint32(b[80:])
	s.Compression = le.Uint16(b[84:])
	s.ExtraDevices = le.Uint16(b[86:])
	s.DevTableSlot = le.Uint16(b[88:])
	s.DirBlockBits, s.XattrPrefixes = b[90], b[91]
	s.XattrPrefixOff = le.Uint32(b[92:])
	s.PackedNid = le.Uint64(b[96:])
	s.XattrFilter = b[104]
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErofsChecksum computes the checksum of block0, the first 4096 bytes of an image: CRC32C without the
// final inversion over bytes 1024 to 4095, with the checksum field taken as zero.
func ErofsChecksum(block0 []byte) uint32 {
	const sum = ErofsSuperOff + 4
	var zero [4]byte
	c := crc32.Update(0, castagnoli, block0[ErofsSuperOff:sum])
	c = crc32.Update(c, castagnoli, zero[:])
	return ^crc32.Update(c, castagnoli, block0[sum+4:4096])
}

// ErofsInode is an inode of either size. A compact inode has no Mtime: its time is the superblock's.
type ErofsInode struct {
	Extended   bool
	Layout     uint8  // bits 1-3 of i_format
	XattrCount uint16 // see ErofsXattrBytes
	Mode       uint16
	Nlink      uint32
	Size       uint64
	// Union is the first block of the data (block address from the image start), or the device number in the
	// encoding of ErofsEncodeDev.
	Union     uint32
	Ino       uint32 // a number for 32-bit stat; in a dual image the DAXFS inode number where there is one
	UID, GID  uint32
	MtimeSec  int64
	MtimeNsec uint32
	// Format is the whole i_format field, set by Unmarshal only: bits above 3 must be zero.
	Format uint16
}

// ErofsInodeExtended tells from the first two bytes of an inode whether it takes 64 bytes.
func ErofsInodeExtended(b []byte) bool { return b[0]&1 != 0 }

// HeaderSize returns the size of the inode in bytes, without xattrs.
func (i *ErofsInode) HeaderSize() int {
	if i.Extended {
		return ErofsExtendedSize
	}
	return ErofsCompactSize
}

// Marshal writes HeaderSize bytes to b.
func (i *ErofsInode) Marshal(b []byte) {
	le := binary.LittleEndian
	if !i.Extended {
		b = b[:ErofsCompactSize]
		le.PutUint16(b[0:], uint16(i.Layout)<<1)
		le.PutUint16(b[2:], i.XattrCount)
		le.PutUint16(b[4:], i.Mode)
		le.PutUint16(b[6:], uint16(i.Nlink))
		le.PutUint32(b[8:], uint32(i.Size))
		le.PutUint32(b[12:], 0) // newer kernels: seconds after the epoch
		le.PutUint32(b[16:], i.Union)
		le.PutUint32(b[20:], i.Ino)
		le.PutUint16(b[24:], uint16(i.UID))
		le.PutUint16(b[26:], uint16(i.GID))
		le.PutUint32(b[28:], 0)
		return
	}
	b = b[:ErofsExtendedSize]
	le.PutUint16(b[0:], uint16(i.Layout)<<1|1)
	le.PutUint16(b[2:], i.XattrCount)
	le.PutUint16(b[4:], i.Mode)
	le.PutUint16(b[6:], 0)
	le.PutUint64(b[8:], i.Size)
	le.PutUint32(b[16:], i.Union)
	le.PutUint32(b[20:], i.Ino)
	le.PutUint32(b[24:], i.UID)
	le.PutUint32(b[28:], i.GID)
	le.PutUint64(b[32:], uint64(i.MtimeSec))
	le.PutUint32(b[40:], i.MtimeNsec)
	le.PutUint32(b[44:], i.Nlink)
	clear(b[48:])
}

// Unmarshal reads an inode of either size. b holds at least 32 bytes, 64 if ErofsInodeExtended(b).
func (i *ErofsInode) Unmarshal(b []byte) {
	le := binary.LittleEndian
	f := le.Uint16(b)
	*i = ErofsInode{
		Extended: f&1 != 0, Layout: uint8(f >> 1 & 7), Format: f,
		XattrCount: le.Uint16(b[2:]), Mode: le.Uint16(b[4:]),
		Union: le.Uint32(b[16:]), Ino: le.Uint32(b[20:]),
	}
	if !i.Extended {
		i.Nlink = uint32(le.Uint16(b[6:]))
		i.Size = uint64(le.Uint32(b[8:]))
		i.UID, i.GID = uint32(le.Uint16(b[24:])), uint32(le.Uint16(b[26:]))
		return
	}
	b = b[:ErofsExtendedSize]
	i.Size = le.Uint64(b[8:])
	i.UID, i.GID = le.Uint32(b[24:]), le.Uint32(b[28:])
	i.MtimeSec = int64(le.Uint64(b[32:]))
	i.MtimeNsec = le.Uint32(b[40:])
	i.Nlink = le.Uint32(b[44:])
}

// ErofsXattrBytes returns the size of header, ids and inline entries behind an inode with XattrCount n.
func ErofsXattrBytes(n uint16) int {
	if n == 0 {
		return 0
	}
	return ErofsXattrHdrSize + ErofsXattrIDSize*(int(n)-1)
}

// ErofsEncodeDev packs a device number like the kernel's new_encode_dev: 12 bits of major, 20 of minor.
func ErofsEncodeDev(major, minor uint32) uint32 {
	return minor&0xff | major<<8 | minor&^0xff<<12
}

// ErofsDecodeDev is the inverse of ErofsEncodeDev.
func ErofsDecodeDev(d uint32) (major, minor uint32) {
	return d >> 8 & 0xfff, d&0xff | d>>12&0xfff00
}

// ErofsDirent is the fixed part of a directory entry. A directory block holds all entries, then their names in
// the same order without separators. NameOff counts from the start of the block, so the first NameOff gives
// the number of entries. A name ends where the next one begins; the last ends at a NUL or with the block.
type ErofsDirent struct {
	Nid     uint64 // 0
	NameOff uint16 // 8
	Type    uint8  // 10
	// 11 is reserved.
}

// Marshal writes 12 bytes to b.
func (d *ErofsDirent) Marshal(b []byte) {
	b = b[:ErofsDirentSize]
	binary.LittleEndian.PutUint64(b, d.Nid)
	binary.LittleEndian.PutUint16(b[8:], d.NameOff)
	b[10], b[11] = d.Type, 0
}

// Unmarshal reads d from the first 12 bytes of b.
func (d *ErofsDirent) Unmarshal(b []byte) {
	b = b[:ErofsDirentSize]
	d.Nid = binary.LittleEndian.Uint64(b)
	d.NameOff = binary.LittleEndian.Uint16(b[8:])
	d.Type = b[10]
}

// ErofsXattrHeader precedes the xattrs of an inode: 12 bytes, then Shared ids of 4 bytes, then inline entries.
type ErofsXattrHeader struct {
	Filter uint32 // 0, zero: no name filter
	Shared uint8  // 4, number of shared ids
	// 5..11 are reserved.
}

// Marshal writes 12 bytes to b.
func (h *ErofsXattrHeader) Marshal(b []byte) {
	b = b[:ErofsXattrHdrSize]
	clear(b)
	binary.LittleEndian.PutUint32(b, h.Filter)
	b[4] = h.Shared
}

// Unmarshal reads h from the first 12 bytes of b.
func (h *ErofsXattrHeader) Unmarshal(b []byte) {
	b = b[:ErofsXattrHdrSize]
	h.Filter = binary.LittleEndian.Uint32(b)
	h.Shared = b[4]
}

// ErofsXattrEntry is the header of one xattr, inline or shared: 4 bytes, then the name without its prefix, then the
// value, then zeros up to a multiple of 4.
type ErofsXattrEntry struct {
	NameLen  uint8  // 0
	Index    uint8  // 1, name index
	ValueLen uint16 // 2
}

// Size returns the size of the entry in bytes, with name, value and padding.
func (e *ErofsXattrEntry) Size() int {
	return (ErofsXattrEntSize + int(e.NameLen) + int(e.ValueLen) + 3) &^ 3
}

// Marshal writes 4 bytes to b.
func (e *ErofsXattrEntry) Marshal(b []byte) {
	b = b[:ErofsXattrEntSize]
	b[0], b[1] = e.NameLen, e.Index
	binary.LittleEndian.PutUint16(b[2:], e.ValueLen)
}

// Unmarshal reads e from the first 4 bytes of b.
func (e *ErofsXattrEntry) Unmarshal(b []byte) {
	b = b[:ErofsXattrEntSize]
	e.NameLen, e.Index = b[0], b[1]
	e.ValueLen = binary.LittleEndian.Uint16(b[2:])
}

// PutErofsXattrID writes the id of a shared xattr to the first 4 bytes of b. The id is the entry's
// offset from the shared xattr block in units of 4 bytes.
func PutErofsXattrID(b []byte, id uint32) { binary.LittleEndian.PutUint32(b, id) }

// ErofsXattrID reads the id of a shared xattr from the first 4 bytes of b.
func ErofsXattrID(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
