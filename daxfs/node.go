package daxfs

// Node is one inode of a tree that is to become an image. Two names of one directory tree that hold the same
// *Node are hard links. A tree is not safe for concurrent use, not even by several plans: planning marks its nodes. A Plan
// made from it keeps no reference to it.
type Node struct {
	// Mode holds the file type (S_IFMT) and the permission bits exactly as stat(2) reports them.
	Mode uint32
	// UID and GID are 32 bit ids; 2^32-1 is refused by Plan because chown(2) reserves it.
	UID, GID uint32
	planned  int32 // 1 + the index in the plan that is being made, else 0
	// Rdev is the device number of a character or block device, in the encoding of unix.Mkdev; else 0.
	Rdev uint64
	// Mtime is the modification time, in seconds and nanoseconds since 1970; before 1970 Sec is negative.
	Mtime Time
	// Xattrs are the extended attributes with full names ("user.x", "security.capability"), each name once,
	// in any order.
	Xattrs []Xattr
	// Target is the target of a symbolic link, 1 to 4095 bytes, no NUL.
	Target string
	// Data says where the bytes of a regular file are, and how many there are.
	Data Data
	// Entries are the children of a directory by name. A directory with none may leave it nil.
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
// Off is an address in the space of whatever stores the contents: bytes from the start of the image file, or
// bytes from the start of the pool. It is a multiple of BlockSize. A file of size 0 has no contents; its Off is
// ignored. The rest of the last block is zero: a direct mapping shows it.
type Data struct {
	Off  int64
	Size int64
	// Sum is the SHA-256 of the contents. Stores share contents of equal Sum and Size, and the UUID of an image covers
	// it: equal trees have equal UUIDs, whatever stores their contents. The sum of a file of size 0 is ignored.
	Sum [32]byte
}

// BlockSize is the size in bytes of a block of either half of an image, and of a page of the memory it is mapped from.
const BlockSize = 4096
