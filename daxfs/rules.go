package daxfs

// Rule is the id of a rule of the image format. docs/format.md explains every rule under its id; ids never change their
// meaning. Those that start with "v8-" are about the DAXFS half, those that start with "halves-" about the agreement of both.
type Rule string

// Rules of the image as a whole and of the EROFS half.
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
	RuleXattrACL    Rule = "xattr-acl"
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

// Rules of the agreement of both halves.
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
