package main

import (
	"path/filepath"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// variant is one way to unpack images and to start containers.
type variant struct {
	name        string
	snapshotter string
	options     stack.Options
	esgz        bool // pulls the image as eStargz
	pullOnly    bool // differs from another variant only in its pulls
}

// The reference, and the variants with goals.
const (
	overlay = "overlayfs"
	erofs   = "erofs"
	file    = "daxfs"
	tmpfs   = "daxfs-tmpfs"
	walking = "daxfs-walking"
	stargz  = "stargz"
)

// unpacks is the number of layers that containerd unpacks at once, as in the documentation of daxfs.
const unpacks = 3

// erofsConfig connects containerd's erofs snapshotter with its own differ.
const erofsConfig = `
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "erofs"
  differ = "erofs"
`

// variants lists the variants. cache is the directory of integration/bench/prepare.
func variants(cache string) []*variant {
	mkfs := filepath.Join(cache, "erofs") // accepted by containerd's differ
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

func (v *variant) image(w *workload) packed {
	if v.esgz {
		return w.esgz
	}
	return w.gzip
}

// roots returns the directories with a variant's data of an image.
func (v *variant) roots(s *stack.Stack) []string {
	switch v.snapshotter {
	case "daxfs":
		return []string{s.DaemonRoot()}
	case "stargz":
		return []string{s.PeerRoot()}
	}
	return []string{filepath.Join(s.Dir, "containerd/root/io.containerd.snapshotter.v1."+v.snapshotter)}
}
