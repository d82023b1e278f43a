package task

import "github.com/daxfs/daxfs-snapshotter/pool"

// LeaseReader is the name under which the task "lease" makes claims.
const LeaseReader = "guest"

var (
	LeasePool  = [16]byte{0xa}
	LeaseImage = pool.Image{Key: "image", Slot: 7, UUID: [16]byte{9}}
)
