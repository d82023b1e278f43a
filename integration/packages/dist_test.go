package packages

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// The installed version and the upgrade.
const (
	oldVersion = "v1.0.0"
	newVersion = "v1.0.1"
)

func makeDist(tree, version, dir string) error {
	cmd := exec.Command("make", "-C", tree, "dist", "VERSION="+version, "COMMIT=0123abc", "DIST="+dir,
		"ARCHITECTURES=amd64",
		"SOURCE_DATE_EPOCH=1700000000")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make dist VERSION=%s: %w\n%s", version, err, out)
	}
	return nil
}

// files returns the file names of make dist for oldVersion.
func files(arch string) []string {
	rpmArch := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[arch]
	number := strings.TrimPrefix(oldVersion, "v")
	return []string{
		"SHA256SUMS",
		fmt.Sprintf("daxfs-snapshotter-%s-1.%s.rpm", number, rpmArch),
		fmt.Sprintf("daxfs-snapshotter-%s-linux-%s.cdx.json", oldVersion, arch),
		fmt.Sprintf("daxfs-snapshotter-%s-oci.tar", oldVersion),
		fmt.Sprintf("daxfs-snapshotter_%s-1_%s.deb", number, arch),
		fmt.Sprintf("daxfs-%s-linux-%s.cdx.json", oldVersion, arch),
		fmt.Sprintf("daxfs-%s-linux-%s.tar.gz", oldVersion, arch),
	}
}

// make dist's output for one architecture is complete, with the right files, modes and configuration files.
func TestDist(t *testing.T) {
	if testing.Short() || os.Getuid() != 0 {
		t.Skip("TestMain makes the packages only as root, and not with -short")
	}
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := distDir(cache, oldVersion)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	want := files("amd64")
	if !slices.Equal(names, want) {
		t.Fatalf("make dist made %q, expected %q", names, want)
	}
	check := exec.Command("sha256sum", "--check", "--strict", "SHA256SUMS")
	check.Dir = dir
	if out, err := check.CombinedOutput(); err != nil || strings.Count(string(out), ": OK\n") != len(want)-1 {
		t.Errorf("sha256sum --check: %v\n%s", err, out)
	}
	checkDeb(t, filepath.Join(dir, want[4]))
	checkImage(t, filepath.Join(dir, want[3]))
}

// checkDeb checks the contents of a package with dpkg-deb.
func checkDeb(t *testing.T, file string) {
	t.Helper()
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		t.Skip("no dpkg-deb: this is no Debian")
	}
	out, err := exec.Command("sh", "-e", "-c", `dpkg-deb --contents "$0" | awk '{print $1, $2, $6}'
		dpkg-deb --field "$0" Package Version Architecture; dpkg-deb --info "$0" conffiles`, file).CombinedOutput()
	if err != nil {
		t.Fatalf("dpkg-deb: %v\n%s", err, out)
	}
	lines := strings.Split(string(out), "\n")
	for _, line := range []string{
		"-rwxr-xr-x root/root ./usr/bin/daxfs", "-rwxr-xr-x root/root ./usr/bin/daxfs-snapshotter",
		"-rw-r--r-- root/root ./usr/lib/systemd/system/daxfs-snapshotter.service",
		"-rw-r--r-- root/root ./usr/lib/systemd/system/daxfs-snapshotter.socket",
		"-rw-r--r-- root/root ./usr/share/man/man1/daxfs.1.gz",
		"-rw-r--r-- root/root ./usr/share/man/man8/daxfs-snapshotter.8.gz",
		"-rw-r--r-- root/root ./usr/share/daxfs/containerd/v3.toml",
		"-rw-r--r-- root/root ./usr/share/daxfs/containerd/v4.toml",
		"-rw-r--r-- root/root ./usr/share/bash-completion/completions/daxfs",
		"-rw-r--r-- root/root ./usr/share/doc/daxfs-snapshotter/copyright",
		"-rw-r--r-- root/root ./etc/daxfs-snapshotter/config.toml",
		"Package: daxfs-snapshotter", "Version: 1.0.0-1", "Architecture: amd64", "/etc/daxfs-snapshotter/config.toml",
	} {
		if !slices.Contains(lines, line) {
			t.Errorf("the package has no line %q", line)
		}
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
}

// checkImage reads an OCI archive without a library: every blob is named by its digest, and one image is for amd64.
func checkImage(t *testing.T, file string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	blobs := map[string]string{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if name, ok := strings.CutPrefix(h.Name, "blobs/sha256/"); ok {
			hash, _, err := v1.SHA256(strings.NewReader(string(body)))
			if err != nil || hash.Hex != name {
				t.Errorf("blob %s has the digest %s, %v", name, hash.Hex, err)
			}
		}
		blobs[h.Name] = string(body)
	}
	if !strings.Contains(blobs["oci-layout"], `"imageLayoutVersion"`) ||
		!strings.Contains(blobs["index.json"], oldVersion) {
		t.Errorf("oci-layout is %q, index.json is %q", blobs["oci-layout"], blobs["index.json"])
	}
	// The index, the manifest, the configuration and the layer.
	if len(blobs) != 6 {
		t.Errorf("%d files, expected oci-layout, index.json and 4 blobs", len(blobs))
	}
}
