package stack

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// clientSuite is the directory of the cache that holds containerd's own client tests.
const clientSuite = "clientsuite"

// BuildClientSuite builds the unchanged tests of containerd's integration/client, and their runc. For Main.
func BuildClientSuite(cache string) error {
	runc := program{containerdModule, containerdVersion, "integration/failpoint/cmd/runc-fp"}
	if err := runc.install(filepath.Join(cache, "bin")); err != nil {
		return err
	}
	dir := filepath.Join(cache, clientSuite)
	stamp := filepath.Join(dir, "version")
	if have, err := os.ReadFile(stamp); err == nil && string(have) == containerdVersion {
		return nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	module, err := moduleDir(containerdModule, containerdVersion)
	if err != nil {
		return err
	}
	if err := run(goCommand(module, "test", "-c", "-ldflags", "-s -w", "-o", filepath.Join(dir, "client.test"),
		"./integration/client")); err != nil {
		return err
	}
	if err := os.CopyFS(filepath.Join(dir, "testdata"),
		os.DirFS(filepath.Join(module, "integration/client/testdata"))); err != nil {
		return fmt.Errorf("copy the data of containerd's client tests: %w", err)
	}
	return os.WriteFile(stamp, []byte(containerdVersion), 0o644)
}

// ClientSuite returns the command that runs containerd's client tests, which must be in the cache. The
// tests start and stop their own containerd, in directories of their own, with the configuration and
// the address of the stack's containerd, which must be stopped.
func (s *Stack) ClientSuite(args ...string) (*exec.Cmd, error) {
	// The suite finds containerd on the path, and gives it a configuration without proxy plugins. The
	// suite's other containerds do not test snapshotters; their arguments stay.
	bin := filepath.Join(s.Dir, "suite")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return nil, err
	}
	script := fmt.Sprintf("#!/bin/sh\n"+
		"case \" $* \" in *\" --root /var/lib/containerd-test \"*) set -- \"$@\" --config %q ;; esac\nexec %q \"$@\"\n",
		s.ContainerdConfig(), s.tools.path("containerd"))
	if err := os.WriteFile(filepath.Join(bin, "containerd"), []byte(script), 0o755); err != nil {
		return nil, err
	}
	dir := filepath.Join(s.tools.cache, clientSuite)
	cmd := exec.Command(filepath.Join(dir, "client.test"),
		append([]string{"-address", s.Run + "/containerd.sock"}, args...)...)
	cmd.Dir = dir
	cmd.Env = s.env(bin)
	return cmd, nil
}
