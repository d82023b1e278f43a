package clientsuite

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// theirs reports whether a control group belongs to a namespace of containerd's tests, or to their shims.
func theirs(name string) bool {
	return strings.HasPrefix(name, "testing") || name == "containerd" || name != "" && strings.Trim(name, "n") == ""
}

// cgroups lists the top control groups of containerd's tests, in every hierarchy of version 1, or in version 2.
func cgroups(t *testing.T) (dirs []string) {
	t.Helper()
	for _, pattern := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup/*/*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range found {
			if theirs(filepath.Base(dir)) {
				dirs = append(dirs, dir)
			}
		}
	}
	return dirs
}

// removeCgroups removes the control groups that did not exist before. The tests' namespaces do not
// contain them, and runc leaves those of a namespace.
func removeCgroups(t *testing.T, before []string) {
	t.Helper()
	for _, dir := range cgroups(t) {
		if slices.Contains(before, dir) {
			continue
		}
		var inner []string
		if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				inner = append(inner, path)
			}
			return err
		}); err != nil && !errors.Is(err, fs.ErrNotExist) { // version 1 has links to hierarchies
			t.Error(err)
		}
		slices.Reverse(inner)
		for _, d := range inner {
			if err := os.Remove(d); err != nil {
				t.Error(err)
			}
		}
	}
}
