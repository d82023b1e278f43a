package packages

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

const debianPackages = "systemd,systemd-sysv,dbus,runc,make,ca-certificates"

// builds are the parts of the tests that need the network.
var builds = []stack.Build{makeRoots, makeDists}

func TestMain(m *testing.M) { os.Exit(stack.Main(m, builds...)) }

// makeRoots makes the missing roots of clean systems in the cache, as archives.
func makeRoots(cache string) error {
	mirror, err := exec.Command("sh", "-c", `apt-get indextargets \
			--format '$(CREATED_BY) $(LABEL) $(COMPONENT) $(REPO_URI)' |
		awk '/^Packages Debian main / {print $4; exit}'`).Output()
	if err != nil || len(mirror) == 0 {
		return fmt.Errorf("apt has no mirror of Debian's packages (%w)", err)
	}
	if err := os.MkdirAll(filepath.Join(cache, "roots"), 0o755); err != nil {
		return err
	}
	for _, suite := range suites {
		file := rootFile(cache, suite)
		if _, err := os.Stat(file); err == nil {
			continue
		}
		temp := strings.TrimSuffix(file, ".tar") + ".new.tar"
		cmd := exec.Command("mmdebstrap", "--quiet", "--variant=minbase", "--include="+debianPackages, suite, temp,
			strings.TrimSpace(string(mirror)))
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("make a root of %s: %w\n%s", suite, err, out)
		}
		if err := os.Rename(temp, file); err != nil {
			return err
		}
	}
	return nil
}

func rootFile(cache, suite string) string { return filepath.Join(cache, "roots", suite+".tar") }

// makeDists makes the packages of all versions.
func makeDists(cache string) error {
	var errs []error
	for _, version := range packageVersions {
		errs = append(errs, makeDist("../..", version, distDir(cache, version)))
	}
	return errors.Join(errs...)
}

func distDir(cache, version string) string { return filepath.Join(cache, "dist", version) }

// dist returns the only file of a version that matches a pattern.
func dist(t *testing.T, version, pattern string) string {
	t.Helper()
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(distDir(cache, version), pattern))
	if err != nil || len(files) != 1 {
		t.Fatalf("files %q of version %s: %q, %v", pattern, version, files, err)
	}
	return files[0]
}
