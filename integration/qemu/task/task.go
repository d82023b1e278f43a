// Package task is what host and guest say to each other: the host gives a Task, the guest an Answer, both as JSON. While it works,
// a guest may ask the host to do something with the pool, which only the host owns: a Request and its Reply.
package task

import "github.com/daxfs/daxfs-snapshotter/pool"

// Files in the directory that host and guest share.
const (
	AnswerFile = "answer.json"
	ReadyFile  = "ready"
	ResumeFile = "resume"
	// RequestFile and ReplyFile are followed by a number that counts from 1.
	RequestFile = "request-"
	ReplyFile   = "reply-"
)

// Task names what the guest does. The tasks are documented at their functions in package main of guest/.
type Task struct {
	Name string
	// Images are the keys of the images in the pool to work on; none means that the memory is one image.
	Images []string
	// Late are keys of images that the host adds when the guest is ready: it has mounted Images and runs their programs.
	Late []string
	// Pause makes the guest wait, with everything mounted and running, until the host resumes it.
	Pause bool
	// Program and arguments are run from the images; it must run until it is killed.
	Program []string
	// File is a path inside the images.
	File string
	// Rounds is how often the guest does something.
	Rounds int
	// Seed makes what the guest does at random another on each machine.
	Seed uint64
	// Module is the path of daxfs.ko in the guest.
	Module string
	// Phys and Size are where the shared memory is, if it is not a block device.
	Phys uint64
	Size int64
	// Lease is a lease region of the guest. With DevDAX the memory becomes the DAX device that it names first.
	Lease  string
	DevDAX bool
	// ImageSize is the size of the image where the memory is one image; the memory may be larger.
	ImageSize int64
}

// Answer is what the guest found. Which fields are set depends on the task.
type Answer struct {
	Error  string
	Kernel string
	// Warnings are what the kernel logged while the task ran and no healthy kernel logs.
	Warnings []string
	Options  []string // of each image's mount
	// Trees is one list per image: a line for each entry.
	Trees [][]string
	// Memory is that of the shared memory: page frame numbers, from the first to one after the last.
	Memory [2]uint64
	// Text are the pages of program text in memory, for each process that was started, in the order of the images.
	Text [][]Page
	// Clean are private clean pages of each process, in KiB.
	Clean []int64
	// Cached is the growth of the page cache, in KiB, while all of an image was read, and Read how much that was.
	Cached, Read []int64
	// Frames are page frame numbers of File, one list for each image.
	Frames [][]uint64
	// Faults are the page faults of reading File through a mapping, one for each image.
	Faults []int64
	// Output is what Program printed, one for each image.
	Output []string
	// Verified counts the files whose contents were compared with their digest.
	Verified int64
	// Flips are the bits of contents that were flipped and found, MetaFlips those of metadata, and Silent those of them
	// that are in bytes which nothing reads.
	Flips, MetaFlips, Silent int
}

// Page is one page of a mapped file.
type Page struct {
	File  string // path inside the image
	Off   int64
	Frame uint64 // number of the page frame
}

// Operations of a Request.
const (
	OpAdd    = "add"    // adds image number Image, and replies its key
	OpRemove = "remove" // removes the image of Key, and replies what is dead in the pool
	OpErase  = "erase"  // erases Dead, and replies those that were
	OpFree   = "free"   // frees Dead
	OpFlip   = "flip"   // flips bit Bit of the byte at Off of the memory
)

// Request is what a guest asks the owner of the pool for.
type Request struct {
	Op    string
	Image int
	Key   string
	Dead  []pool.Dead
	Off   int64
	Bit   int
}

// Reply is what the host answers.
type Reply struct {
	Error string
	Key   string
	Dead  []pool.Dead
}
