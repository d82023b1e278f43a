package stack

import (
	"fmt"

	"github.com/daxfs/daxfs-snapshotter/internal/testns"
)

// Outermost reports whether this is the process that the user started: Main and Isolated start two
// more of the same program. Print here what should appear once.
func Outermost() bool { return testns.Outside() }

// Versions describes the third-party programs in the cache.
func Versions() string {
	return fmt.Sprintf("containerd %s with its shim and ctr, nerdctl %s, CNI plugins %s", containerdVersion,
		nerdctlVersion, cniVersion)
}
