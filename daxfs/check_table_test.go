package daxfs_test

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// corruption is one fault of an image, with the rule that it breaks and others that the same bytes break.
type corruption struct {
	name string
	rule daxfs.Rule
	also string // other rule ids
	edit func(*surgeon)
}

// corrupt applies the corruption of that name.
func (s *surgeon) corrupt(name string) {
	i := slices.IndexFunc(corruptions, func(c corruption) bool { return c.name == name })
	if i < 0 {
		s.t.Fatalf("there is no corruption %q", name)
	}
	corruptions[i].edit(s)
}

// corruptions is the table of TestCheckCorrupt. It contains every rule.
var corruptions = []corruption{
	// The image as a whole.
	{"not whole blocks", daxfs.RuleImageSize, "super-blocks v8-overlay v8-size", func(s *surgeon) { s.cut = 100 }},
	{"smaller than a block", daxfs.RuleImageSize, "", func(s *surgeon) { s.cut = len(s.b) - 4095 }},
	{"empty", daxfs.RuleImageSize, "", func(s *surgeon) { s.cut = len(s.b) }},

	// The superblock of the EROFS half.
	{"no magic", daxfs.RuleMagic, "", func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.Magic++ }) }},
	{
		"blocks of 512 bytes", daxfs.RuleBlockSize, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.BlockBits = 9 }) },
	},
	{
		"blocks of 2^255 bytes", daxfs.RuleBlockSize, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.BlockBits = 255 }) },
	},
	{
		"chunked files", daxfs.RuleFeature, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.FeatureIncompat = 4 }) },
	},
	{
		"unknown incompatible feature", daxfs.RuleFeature, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.FeatureIncompat = 1 << 31 }) },
	},
	{
		"unused incompatible feature", daxfs.RuleFeature, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.FeatureIncompat = 1 }) },
	},
	{
		"xattr filter", daxfs.RuleFeature, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.FeatureCompat |= 4 }) },
	},
	{
		"extra device", daxfs.RuleFeature, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.ExtraDevices = 1 }) },
	},
	{
		"large directory blocks", daxfs.RuleFeature, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.DirBlockBits = 1 }) },
	},
	{"wrong checksum", daxfs.RuleChecksum, "", func(s *surgeon) {
		s.super(func(d *disk.ErofsSuper) { d.Checksum ^= 1 })
		s.keepSum = true
	}},
	{"no checksum", daxfs.RuleChecksum, "", func(s *surgeon) {
		s.super(func(d *disk.ErofsSuper) { d.FeatureCompat &^= disk.ErofsCompatChecksum })
	}},
	{"too many blocks", daxfs.RuleBlocks, "", func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.Blocks++ }) }},
	{"too few blocks", daxfs.RuleBlocks, "", func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.Blocks-- }) }},
	{
		"metadata after the end", daxfs.RuleAreas, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.MetaBlock = 1<<32 - 1 }) },
	},
	{
		"xattrs after the end", daxfs.RuleAreas, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.XattrBlock = d.Blocks }) },
	},
	{
		"extension slots", daxfs.RuleReserved, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.ExtSlots = 1 }) },
	},
	{
		"packed inode", daxfs.RuleReserved, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.PackedNid = 40 }) },
	},
	{"something behind the superblock", daxfs.RuleReserved, "", func(s *surgeon) { s.b[disk.ErofsSuperOff+127] = 1 }},
	{"something at the end of block 0", daxfs.RuleReserved, "", func(s *surgeon) { s.b[4095] = 1 }},
	{"something between the superblocks", daxfs.RuleReserved, "", func(s *surgeon) { s.b[112] = 1 }},
	{"no UUID", daxfs.RuleUUID, "", func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.UUID = [16]byte{} }) }},
	{"one inode more", daxfs.RuleInodes, "", func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.Inos++ }) }},
	{
		"absurd number of inodes", daxfs.RuleInodes, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.Inos = 1 << 63 }) },
	},
	{"label without a NUL", daxfs.RuleLabel, "", func(s *surgeon) {
		s.super(func(d *disk.ErofsSuper) { copy(d.Label[:], "sixteen letters!") })
	}},
	{"label with more behind its end", daxfs.RuleLabel, "", func(s *surgeon) {
		s.super(func(d *disk.ErofsSuper) { d.Label[15] = 'x' })
	}},
	{"root is a file", daxfs.RuleRoot, "", func(s *surgeon) {
		nid := s.lookup("one").Nid
		s.super(func(d *disk.ErofsSuper) { d.RootNid = uint16(nid) })
	}},
	{
		"epoch of more than 1e9 ns", daxfs.RuleTime, "",
		func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.EpochNsec = 1e9 }) },
	},

	// Inodes of the EROFS half.
	{"inode after the end", daxfs.RuleNid, "", func(s *surgeon) {
		s.dirent("dir", "x", func(d *disk.ErofsDirent) { d.Nid = 1 << 40 })
	}},
	{"inode 0", daxfs.RuleNid, "", func(s *surgeon) {
		copy(s.b[s.meta():], s.raw("many/entry-200")[:disk.ErofsCompactSize])
		s.dirent("many", "entry-200", func(d *disk.ErofsDirent) { d.Nid = 0 })
	}},
	{"inode number that overflows", daxfs.RuleNid, "", func(s *surgeon) {
		s.dirent("dir", "x", func(d *disk.ErofsDirent) { d.Nid = 1<<64 - 1 })
	}},
	{"unknown inode format", daxfs.RuleInodeFormat, "", func(s *surgeon) { s.raw("one")[1] = 1 }},
	{"reserved bytes of an extended inode", daxfs.RuleInodeFormat, "", func(s *surgeon) { s.raw("one")[63] = 1 }},
	{
		"reserved bytes of a compact inode", daxfs.RuleInodeFormat, "",
		func(s *surgeon) { s.raw("many/entry-200")[12] = 1 },
	},
	{
		"no file type", daxfs.RuleMode, "",
		func(s *surgeon) { s.inode("dir/x", func(i *disk.ErofsInode) { i.Mode &= 0o7777 }) },
	},
	{
		"owner that stands for none", daxfs.RuleOwner, "halves-owner",
		func(s *surgeon) { s.inode("dir/x", func(i *disk.ErofsInode) { i.UID = 1<<32 - 1 }) },
	},
	{
		"time of more than 1e9 ns", daxfs.RuleTime, "",
		func(s *surgeon) { s.inode("dir/x", func(i *disk.ErofsInode) { i.MtimeNsec = 1<<32 - 1 }) },
	},
	{
		"size of more than the image", daxfs.RuleInodeSize, "",
		func(s *surgeon) { s.inode("dir/x", func(i *disk.ErofsInode) { i.Size = 1 << 40 }) },
	},
	{
		"negative size", daxfs.RuleInodeSize, "",
		func(s *surgeon) { s.inode("dir/x", func(i *disk.ErofsInode) { i.Size = 1<<64 - 1 }) },
	},
	{
		"device with a size", daxfs.RuleInodeSize, "",
		func(s *surgeon) { s.inode("null", func(i *disk.ErofsInode) { i.Size = 1 }) },
	},
	{
		"compressed file", daxfs.RuleLayout, "",
		func(s *surgeon) { s.inode("dir/x", func(i *disk.ErofsInode) { i.Layout = 3 }) },
	},
	{
		"chunked file", daxfs.RuleLayout, "",
		func(s *surgeon) { s.inode("dir/x", func(i *disk.ErofsInode) { i.Layout = 4 }) },
	},
	{
		"compressed device", daxfs.RuleLayout, "",
		func(s *surgeon) { s.inode("null", func(i *disk.ErofsInode) { i.Layout = 1 }) },
	},
	{
		"chunked fifo", daxfs.RuleLayout, "",
		func(s *surgeon) { s.inode("fifo", func(i *disk.ErofsInode) { i.Layout = 4 }) },
	},
	{
		"inline file", daxfs.RuleLayout, "data-tail halves-data meta-overlap",
		func(s *surgeon) { s.inode("dir/x", func(i *disk.ErofsInode) { i.Layout = 2 }) },
	},
	{
		"inline tail over a block", daxfs.RuleInline, "",
		func(s *surgeon) { s.inode("link", func(i *disk.ErofsInode) { i.Size = 4095 }) },
	},
	{
		"inline target in the next block", daxfs.RuleInline, "halves-target meta-overlap xattr-bounds xattr-name",
		func(s *surgeon) {
			s.inode("link", func(i *disk.ErofsInode) {
				room := 4096 - int(s.meta()+int64(s.lookup("link").Nid)*disk.ErofsSlot)%4096
				i.XattrCount = uint16((room-disk.ErofsCompactSize-disk.ErofsXattrHdrSize)/4 + 1)
			})
		},
	},
	{
		"link count of a file", daxfs.RuleNlink, "halves-nlink",
		func(s *surgeon) { s.inode("one", func(i *disk.ErofsInode) { i.Nlink = 3 }) },
	},
	{
		"link count of a directory", daxfs.RuleNlink, "halves-nlink",
		func(s *surgeon) { s.inode("dir", func(i *disk.ErofsInode) { i.Nlink = 1 }) },
	},
	{
		"link count of a fifo", daxfs.RuleNlink, "",
		func(s *surgeon) { s.inode("fifo", func(i *disk.ErofsInode) { i.Nlink = 0 }) },
	},
	{
		"empty target", daxfs.RuleSymlink, "halves-size",
		func(s *surgeon) { s.inode("link", func(i *disk.ErofsInode) { i.Size = 0 }) },
	},
	{
		"target of a page", daxfs.RuleSymlink, "halves-size meta-overlap",
		func(s *surgeon) { s.inode("long", func(i *disk.ErofsInode) { i.Size = 4096 }) },
	},
	{"NUL in a target", daxfs.RuleSymlink, "v8-symlink", func(s *surgeon) { s.target("link")[1] = 0 }},
	{
		"data after the end", daxfs.RuleDataBounds, "",
		func(s *surgeon) { s.inode("pages", func(i *disk.ErofsInode) { i.Union = 1<<32 - 1 }) },
	},
	{"data ends after the end", daxfs.RuleDataBounds, "", func(s *surgeon) {
		s.inode("pages", func(i *disk.ErofsInode) { i.Union = uint32(len(s.b)/4096 - 2) })
	}},
	{"data after the last block", daxfs.RuleDataBounds, "super-blocks", func(s *surgeon) {
		off := s.lookup("two").Off
		s.super(func(d *disk.ErofsSuper) { d.Blocks = uint32(off / 4096) })
	}},
	{"files that overlap", daxfs.RuleDataOverlap, "data-tail halves-data", func(s *surgeon) {
		s.inode("pages", func(i *disk.ErofsInode) { i.Union++ })
	}},
	{"files of other sizes at one place", daxfs.RuleDataOverlap, "data-tail halves-size", func(s *surgeon) {
		s.inode("same", func(i *disk.ErofsInode) { i.Size-- })
	}},
	{
		"data behind the contents", daxfs.RuleDataTail, "",
		func(s *surgeon) { in := s.lookup("two"); s.b[in.Off+in.Size] = 1 },
	},
	{
		"data at the end of the page", daxfs.RuleDataTail, "",
		func(s *surgeon) { in := s.lookup("pages"); s.b[(in.Off+in.Size+4095)/4096*4096-1] = 1 },
	},
	{"contents in the metadata", daxfs.RuleMetaOverlap, "data-tail halves-data", func(s *surgeon) {
		s.super(func(d *disk.ErofsSuper) { s.inode("two", func(i *disk.ErofsInode) { i.Union = d.MetaBlock }) })
	}},
	{"contents in block 0", daxfs.RuleMetaOverlap, "data-tail halves-data", func(s *surgeon) {
		s.inode("two", func(i *disk.ErofsInode) { i.Union = 0 })
	}},
	{"inode in an xattr", daxfs.RuleMetaOverlap, "", func(s *surgeon) {
		raw := s.raw("dir/x")[:disk.ErofsExtendedSize]
		at := (bytes.Index(s.b, bytes.Repeat([]byte("s"), 300)) + 31) &^ 31
		copy(s.b[at:], raw)
		s.dirent("dir", "x", func(d *disk.ErofsDirent) { d.Nid = uint64(int64(at)-s.meta()) / disk.ErofsSlot })
	}},

	// Directories of the EROFS half.
	{
		"first name at 0", daxfs.RuleDirBlock, "dir-dots halves-names inode-nlink super-inodes",
		func(s *surgeon) { b, _ := s.block("dir", "x"); b[8] = 0 },
	},
	{
		"first name after the block", daxfs.RuleDirBlock, "dir-dots halves-names inode-nlink super-inodes",
		func(s *surgeon) { b, _ := s.block("dir", "x"); b[9] = 0xff },
	},
	{
		"first name not after an entry", daxfs.RuleDirBlock, "dir-dots halves-names inode-nlink super-inodes",
		func(s *surgeon) { b, _ := s.block("dir", "x"); b[8]++ },
	},
	{"name after the block", daxfs.RuleDirBlock, "halves-names super-inodes", func(s *surgeon) {
		s.dirent("dir", "y", func(d *disk.ErofsDirent) { d.NameOff = 5000 })
	}},
	{"names that cross", daxfs.RuleDirBlock, "halves-names inode-nlink super-inodes", func(s *surgeon) {
		s.dirent("dir", "x", func(d *disk.ErofsDirent) { d.NameOff += 10 })
	}},
	{
		"reserved byte of an entry", daxfs.RuleDirBlock, "",
		func(s *surgeon) { b, i := s.block("dir", "x"); b[i*disk.ErofsDirentSize+11] = 1 },
	},
	{
		"slash in a name", daxfs.RuleDirName, "halves-names super-inodes",
		func(s *surgeon) { s.name("many", "entry-100")[4] = '/' },
	},
	{
		"NUL in a name", daxfs.RuleDirName, "halves-names super-inodes",
		func(s *surgeon) { s.name("many", "entry-100")[4] = 0 },
	},
	{"directory of 5 bytes", daxfs.RuleDirBlock, "dir-dots", func(s *surgeon) {
		s.inode("dir/sub2", func(i *disk.ErofsInode) { i.Size = 5 })
	}},
	{"empty last name", daxfs.RuleDirName, "halves-names super-inodes", func(s *surgeon) { s.name("dir", "y")[0] = 0 }},
	{
		"names out of order", daxfs.RuleDirOrder, "halves-names",
		func(s *surgeon) { s.name("many", "entry-100")[8] = '9' + 1 },
	},
	{"one name twice", daxfs.RuleDirOrder, "halves-ino halves-names", func(s *surgeon) { s.name("dir", "y")[0] = 'x' }},
	{"wrong parent", daxfs.RuleDots, "", func(s *surgeon) {
		nid := s.lookup("many").Nid
		s.dirent("dir", "..", func(d *disk.ErofsDirent) { d.Nid = nid })
	}},
	{
		"wrong self", daxfs.RuleDots, "",
		func(s *surgeon) { s.dirent("dir", ".", func(d *disk.ErofsDirent) { d.Nid++ }) },
	},
	{"root has a parent", daxfs.RuleDots, "", func(s *surgeon) {
		nid := s.lookup("many").Nid
		s.dirent(".", "..", func(d *disk.ErofsDirent) { d.Nid = nid })
	}},
	{"no parent", daxfs.RuleDots, "dir-loop", func(s *surgeon) { s.name("dir", "..")[1] = '/' - 1 - 1 }},
	{
		"empty directory without dots", daxfs.RuleDots, "",
		func(s *surgeon) { s.inode("dir/sub2", func(i *disk.ErofsInode) { i.Size = 0 }) },
	},
	{
		"type of an entry", daxfs.RuleDirType, "",
		func(s *surgeon) { s.dirent("dir", "x", func(d *disk.ErofsDirent) { d.Type = disk.ErofsFTDir }) },
	},
	{
		"unknown type of an entry", daxfs.RuleDirType, "",
		func(s *surgeon) { s.dirent("dir", "x", func(d *disk.ErofsDirent) { d.Type = 200 }) },
	},
	{"directory with two names", daxfs.RuleDirLoop, "halves-names inode-nlink super-inodes", func(s *surgeon) {
		nid := s.lookup("dir/sub").Nid
		s.dirent("dir", "sub2", func(d *disk.ErofsDirent) { d.Nid = nid })
	}},
	{"directory below itself", daxfs.RuleDirLoop, "halves-names inode-nlink super-inodes", func(s *surgeon) {
		nid := s.lookup("dir").Nid
		s.dirent("dir", "sub2", func(d *disk.ErofsDirent) { d.Nid = nid })
	}},
	{"root below itself", daxfs.RuleDirLoop, "halves-names inode-nlink super-inodes", func(s *surgeon) {
		nid := s.f.Root()
		s.dirent("dir", "sub2", func(d *disk.ErofsDirent) { d.Nid = nid })
	}},

	// Extended attributes.
	{
		"too few bytes of xattrs", daxfs.RuleXattrBounds, "",
		func(s *surgeon) { s.inode("one", func(i *disk.ErofsInode) { i.XattrCount -= 2 }) },
	},
	{
		"too many bytes of xattrs", daxfs.RuleXattrBounds, "",
		func(s *surgeon) { s.inode("one", func(i *disk.ErofsInode) { i.XattrCount = 65535 }) },
	},
	{"too many shared xattrs", daxfs.RuleXattrBounds, "", func(s *surgeon) { s.xattrs("one")[4] = 255 }},
	{
		"xattr of more than there is", daxfs.RuleXattrBounds, "",
		func(s *surgeon) { binary.LittleEndian.PutUint16(s.xattrs("one")[14:], 65535) },
	},
	{"shared xattr after the end", daxfs.RuleXattrBounds, "", func(s *surgeon) {
		binary.LittleEndian.PutUint32(s.xattrs("many/entry-000")[12:], 1<<32-1)
	}},
	{"xattr header without xattrs", daxfs.RuleXattrBounds, "", func(s *surgeon) {
		s.inode("one", func(i *disk.ErofsInode) { i.XattrCount = 1 })
	}},
	{"xattr filter of an inode", daxfs.RuleXattrBounds, "", func(s *surgeon) { s.xattrs("one")[0] = 1 }},
	{"xattr of another namespace", daxfs.RuleXattrName, "", func(s *surgeon) { s.xattrs("one")[13] = 7 }},
	{"long xattr prefix", daxfs.RuleXattrName, "", func(s *surgeon) { s.xattrs("one")[13] = 0x80 }},
	{"ACL with a name", daxfs.RuleXattrName, "", func(s *surgeon) {
		x := s.xattrs("one")
		x[strings.Index(string(x), "first")-3] = disk.ErofsXattrACLDefault
	}},
	{"NUL in an xattr name", daxfs.RuleXattrName, "", func(s *surgeon) {
		x := s.xattrs("one")
		x[strings.Index(string(x), "first")] = 0
	}},
	{"one xattr twice", daxfs.RuleXattrTwice, "", func(s *surgeon) {
		x := s.xattrs("one")
		copy(x[strings.Index(string(x), "other"):], "first")
	}},
	{"one shared xattr twice", daxfs.RuleXattrTwice, "", func(s *surgeon) {
		x := s.xattrs("many/entry-000")
		copy(x[12:16], x[16:20])
	}},
	{"user xattr of a fifo", daxfs.RuleXattrType, "", func(s *surgeon) {
		x := s.xattrs("fifo")
		x[strings.Index(string(x), "mark")-3] = disk.ErofsXattrUser
	}},
	{"shared user xattr of a fifo", daxfs.RuleXattrType, "dir-type halves-mode", func(s *surgeon) {
		s.inode("many/entry-001", func(i *disk.ErofsInode) { i.Mode = unix.S_IFIFO | i.Mode&0o7777 })
	}},
	{"capabilities of version 1", daxfs.RuleXattrCaps, "", func(s *surgeon) {
		x := s.xattrs("fifo")
		x[strings.Index(string(x), "capability")+len("capability")+3] = 1
	}},
	{"ACL without others", daxfs.RuleXattrACL, "", func(s *surgeon) {
		x := s.xattrs("one")
		copy(x[strings.Index(string(x), "\x20\x00\x01\x00"):], "\x10")
	}},
	{"ACL out of order", daxfs.RuleXattrACL, "", func(s *surgeon) {
		x := s.xattrs("one")
		at := strings.Index(string(x), "\x10\x00\x07\x00")
		x[at], x[at+8] = x[at+8], x[at]
	}},
	{"ACL permission of 4 bits", daxfs.RuleXattrACL, "", func(s *surgeon) {
		x := s.xattrs("one")
		x[strings.Index(string(x), "\x10\x00\x07\x00")+2] = 8
	}},
	{"ACL of another version", daxfs.RuleXattrACL, "", func(s *surgeon) {
		x := s.xattrs("one")
		x[strings.Index(string(x), "\x02\x00\x00\x00\x01\x00")] = 3
	}},
	{"ACL that names no user", daxfs.RuleXattrACL, "", func(s *surgeon) {
		x := s.xattrs("one")
		copy(x[strings.Index(string(x), "\x02\x00\x05\x00")+4:], "\xff\xff\xff\xff")
	}},
	{"ACL whose mask names somebody", daxfs.RuleXattrACL, "", func(s *surgeon) {
		x := s.xattrs("one")
		x[strings.Index(string(x), "\x10\x00\x07\x00")+4] = 0
	}},

	// The superblock of the DAXFS half and the overlay pair.
	{"no DAXFS magic", daxfs.RuleV8Magic, "", func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.Magic++ }) }},
	{
		"format version 7", daxfs.RuleV8Version, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.Version = 7 }) },
	},
	{
		"DAXFS blocks of 64 KiB", daxfs.RuleV8BlockSize, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.BlockSize = 65536 }) },
	},
	{"another size", daxfs.RuleV8Size, "", func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.TotalSize++ }) }},
	{"no base region", daxfs.RuleV8Base, "", func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.BaseOff = 0 }) }},
	{
		"base region after the end", daxfs.RuleV8Base, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.BaseSize = uint64(len(s.b)) }) },
	},
	{
		"base region that overflows", daxfs.RuleV8Base, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.BaseSize = 1<<64 - 4096 }) },
	},
	{
		"base region of half a block", daxfs.RuleV8Base, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.BaseSize -= 64 }) },
	},
	{
		"data offset after the base region", daxfs.RuleV8Base, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.DataOff = d.BaseSize + 1 }) },
	},
	{
		"base region in the overlay", daxfs.RuleV8Overlay, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.BaseSize += 4096 }) },
	},
	{
		"inode table after the end", daxfs.RuleV8Table, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.InodeOff = d.BaseSize }) },
	},
	{
		"inode table that overflows", daxfs.RuleV8Table, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.InodeOff = 1<<64 - 64 }) },
	},
	{
		"absurd number of DAXFS inodes", daxfs.RuleV8Table, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.InodeCount = 1<<32 - 1 }) },
	},
	{
		"no DAXFS inodes", daxfs.RuleV8Table, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.InodeCount = 0 }) },
	},
	{"root inode 0", daxfs.RuleV8Root, "", func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.RootIno = 0 }) }},
	{"root inode is another directory", daxfs.RuleV8Root, "", func(s *surgeon) {
		ino := s.lookupV8("dir").Nid
		s.superV8(func(d *disk.V8Super) { d.RootIno = uint32(ino) })
	}},
	{
		"inode 1 is a file", daxfs.RuleV8Root, "",
		func(s *surgeon) { s.inodeV8(".", func(i *disk.V8Inode) { i.Mode = unix.S_IFREG | 0o755 }) },
	},
	{
		"page cache", daxfs.RuleV8PageCache, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.PCacheOff = 4096 }) },
	},
	{
		"page cache slots", daxfs.RuleV8PageCache, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.PCacheSlots = 4 }) },
	},
	{
		"reserved field", daxfs.RuleV8Reserved, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.Reserved = 1 }) },
	},
	{"reserved bytes of a DAXFS inode", daxfs.RuleV8Reserved, "", func(s *surgeon) { s.rawV8("dir/x")[63] = 1 }},
	{"reserved bytes of a DAXFS entry", daxfs.RuleV8Reserved, "", func(s *surgeon) { s.entryV8("dir", "x")[10] = 1 }},
	{
		"no overlay", daxfs.RuleV8Overlay, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.OverlayOff, d.OverlaySize = 0, 0 }) },
	},
	{
		"overlay after the end", daxfs.RuleV8Overlay, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.OverlayOff += 4096 }) },
	},
	{
		"overlay that overflows", daxfs.RuleV8Overlay, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.OverlayOff = 1<<64 - 4096 }) },
	},
	{
		"overlay of 4 KiB", daxfs.RuleV8Overlay, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.OverlaySize = 4096 }) },
	},
	{
		"three buckets", daxfs.RuleV8Overlay, "",
		func(s *surgeon) { s.superV8(func(d *disk.V8Super) { d.OverlayBkts = 3 }) },
	},
	{
		"no overlay magic", daxfs.RuleV8Overlay, "",
		func(s *surgeon) { s.overlay(func(o *disk.V8Overlay) { o.Magic++ }) },
	},
	{
		"overlay with a pool", daxfs.RuleV8Overlay, "",
		func(s *surgeon) { s.overlay(func(o *disk.V8Overlay) { o.PoolSize = 4096 }) },
	},
	{
		"overlay with a free list", daxfs.RuleV8Overlay, "",
		func(s *surgeon) { s.overlay(func(o *disk.V8Overlay) { o.Free[2] = 0 }) },
	},
	{
		"overlay with a low next inode", daxfs.RuleV8Overlay, "",
		func(s *surgeon) { s.overlay(func(o *disk.V8Overlay) { o.NextIno = 2 }) },
	},
	{"overlay with a bucket", daxfs.RuleV8Overlay, "", func(s *surgeon) { s.overlayBytes()[4096] = 1 }},
	{"overlay header with more", daxfs.RuleV8Overlay, "", func(s *surgeon) { s.overlayBytes()[4095] = 1 }},

	// Inodes of the DAXFS half.
	{
		"slot with another number", daxfs.RuleV8Ino, "",
		func(s *surgeon) { s.inodeV8("dir/x", func(i *disk.V8Inode) { i.Ino++ }) },
	},
	{
		"unused slot", daxfs.RuleV8Mode, "",
		func(s *surgeon) { s.inodeV8("dir/x", func(i *disk.V8Inode) { i.Mode = 0 }) },
	},
	{
		"device", daxfs.RuleV8Mode, "",
		func(s *surgeon) { s.inodeV8("dir/x", func(i *disk.V8Inode) { i.Mode = unix.S_IFCHR | 0o600 }) },
	},
	{
		"fifo", daxfs.RuleV8Mode, "",
		func(s *surgeon) { s.inodeV8("dir/x", func(i *disk.V8Inode) { i.Mode = unix.S_IFIFO | 0o600 }) },
	},
	{
		"mode of more than 16 bits", daxfs.RuleV8Mode, "halves-mode",
		func(s *surgeon) { s.inodeV8("dir/x", func(i *disk.V8Inode) { i.Mode |= 1 << 16 }) },
	},
	{
		"size past the region", daxfs.RuleV8Bounds, "",
		func(s *surgeon) { s.inodeV8("dir/x", func(i *disk.V8Inode) { i.Size = 1 << 40 }) },
	},
	{
		"size that overflows", daxfs.RuleV8Bounds, "",
		func(s *surgeon) { s.inodeV8("dir/x", func(i *disk.V8Inode) { i.Size = 1<<64 - 1 }) },
	},
	{
		"offset past the region", daxfs.RuleV8Bounds, "",
		func(s *surgeon) { s.inodeV8("dir/x", func(i *disk.V8Inode) { i.DataOff = 1<<64 - 4096 }) },
	},
	{"target past the region", daxfs.RuleV8Bounds, "", func(s *surgeon) {
		s.inodeV8("link", func(i *disk.V8Inode) { i.DataOff = s.baseSize() - uint64(i.Size) })
	}},
	{"entries past the region", daxfs.RuleV8Bounds, "", func(s *surgeon) {
		// The size fits in units of 271, but not of 272 bytes.
		s.inodeV8("many", func(i *disk.V8Inode) { i.DataOff = s.baseSize() - i.Size })
	}},
	{
		"data between pages", daxfs.RuleV8Align, "data-overlap halves-data",
		func(s *surgeon) { s.inodeV8("dir/x", func(i *disk.V8Inode) { i.DataOff += 64 }) },
	},
	{
		"DAXFS link count of a file", daxfs.RuleV8Nlink, "halves-nlink",
		func(s *surgeon) { s.inodeV8("one", func(i *disk.V8Inode) { i.Nlink = 1 }) },
	},
	{
		"DAXFS link count of a directory", daxfs.RuleV8Nlink, "halves-nlink",
		func(s *surgeon) { s.inodeV8("dir", func(i *disk.V8Inode) { i.Nlink = 9 }) },
	},
	{
		"empty DAXFS target", daxfs.RuleV8Symlink, "",
		func(s *surgeon) { s.inodeV8("link", func(i *disk.V8Inode) { i.Size = 0 }) },
	},
	{
		"DAXFS target of a page", daxfs.RuleV8Symlink, "",
		func(s *surgeon) { s.inodeV8("long", func(i *disk.V8Inode) { i.Size = 4096 }) },
	},
	{
		"DAXFS target without NUL", daxfs.RuleV8Symlink, "halves-size meta-overlap",
		func(s *surgeon) { s.inodeV8("link", func(i *disk.V8Inode) { i.Size = 2 }) },
	},
	{"NUL behind a DAXFS target", daxfs.RuleV8Symlink, "", func(s *surgeon) {
		in := s.lookupV8("link")
		s.b[in.Off+in.Size] = 'x'
	}},

	// Directories of the DAXFS half.
	{
		"size that counts 272", daxfs.RuleV8DirSize, "",
		func(s *surgeon) { s.inodeV8("dir", func(i *disk.V8Inode) { i.Size = i.Size / 271 * 272 }) },
	},
	{"entries at the end of the image", daxfs.RuleV8DirSlack, "meta-overlap v8-overlay", func(s *surgeon) {
		// A base region up to the end of the image, with a directory at its end.
		in := s.lookupV8("dir")
		n := in.Size / disk.V8DirentUnit * disk.V8DirentSize
		copy(s.b[int64(len(s.b))-n:], s.b[in.Off:in.Off+n])
		s.superV8(func(d *disk.V8Super) { d.BaseSize = uint64(len(s.b)) - d.BaseOff })
		s.inodeV8("dir", func(i *disk.V8Inode) { i.DataOff = s.baseSize() - uint64(n) })
	}},
	{
		"slash in a DAXFS name", daxfs.RuleV8DirName, "halves-names",
		func(s *surgeon) { s.entryV8("dir", "x")[16] = '/' },
	},
	{"NUL in a DAXFS name", daxfs.RuleV8DirName, "halves-names", func(s *surgeon) { s.entryV8("dir", "x")[16] = 0 }},
	{"dot as a DAXFS name", daxfs.RuleV8DirName, "halves-names", func(s *surgeon) { s.entryV8("dir", "x")[16] = '.' }},
	{"two dots as a DAXFS name", daxfs.RuleV8DirName, "halves-names", func(s *surgeon) {
		s.direntV8("dir", "x", func(d *disk.V8Dirent) { d.NameLen = 2 })
		copy(s.entryV8("dir", "x\x00")[16:], "..")
	}},
	{
		"empty DAXFS name", daxfs.RuleV8DirName, "halves-names",
		func(s *surgeon) { s.direntV8("dir", "x", func(d *disk.V8Dirent) { d.NameLen = 0 }) },
	},
	{
		"DAXFS name of 256 bytes", daxfs.RuleV8DirName, "halves-names",
		func(s *surgeon) { s.direntV8("dir", "x", func(d *disk.V8Dirent) { d.NameLen = 256 }) },
	},
	{
		"one DAXFS name twice", daxfs.RuleV8DirTwice, "halves-data halves-ino halves-names",
		func(s *surgeon) { s.entryV8("dir", "x")[16] = 'y' },
	},
	{
		"entry without inode", daxfs.RuleV8DirIno, "halves-names",
		func(s *surgeon) { s.direntV8("dir", "x", func(d *disk.V8Dirent) { d.Ino = 0 }) },
	},
	{
		"entry with a high inode", daxfs.RuleV8DirIno, "halves-names",
		func(s *surgeon) { s.direntV8("dir", "x", func(d *disk.V8Dirent) { d.Ino = 1<<32 - 1 }) },
	},
	{"type of a DAXFS entry", daxfs.RuleV8DirType, "", func(s *surgeon) {
		s.direntV8("dir", "x", func(d *disk.V8Dirent) { d.Mode = unix.S_IFDIR | 0o755 })
	}},
	{"DAXFS directory with two names", daxfs.RuleV8DirLoop, "halves-ino", func(s *surgeon) {
		ino := s.lookupV8("dir/sub").Nid
		s.direntV8("dir", "sub2", func(d *disk.V8Dirent) { d.Ino = uint32(ino) })
	}},
	{"DAXFS root below itself", daxfs.RuleV8DirLoop, "halves-ino", func(s *surgeon) {
		s.direntV8("dir", "sub2", func(d *disk.V8Dirent) { d.Ino = 1 })
	}},
	{
		"DAXFS directory below itself without a name", daxfs.RuleV8DirLoop, "halves-ino halves-names halves-nlink",
		func(s *surgeon) {
			// The name "dir" leads to an empty directory; the real one lies below itself.
			self, empty := s.lookupV8("dir").Nid, s.lookupV8("dir/sub2").Nid
			s.direntV8("dir", "sub2", func(d *disk.V8Dirent) { d.Ino = uint32(self) })
			s.direntV8(".", "dir", func(d *disk.V8Dirent) { d.Ino = uint32(empty) })
		},
	},
	{"DAXFS directories that overlap", daxfs.RuleMetaOverlap, "halves-names v8-nlink", func(s *surgeon) {
		off := s.lookupV8("many").Off - s.base()
		s.inodeV8("dir/sub", func(i *disk.V8Inode) { i.DataOff = uint64(off) })
	}},

	// Agreement of both halves.
	{"name in the DAXFS half only", daxfs.RuleHalvesNames, "", func(s *surgeon) { s.entryV8("dir", "x")[16] = 'z' }},
	{"name in the EROFS half only", daxfs.RuleHalvesNames, "", func(s *surgeon) {
		// Removing the last entry leaves an orphan in the DAXFS half, which is valid there.
		s.inodeV8("dir", func(i *disk.V8Inode) { i.Size -= disk.V8DirentUnit })
	}},
	{
		"other permissions", daxfs.RuleHalvesMode, "",
		func(s *surgeon) { s.inodeV8("dir/x", func(i *disk.V8Inode) { i.Mode ^= 0o4000 }) },
	},
	{"other type", daxfs.RuleHalvesMode, "meta-overlap v8-dir-type", func(s *surgeon) {
		s.inodeV8("dir/x", func(i *disk.V8Inode) { i.Mode = unix.S_IFLNK | 0o777 })
	}},
	{
		"other owner", daxfs.RuleHalvesOwner, "",
		func(s *surgeon) { s.inodeV8("dir/x", func(i *disk.V8Inode) { i.GID++ }) },
	},
	{
		"other size", daxfs.RuleHalvesSize, "data-overlap",
		func(s *surgeon) { s.inodeV8("dir/x", func(i *disk.V8Inode) { i.Size++ }) },
	},
	{"other target", daxfs.RuleHalvesTarget, "", func(s *surgeon) {
		off := s.lookupV8("link2").Off - s.base()
		s.inodeV8("link", func(i *disk.V8Inode) { i.DataOff = uint64(off) })
	}},
	{"other contents", daxfs.RuleHalvesData, "", func(s *surgeon) {
		off := s.lookupV8("dir/y").Off - s.base()
		s.inodeV8("dir/x", func(i *disk.V8Inode) { i.DataOff = uint64(off) })
	}},
	{
		"other link count", daxfs.RuleHalvesNlink, "v8-nlink",
		func(s *surgeon) { s.inodeV8("dir/x", func(i *disk.V8Inode) { i.Nlink = 2 }) },
	},
	{"other hard links", daxfs.RuleHalvesIno, "halves-data halves-nlink v8-nlink", func(s *surgeon) {
		ino := s.lookupV8("two").Nid
		s.direntV8(".", "hard", func(d *disk.V8Dirent) { d.Ino = uint32(ino) })
	}},
	{
		"other number", daxfs.RuleHalvesIno, "",
		func(s *surgeon) { s.inode("dir/x", func(i *disk.ErofsInode) { i.Ino++ }) },
	},
}
