package stack

import (
	"fmt"
	"os"
)

// Outermost tells whether this process is the one that was started by hand: Main and Isolated start two more of the same
// program. What is to be said once is said here.
func Outermost() bool { return os.Getenv(stageEnv) == "" }

// Versions says what the cache gets from elsewhere.
func Versions() string {
	return fmt.Sprintf("containerd %s with its shim and ctr, nerdctl %s, CNI plugins %s", containerdVersion,
		nerdctlVersion, cniVersion)
}
