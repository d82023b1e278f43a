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
	esgz        bool // pulls the image as eStargz
	pullOnly    bool // differs from another variant in its pulls only
}

// The name of what the others are held against, and those of what has goals.
const (
	overlay = "overlayfs"
	erofs   = "erofs"
	file    = "daxfs"
	tmpfs   = "daxfs-tmpfs"
	walking = "daxfs-walking"
	stargz  = "stargz"
)

// unpacks is how many layers containerd unpacks at once, as the documentation of daxfs configures it.
const unpacks = 3

// erofsConfig ties containerd's erofs snapshotter to its own differ.
const erofsConfig = `
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "erofs"
  differ = "erofs"
`

// variants lists what is compared. cache is what integration/bench/prepare filled.
func variants(cache string) []*variant {
	mkfs := filepath.Join(cache, "erofs") // a mkfs.erofs that containerd's differ takes
	return []*variant{
		{name: overlay, snapshotter: "overlayfs"},
		{name: erofs, snapshotter: "erofs", options: stack.Options{Containerd: erofsConfig, Path: mkfs}},
		{
			name: overlay + "-3", snapshotter: "overlayfs", pullOnly: true,
			options: stack.Options{ParallelUnpacks: unpacks},
		},
		{
			name: erofs + "-3", snapshotter: "erofs", pullOnly: true,
			options: stack.Options{Containerd: erofsConfig, Path: mkfs, ParallelUnpacks: unpacks},
		},
		{
			name: stargz, snapshotter: "stargz", esgz: true,
			options: stack.Options{Containerd: stargzConfig, Peer: []string{stargzProgram(cache), "serve"}},
		},
		{name: file, snapshotter: "daxfs", options: stack.Options{Mode: stack.Streaming, ParallelUnpacks: unpacks}},
		{
			name: tmpfs, snapshotter: "daxfs", options: stack.Options{
				Mode: stack.Streaming, ParallelUnpacks: unpacks,
				Config: "[pool]\nkind = \"tmpfs\"\npath = \"{{run}}/pool\"\nsize = \"4GiB\"\n",
			},
		},
		{name: walking, snapshotter: "daxfs", options: stack.Options{Mode: stack.Walking, ParallelUnpacks: unpacks}},
	}
}

// image is what the variant pulls.
func (v *variant) image(w *workload) packed {
	if v.esgz {
		return w.esgz
	}
	return w.gzip
}

// roots are the directories that hold what a variant keeps of an image.
func (v *variant) roots(s *stack.Stack) []string {
	switch v.snapshotter {
	case "daxfs":
		return []string{s.DaemonRoot()}
	case "stargz":
		return []string{s.PeerRoot()}
	}
	return []string{filepath.Join(s.Dir, "containerd/root/io.containerd.snapshotter.v1."+v.snapshotter)}
}
