// Package task is the protocol between host and guest: the host gives a Task, the guest an Answer,
// both as JSON. While it works, a guest may send Requests about the pool, which only the host owns, and gets a Reply.
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

// Task selects the guest's task. The tasks are documented at their functions in package main of guest/.
type Task struct {
	Name string
	// Images are the keys of the images in the pool; empty means that the memory is one image.
	Images []string
	// Late are keys of images that the host adds after the guest has mounted Images and started their programs.
	Late []string
	// Pause makes the guest wait for the host, with everything mounted and running.
	Pause bool
	// Program is a command that is run from the images; it must run until it is killed.
	Program []string
	// File is a path inside the images.
	File string
	// Rounds is the number of repetitions.
	Rounds int
	// Seed varies the guest's random choices between machines.
	Seed uint64
	// Module is the path of daxfs.ko in the guest.
	Module string
	// Phys and Size locate the shared memory, if it is not a block device.
	Phys uint64
	Size int64
	// Lease is a lease region of the guest. With DevDAX the memory is first made the DAX device of that name.
	Lease  string
	DevDAX bool
	// ImageSize is the size of the image if the memory is one image; the memory may be larger.
	ImageSize int64
}

// Answer is the guest's result. The task decides which fields are set.
type Answer struct {
	Error  string
	Kernel string
	// Warnings are the kernel's log lines during the task that no healthy kernel writes.
	Warnings []string
	Options  []string // of each image's mount
	// Trees has one listing per image.
	Trees [][]string
	// Memory is the shared memory: its first page frame number, and the one after the last.
	Memory [2]uint64
	// Text are the pages of program text in memory, for each started process in the order of the images.
	Text [][]Page
	// Clean is the private clean memory of each process, in KiB.
	Clean []int64
	// Cached is the growth of the page cache from reading an image, and Read the amount read, in KiB.
	Cached, Read []int64
	// Frames are page frame numbers of File, one list for each image.
	Frames [][]uint64
	// Faults counts the page faults of reading File through a mapping, for each image.
	Faults []int64
	// Output is the output of Program, for each image.
	Output []string
	// Verified counts the files whose contents matched their digest.
	Verified int64
	// Flips counts the flipped and found bits of contents, MetaFlips those of metadata, and Silent those
	// of them in bytes that nothing reads.
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
	OpAdd    = "add"    // adds image number Image; the reply has its key
	OpRemove = "remove" // removes the image of Key; the reply has the dead contents of the pool
	OpErase  = "erase"  // erases Dead; the reply has those erased
	OpFree   = "free"   // frees Dead
	OpFlip   = "flip"   // flips bit Bit of the byte at Off of the memory
)

// Request is a guest's request to the owner of the pool.
type Request struct {
	Op    string
	Image int
	Key   string
	Dead  []pool.Dead
	Off   int64
	Bit   int
}

// Reply is the host's reply.
type Reply struct {
	Error string
	Key   string
	Dead  []pool.Dead
}
