package main

import (
	"path/filepath"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// variant is one way to unpack images and to start containers from them.
type variant struct {
	name        string
	snapshotter string
	options     stack.Options
}

// The name of what the others are held against, and those of what has goals.
const (
	overlay = "overlayfs"
	erofs   = "erofs"
	file    = "daxfs"
	tmpfs   = "daxfs-tmpfs"
	walking = "daxfs-walking"
)

// tmpfsPool is on the private /run of the stack.
const tmpfsPool = "/run/daxfs-bench.pool"

// unpacks is how many layers containerd unpacks at once, as the documentation of daxfs configures it.
const unpacks = 3

// erofsConfig ties containerd's erofs snapshotter to its own differ.
const erofsConfig = `
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "erofs"
  differ = "erofs"
`

// variants lists what is compared. mkfs is a directory with a mkfs.erofs that containerd's differ takes.
func variants(mkfs string) []*variant {
	return []*variant{
		{overlay, "overlayfs", stack.Options{}},
		{erofs, "erofs", stack.Options{Containerd: erofsConfig, Path: mkfs}},
		{overlay + "-3", "overlayfs", stack.Options{ParallelUnpacks: unpacks}},
		{
			erofs + "-3", "erofs",
			stack.Options{Containerd: erofsConfig, Path: mkfs, ParallelUnpacks: unpacks},
		},
		{file, "daxfs", stack.Options{Mode: stack.Streaming, ParallelUnpacks: unpacks}},
		{
			tmpfs, "daxfs", stack.Options{
				Mode: stack.Streaming, ParallelUnpacks: unpacks,
				Config: "[pool]\nkind = \"tmpfs\"\npath = \"" + tmpfsPool + "\"\nsize = \"4GiB\"\n",
			},
		},
		{walking, "daxfs", stack.Options{Mode: stack.Walking, ParallelUnpacks: unpacks}},
	}
}

// roots are the directories that hold what a variant keeps of an image.
func (v *variant) roots(s *stack.Stack) []string {
	if v.snapshotter == "daxfs" {
		return []string{s.DaemonRoot()}
	}
	return []string{filepath.Join(s.Dir, "containerd/root/io.containerd.snapshotter.v1."+v.snapshotter)}
}
