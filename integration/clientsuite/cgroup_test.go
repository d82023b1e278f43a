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

// theirs tells whether a control group is named after a namespace of containerd's tests, or for their shims.
func theirs(name string) bool {
	return strings.HasPrefix(name, "testing") || name == "containerd" || name != "" && strings.Trim(name, "n") == ""
}

// cgroups lists the outermost control groups that are theirs, in every hierarchy (version 1) or the only one (version 2).
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

// removeCgroups takes away the control groups that were not there before. The namespaces of the tests do not hold them,
// and runc leaves those of a namespace.
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
