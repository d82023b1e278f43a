package qemu

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// Kernel is a distribution's kernel with its modules.
type Kernel struct {
	Release string
	Image   string // path of the bootable file
	modules string // directory of the modules
}

// FindKernels returns the kernels to test: this machine's or the distribution's from the test cache,
// and a newer one from the cache. DAXFS_TEST_KERNEL=DIR replaces them by one root directory with boot/
// and lib/modules/. The error explains how to get kernels.
func FindKernels() ([]Kernel, error) {
	if root := os.Getenv("DAXFS_TEST_KERNEL"); root != "" {
		k, err := findKernel(root)
		return []Kernel{k}, err
	}
	cache, err := stack.CacheDir()
	if err != nil {
		return nil, err
	}
	own, err := findKernel("/", filepath.Join(cache, "kernel"))
	if err != nil {
		return nil, err
	}
	newer, err := findKernel(filepath.Join(cache, "newer-kernel"))
	return []Kernel{own, newer}, err
}

// findKernel returns the newest kernel, with the modules for the tests, of the first root that has one.
func findKernel(roots ...string) (Kernel, error) {
	for _, root := range roots {
		images, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
		if err != nil {
			return Kernel{}, err
		}
		slices.Reverse(images) // Glob sorts; good enough to prefer the newer of two
		for _, image := range images {
			release := strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
			k := Kernel{Release: release, Image: image, modules: filepath.Join(root, "lib/modules", release)}
			if _, err := k.order("virtio_pmem", "erofs"); err == nil {
				return k, nil
			}
		}
	}
	return Kernel{}, fmt.Errorf("no kernel with modules for virtio-pmem and erofs below %q (run .ci/deps test)", roots)
}

// order lists the files of modules and of their dependencies in load order. It omits modules built
// into the kernel, and checksum if it is not a module; any other missing module is an error.
func (k Kernel) order(names ...string) ([]string, error) {
	needs := map[string][]string{} // by path below k.modules
	byName := map[string]string{}
	err := eachLine(filepath.Join(k.modules, "modules.dep"), func(line string) {
		file, deps, _ := strings.Cut(line, ":")
		needs[file] = strings.Fields(deps)
		byName[moduleName(file)] = file
	})
	if err != nil {
		return nil, err
	}
	builtin := map[string]bool{}
	if err := eachLine(filepath.Join(k.modules, "modules.builtin"),
		func(line string) { builtin[moduleName(line)] = true }); err != nil {
		return nil, err
	}
	var list []string
	var missing []error
	for _, name := range names {
		file, ok := byName[moduleName(name)]
		if !ok {
			if name != checksum && !builtin[moduleName(name)] {
				missing = append(missing, fmt.Errorf("kernel %s has no module %q", k.Release, name))
			}
			continue
		}
		// modules.dep lists all dependencies, in reverse load order.
		for _, f := range append(reversed(needs[file]), file) {
			if !slices.Contains(list, f) {
				list = append(list, f)
			}
		}
	}
	return list, errors.Join(missing...)
}

func reversed(s []string) []string {
	s = slices.Clone(s)
	slices.Reverse(s)
	return s
}

// moduleName returns the name of a module file: without directory and suffixes, with "_" for "-".
func moduleName(file string) string {
	name, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

func eachLine(path string, fn func(string)) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		fn(lines.Text())
	}
	return lines.Err()
}
