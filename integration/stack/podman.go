package stack

import "path/filepath"

// buildModule makes a program of a package of another module below integration/.
func buildModule(cache, module, pkg, program string) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	return run(goCommand(filepath.Join(root, "integration", module), "build", "-ldflags", "-s -w",
		"-o", filepath.Join(cache, "bin", program), pkg))
}

// BuildPodman makes "podman-compress", which writes layers as podman does. For Main.
func BuildPodman(cache string) error {
	return buildModule(cache, "podman", "./compress", "podman-compress")
}
