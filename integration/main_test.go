package integration

import (
	"os"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

func TestMain(m *testing.M) {
	os.Exit(stack.Main(m, stack.BuildGVisor, stack.BuildDistribution, stack.BuildPodman))
}
