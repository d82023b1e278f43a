package daxfs

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
