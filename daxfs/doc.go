// Package daxfs writes, reads and checks dual images. A dual image is one file, or one window of
// shared memory, that Linux mounts both as EROFS and, with multikernel's module, as DAXFS version 8,
// over one set of file contents.
//
//	block 0      DAXFS superblock at 0, EROFS superblock at 1024
//	contents     each file in whole pages, contiguous, never compressed
//	metadata     one run of blocks: EROFS inodes and names | DAXFS inodes and names | DAXFS overlay pair
//
// The EROFS half holds a complete Linux tree: nanosecond times, 32-bit owners, extended attributes, devices,
// hard links. The DAXFS half holds files, directories and symbolic links without times and attributes, for
// kernels that reach the memory without a block device. docs/format.md is the normative description.
//
// # Writing
//
// A [Node] tree describes the image and says where the contents already lie. [NewPlan] checks it and
// fixes every inode and every offset, [Plan.Place] positions the metadata, [Plan.WriteTo] writes it:
//
//	plan, err := daxfs.NewPlan(root, daxfs.Options{})
//	end := dataEnd + plan.MetaSize()
//	err = plan.Place(daxfs.Placement{Image: 0, Meta: dataEnd, End: end})
//	err = plan.WriteTo(file)
//
// The same calls serve a pool of shared memory, where many images refer to one set of contents. There
// the metadata comes first: Image is the start of the segment, and the image is the window from there
// to the highest contents.
//
// Equal trees give equal images, byte for byte, independent of machine, date and map order.
//
// # Reading
//
// [Open] reads the EROFS half as an [io/fs.FS], and inode by inode for servers; [OpenDAXFS] reads the other
// half. Neither trusts a byte of the image. [Check] verifies each half and that both show the same tree.
//
// # Caveats
//
// An image must not change while it is mounted or open. Slices of a mapped image belong to the
// mapping: they end with it and are read-only. A Plan belongs to one goroutine at a time; readers are
// safe for concurrent use.
//
// Format promise: every later version of this package reads an image with version 8 in its DAXFS
// superblock and no EROFS feature but the checksum and modification times.
package daxfs
