package integration

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// make install respects DESTDIR, PREFIX and an existing configuration; make uninstall removes everything else.
func TestInstall(t *testing.T) {
	slow.Skip(t, "builds and installs both programs")
	dest := t.TempDir()
	makeTarget := func(target string, more ...string) {
		t.Helper()
		args := append([]string{
			"-C", "..", target, "DESTDIR=" + dest, "PREFIX=/usr", "VERSION=v1.2.3-test",
			"COMMIT=0123abc",
		}, more...)
		cmd := exec.Command("make", args...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("make %s: %v\n%s", target, err, out)
		}
	}
	makeTarget("build")
	makeTarget("install", "GO=false") // installs existing builds, without Go
	if out, err := exec.Command("make", "-C", "..", "install", "DESTDIR="+dest,
		"FROM=none").CombinedOutput(); err == nil ||
		!strings.Contains(string(out), `run "make build" first`) {
		t.Errorf("make install of programs that are not there: %v\n%s", err, out)
	}
	for file, mode := range map[string]fs.FileMode{
		"usr/bin/daxfs": 0o755, "usr/bin/daxfs-snapshotter": 0o755,
		"usr/lib/systemd/system/daxfs-snapshotter.service": 0o644,
		"usr/lib/systemd/system/daxfs-snapshotter.socket":  0o644,
		"etc/daxfs-snapshotter/config.toml":                0o644,
		"usr/share/man/man1/daxfs.1":                       0o644, "usr/share/man/man8/daxfs-snapshotter.8": 0o644,
		"usr/share/daxfs/containerd/v3.toml": 0o644, "usr/share/daxfs/containerd/cri-runtimeclass.toml": 0o644,
		"usr/share/bash-completion/completions/daxfs": 0o644, "usr/share/zsh/site-functions/_daxfs": 0o644,
		"usr/share/fish/vendor_completions.d/daxfs.fish": 0o644,
	} {
		st, err := os.Stat(filepath.Join(dest, file))
		if err != nil {
			t.Error(err)
		} else if st.Mode() != mode || st.Size() == 0 {
			t.Errorf("%s: %v with %d bytes, expected %v", file, st.Mode(), st.Size(), mode)
		}
	}
	for _, program := range []string{"daxfs", "daxfs-snapshotter"} {
		out, err := exec.Command(filepath.Join(dest, "usr/bin", program), "--version").CombinedOutput()
		if err != nil || string(out) != program+" v1.2.3-test (commit 0123abc)\n" {
			t.Errorf("%s --version: %q, %v", program, out, err)
		}
	}
	config := filepath.Join(dest, "etc/daxfs-snapshotter/config.toml")
	out, err := exec.Command(filepath.Join(dest, "usr/bin/daxfs-snapshotter"), "--config", config, "config",
		"check").CombinedOutput()
	if err != nil {
		t.Errorf("the installed configuration: %v\n%s", err, out)
	}
	unit, err := os.ReadFile(filepath.Join(dest, "usr/lib/systemd/system/daxfs-snapshotter.service"))
	if err != nil || !strings.Contains(string(unit), "\nExecStart=/usr/bin/daxfs-snapshotter\n") {
		t.Errorf("the unit does not start the program that was installed: %v\n%s", err, unit)
	}
	if _, err := exec.LookPath("man"); err != nil {
		t.Log("manual pages are not rendered: no man")
	} else {
		for _, page := range []string{"man1/daxfs.1", "man8/daxfs-snapshotter.8"} {
			cmd := exec.Command("man", "--warnings", "-l", filepath.Join(dest, "usr/share/man", page))
			cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "MANWIDTH=100")
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			if err := cmd.Run(); err != nil || stderr.Len() > 0 || !strings.Contains(stdout.String(), "SYNOPSIS") {
				t.Errorf("man -l %s: %v\n%s", page, err, stderr.String())
			}
		}
	}
	if err := os.WriteFile(config, []byte("# mine\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	makeTarget("install", "GO=false")
	if b, err := os.ReadFile(config); err != nil || string(b) != "# mine\n" {
		t.Errorf("installing again has changed the configuration: %q, %v", b, err)
	}
	makeTarget("uninstall")
	var left []string
	err = filepath.WalkDir(dest, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			left = append(left, strings.TrimPrefix(path, dest))
		}
		return err
	})
	if err != nil || !slices.Equal(left, []string{"/etc/daxfs-snapshotter/config.toml"}) {
		t.Errorf("after uninstalling there are %q, %v", left, err)
	}
}

// systemd accepts the installed unit: it knows every option, and the program is at the unit's path.
func TestUnit(t *testing.T) {
	slow.Skip(t, "builds and installs both programs")
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("no systemd-analyze: Debian's minimal system has no systemd")
	}
	prefix := t.TempDir()
	cmd := exec.Command("make", "-C", "..", "build", "install", "PREFIX="+prefix, "SYSCONFDIR="+prefix+"/etc")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make install: %v\n%s", err, out)
	}
	out, err := exec.Command("systemd-analyze", "verify", "--man=no",
		prefix+"/lib/systemd/system/daxfs-snapshotter.service",
		prefix+"/lib/systemd/system/daxfs-snapshotter.socket").CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}
