package stack

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

const (
	gvisorVersion = "v0.0.0-20260905035102-160fafc42237"
	gvisorModule  = "gvisor.dev/gvisor"
)

// BuildGVisor builds runsc, its shim for containerd, and the program of integration/gvisor/walk. For Main.
func BuildGVisor(cache string) error {
	bin := filepath.Join(cache, "bin")
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	walk := goCommand(filepath.Join(root, "integration/gvisor/walk"), "build", "-o",
		filepath.Join(bin, "gvisor-walk"), ".")
	return errors.Join(run(walk), program{gvisorModule, gvisorVersion, "runsc"}.install(bin), buildGVisorShim(bin))
}

// buildGVisorShim builds containerd-shim-runsc-v1. The shim protects itself from the OOM killer, and
// exits if root has no CAP_SYS_RESOURCE, as in many containers. So this one asks for a value that everybody may set.
func buildGVisorShim(bin string) (err error) {
	stamp := filepath.Join(bin, "containerd-shim-runsc-v1.version")
	if have, err := os.ReadFile(stamp); err == nil && string(have) == gvisorVersion {
		return nil
	}
	dir, err := os.MkdirTemp("", "gvisor-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	tree := filepath.Join(dir, "tree")
	if err := copyModule(tree, gvisorModule, gvisorVersion); err != nil {
		return err
	}
	manager := filepath.Join(tree, "pkg/shim/v1/manager.go")
	source, err := os.ReadFile(manager)
	if err != nil {
		return err
	}
	protected, killable := []byte("oomScoreMax = -999\n"), []byte("oomScoreMax = 0\n")
	if !bytes.Contains(source, protected) {
		return fmt.Errorf("gVisor %s: %q has no %q", gvisorVersion, manager, protected)
	}
	if err := os.WriteFile(manager, bytes.Replace(source, protected, killable, 1), 0o644); err != nil {
		return err
	}
	build := goCommand(tree, "build", "-ldflags", "-s -w", "-o",
		filepath.Join(bin, "containerd-shim-runsc-v1"), "./shim")
	if err := run(build); err != nil {
		return err
	}
	return os.WriteFile(stamp, []byte(gvisorVersion), 0o644)
}
