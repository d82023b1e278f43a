package daxfs

import "slices"

// Rule is the id of a rule of the image format. docs/format.md explains every rule under its id; ids never
// change their meaning. The prefix "v8-" marks the DAXFS half, "halves-" the agreement of both halves.
type Rule string

// Rules of the image as a whole and of its EROFS half.
const (
	RuleImageSize   Rule = "image-size"
	RuleMagic       Rule = "super-magic"
	RuleBlockSize   Rule = "super-block-size"
	RuleFeature     Rule = "super-feature"
	RuleChecksum    Rule = "super-checksum"
	RuleBlocks      Rule = "super-blocks"
	RuleAreas       Rule = "super-areas"
	RuleReserved    Rule = "super-reserved"
	RuleUUID        Rule = "super-uuid"
	RuleLabel       Rule = "super-label"
	RuleInodes      Rule = "super-inodes"
	RuleRoot        Rule = "super-root"
	RuleNid         Rule = "inode-nid"
	RuleInodeFormat Rule = "inode-format"
	RuleMode        Rule = "inode-mode"
	RuleOwner       Rule = "inode-owner"
	RuleTime        Rule = "inode-time"
	RuleInodeSize   Rule = "inode-size"
	RuleLayout      Rule = "inode-layout"
	RuleInline      Rule = "inode-inline"
	RuleNlink       Rule = "inode-nlink"
	RuleSymlink     Rule = "symlink-target"
	RuleDataBounds  Rule = "data-bounds"
	RuleDataOverlap Rule = "data-overlap"
	RuleDataTail    Rule = "data-tail"
	RuleMetaOverlap Rule = "meta-overlap"
	RuleDirBlock    Rule = "dir-block"
	RuleDirName     Rule = "dir-name"
	RuleDirOrder    Rule = "dir-order"
	RuleDots        Rule = "dir-dots"
	RuleDirType     Rule = "dir-type"
	RuleDirLoop     Rule = "dir-loop"
	RuleDirDepth    Rule = "dir-depth"
	RuleXattrBounds Rule = "xattr-bounds"
	RuleXattrName   Rule = "xattr-name"
	RuleXattrTwice  Rule = "xattr-twice"
	RuleXattrType   Rule = "xattr-type"
	RuleXattrACL    Rule = "xattr-acl"
	RuleXattrCaps   Rule = "xattr-capability"
	RuleXattrList   Rule = "xattr-list"
)

// Rules of the DAXFS half.
const (
	RuleV8Magic     Rule = "v8-magic"
	RuleV8Version   Rule = "v8-version"
	RuleV8BlockSize Rule = "v8-block-size"
	RuleV8Size      Rule = "v8-size"
	RuleV8Base      Rule = "v8-base"
	RuleV8Table     Rule = "v8-table"
	RuleV8Root      Rule = "v8-root"
	RuleV8PageCache Rule = "v8-page-cache"
	RuleV8Reserved  Rule = "v8-reserved"
	RuleV8Overlay   Rule = "v8-overlay"
	RuleV8Ino       Rule = "v8-ino"
	RuleV8Mode      Rule = "v8-mode"
	RuleV8Bounds    Rule = "v8-bounds"
	RuleV8Align     Rule = "v8-align"
	RuleV8Nlink     Rule = "v8-nlink"
	RuleV8Symlink   Rule = "v8-symlink"
	RuleV8DirSize   Rule = "v8-dir-size"
	RuleV8DirSlack  Rule = "v8-dir-slack"
	RuleV8DirName   Rule = "v8-dir-name"
	RuleV8DirTwice  Rule = "v8-dir-twice"
	RuleV8DirIno    Rule = "v8-dir-ino"
	RuleV8DirType   Rule = "v8-dir-type"
	RuleV8DirLoop   Rule = "v8-dir-loop"
	RuleV8DirDepth  Rule = "v8-dir-depth"
)

// Rules about the agreement of both halves.
const (
	RuleHalvesNames  Rule = "halves-names"
	RuleHalvesMode   Rule = "halves-mode"
	RuleHalvesOwner  Rule = "halves-owner"
	RuleHalvesSize   Rule = "halves-size"
	RuleHalvesTarget Rule = "halves-target"
	RuleHalvesData   Rule = "halves-data"
	RuleHalvesNlink  Rule = "halves-nlink"
	RuleHalvesIno    Rule = "halves-ino"
)

// Additional rules of the live tree of a pool.
const (
	RuleLiveSuper  Rule = "live-super"
	RuleLiveSlots  Rule = "live-slots"
	RuleLiveShared Rule = "live-shared"
	RuleLiveDAX    Rule = "live-dax"
)

// Rules that Prove checks in images with a digest table.
const (
	RuleDigestTable Rule = "digest-table"
	RuleDigestRoot  Rule = "digest-root"
	RuleDigestMeta  Rule = "digest-meta"
	RuleDigestData  Rule = "digest-data"
	RuleDigestGap   Rule = "digest-gap"
)

// Rules returns all rules in the order of docs/format.md.
func Rules() []Rule {
	list := make([]Rule, len(meanings))
	for i := range meanings {
		list[i] = meanings[i].rule
	}
	return list
}

// Meaning returns the rule in one line, or "" for an unknown rule.
func (r Rule) Meaning() string {
	if i := slices.IndexFunc(meanings, func(m meaning) bool { return m.rule == r }); i >= 0 {
		return meanings[i].text
	}
	return ""
}

type meaning struct {
	rule Rule
	text string
}

var meanings = []meaning{
	{RuleImageSize, "an image has at least one block, and whole blocks"},
	{RuleMagic, "the EROFS superblock has its magic number"},
	{RuleBlockSize, "EROFS blocks have 4096 bytes"},
	{RuleFeature, "no EROFS feature is used that changes the format"},
	{RuleChecksum, "the EROFS superblock has a correct checksum"},
	{RuleBlocks, "the EROFS superblock counts all blocks of the image"},
	{RuleAreas, "metadata and shared xattrs begin inside of the image"},
	{RuleReserved, "unused bytes of block 0 are zero"},
	{RuleUUID, "the UUID has the form of one derived from contents"},
	{RuleLabel, "a label ends with a NUL"},
	{RuleInodes, "the EROFS superblock counts the inodes that names lead to"},
	{RuleRoot, "the EROFS root is a directory"},
	{RuleNid, "an inode lies inside of the image and of one block"},
	{RuleInodeFormat, "an inode has no format bits and reserved bytes in use"},
	{RuleMode, "an inode has a file type"},
	{RuleOwner, "an owner is a valid id"},
	{RuleTime, "nanoseconds are less than a second"},
	{RuleInodeSize, "a size fits the image and the file type"},
	{RuleLayout, "contents are not compressed or chunked, and only those of directories and links are inline"},
	{RuleInline, "data stored with an inode does not cross a block"},
	{RuleNlink, "a link count is the number of links"},
	{RuleSymlink, "a target has 1 to 4095 bytes without NUL"},
	{RuleDataBounds, "contents lie inside of the image"},
	{RuleDataOverlap, "contents share everything or nothing"},
	{RuleDataTail, "the last page of contents ends with zeros"},
	{RuleMetaOverlap, "metadata overlaps nothing"},
	{RuleDirBlock, "a directory block can be taken apart"},
	{RuleDirName, "a name has 1 to 255 bytes without '/' and NUL"},
	{RuleDirOrder, "names ascend"},
	{RuleDots, "a directory has correct entries . and .."},
	{RuleDirType, "an entry has the type of its inode"},
	{RuleDirLoop, "a directory has one name"},
	{RuleDirDepth, "no path has more than 65,535 bytes"},
	{RuleXattrBounds, "xattrs lie where their inode or the superblock says"},
	{RuleXattrName, "an xattr has a name that Linux serves"},
	{RuleXattrTwice, "an inode has an xattr once"},
	{RuleXattrType, "an xattr is one that Linux returns for the file type"},
	{RuleXattrACL, "a POSIX ACL is one that setxattr takes"},
	{RuleXattrCaps, "capabilities are shown as they are stored"},
	{RuleXattrList, "the names of the xattrs of an inode fit one list"},
	{RuleV8Magic, "the DAXFS superblock has its magic number"},
	{RuleV8Version, "the DAXFS format version is 8"},
	{RuleV8BlockSize, "DAXFS blocks have 4096 bytes"},
	{RuleV8Size, "the DAXFS superblock has the size of the image"},
	{RuleV8Base, "the base region lies inside of the image"},
	{RuleV8Table, "the inode table lies inside of the base region"},
	{RuleV8Root, "inode 1 is the root"},
	{RuleV8PageCache, "there is no page cache region"},
	{RuleV8Reserved, "reserved bytes of the DAXFS half are zero"},
	{RuleV8Overlay, "there is an overlay pair and it is empty"},
	{RuleV8Ino, "a slot of the table holds the inode of its number"},
	{RuleV8Mode, "a slot holds a regular file, directory or symbolic link"},
	{RuleV8Bounds, "contents, entries and targets lie inside of the base region"},
	{RuleV8Align, "contents begin at a page"},
	{RuleV8Nlink, "a DAXFS link count is the number of links"},
	{RuleV8Symlink, "a DAXFS target has 1 to 4095 bytes and then a NUL"},
	{RuleV8DirSize, "the size of a DAXFS directory is 271 for every entry"},
	{RuleV8DirSlack, "DAXFS entries do not end where the image ends"},
	{RuleV8DirName, "a DAXFS name has 1 to 255 bytes without '/' and NUL"},
	{RuleV8DirTwice, "a DAXFS directory has a name once"},
	{RuleV8DirIno, "a DAXFS entry leads to an inode"},
	{RuleV8DirType, "a DAXFS entry has the type of its inode"},
	{RuleV8DirLoop, "a DAXFS directory has one name"},
	{RuleV8DirDepth, "no DAXFS path has more than 65,535 bytes"},
	{RuleHalvesNames, "both halves have the same names"},
	{RuleHalvesMode, "both halves have the same modes"},
	{RuleHalvesOwner, "both halves have the same owners"},
	{RuleHalvesSize, "both halves have the same sizes"},
	{RuleHalvesTarget, "both halves have the same targets"},
	{RuleHalvesData, "both halves have the same contents"},
	{RuleHalvesNlink, "both halves have the same link counts"},
	{RuleHalvesIno, "both halves have the same hard links"},
	{RuleLiveSuper, "the superblock of a live tree matches its geometry"},
	{RuleLiveSlots, "the root of a live tree leads to its slots, and a slot holds an image or nothing"},
	{RuleLiveShared, "images of a live tree share regular files only"},
	{RuleLiveDAX, "with DAX, contents belong to one inode"},
	{RuleDigestTable, "the digest table is complete and belongs to this image"},
	{RuleDigestRoot, "the root hash is the expected one"},
	{RuleDigestMeta, "the metadata has its digest"},
	{RuleDigestData, "contents have their digest"},
	{RuleDigestGap, "gaps between contents are zero"},
}
