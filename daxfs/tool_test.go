package daxfs_test

import (
	"os/exec"
	"testing"
)

// runTool runs a program of erofs-utils and returns its output.
func runTool(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("erofs-utils is not installed: %v", err)
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	return string(out), err
}
