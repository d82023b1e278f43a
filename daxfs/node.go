package daxfs

// Node is one inode of a tree that will become an image. Two names that hold the same *Node are hard
// links. A tree is not safe for concurrent use, not even by several plans: planning marks its nodes.
type Node struct {
	// Mode holds the file type (S_IFMT) and the permission bits exactly as stat(2) reports them.
	Mode uint32
	// UID and GID are 32-bit ids. NewPlan refuses 2^32-1, which chown(2) reserves.
	UID, GID uint32
	planned  int32 // 1 + the index in the current plan, else 0
	// Rdev is the device number of a character or block device in the encoding of unix.Mkdev, else 0.
	Rdev uint64
	// Mtime is the modification time since 1970; before 1970 Sec is negative.
	Mtime Time
	// Xattrs are the extended attributes with full names ("user.x"), each name once, in any order.
	Xattrs []Xattr
	// Target is the target of a symbolic link, 1 to 4095 bytes, no NUL.
	Target string
	// Data gives place and size of the contents of a regular file.
	Data Data
	// Entries are the children of a directory by name. It may be nil for an empty directory.
	Entries map[string]*Node
}

// Time is a point in time as the image stores it. Nsec is 0 to 999,999,999.
type Time struct {
	Sec  int64
	Nsec uint32
}

// Xattr is one extended attribute. Value may be empty.
type Xattr struct {
	Name  string
	Value []byte
}

// Data names the contents of a regular file: Size bytes that lie contiguously at Off.
//
// Off is an address in the space of the store: an offset in the image file or in the pool. It is a
// multiple of BlockSize. The rest of the last block must be zero, because a direct mapping shows it.
// Off is ignored if Size is 0.
type Data struct {
	Off  int64
	Size int64
	// Sum is the SHA-256 of the contents, ignored if Size is 0. Stores share contents of equal Sum and
	// Size. The UUID of an image covers Sum: equal trees have equal UUIDs, whatever stores their contents.
	Sum [32]byte
}

// BlockSize is the size in bytes of a block of either half, and of a page of the mapped memory.
const BlockSize = 4096
