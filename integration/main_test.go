package integration

import (
	"fmt"
	"os"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

func TestMain(m *testing.M) {
	if at := os.Getenv(proxiedAt); at != "" {
		fmt.Fprintln(os.Stderr, overlayServer(at))
		os.Exit(1)
	}
	os.Exit(stack.Main(m, stack.BuildGVisor, stack.BuildDistribution, stack.BuildPodman))
}
