package stack

import "path/filepath"

// buildModule builds a program from a package of another module below integration/.
func buildModule(cache, module, pkg, program string) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	return run(goCommand(filepath.Join(root, "integration", module), "build", "-ldflags", "-s -w",
		"-o", filepath.Join(cache, "bin", program), pkg))
}

// BuildPodman builds "podman-compress", which writes layers like podman. For Main.
func BuildPodman(cache string) error {
	return buildModule(cache, "podman", "./compress", "podman-compress")
}
