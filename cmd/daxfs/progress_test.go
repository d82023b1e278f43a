package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// pseudoTerminal returns both ends of a terminal with 25 lines of 120 characters.
func pseudoTerminal(t *testing.T) (master, tty *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("needs pseudo terminals: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprint("/dev/pts/", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("needs pseudo terminals: %v", err)
	}
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 25, Col: 120}); err != nil {
		t.Fatal(err)
	}
	return master, tty
}

// terminal returns a terminal and a function that closes it and returns its output.
func terminal(t *testing.T) (*os.File, func() string) {
	t.Helper()
	master, tty := pseudoTerminal(t)
	var seen bytes.Buffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(&seen, master) // ends with EIO when the terminal is closed
	}()
	return tty, func() string {
		tty.Close()
		<-done
		return seen.String()
	}
}

// TestProgressOnTerminal: there is a bar for each layer, also if the conversion fails, and nothing with --quiet.
func TestProgressOnTerminal(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	setup(t, dir)
	for _, c := range []struct {
		args   []string
		status int
		holds  []string
	}{
		{[]string{"oci:layout:v1"}, statusOK, []string{"sha256:", "done"}},
		{[]string{"oci:layout:v2"}, statusFailed, []string{"sha256:", "diff ID mismatch"}},
		{[]string{"oci:nowhere"}, statusFailed, []string{"not an OCI layout"}},
		{[]string{"rootfs:layout"}, statusOK, nil},
		{[]string{"--quiet", "oci:layout:v1"}, statusOK, nil},
	} {
		tty, text := terminal(t)
		args := append([]string{"daxfs", "convert", "-o", "image"}, c.args...)
		got := run(context.Background(), args, strings.NewReader(""), io.Discard, tty)
		seen := text()
		if got != c.status {
			t.Errorf("%q: status %d, expected %d: %s", c.args, got, c.status, seen)
		}
		if c.holds == nil && seen != "" {
			t.Errorf("%q: %q on the terminal, expected nothing", c.args, seen)
		}
		for _, h := range c.holds {
			if !strings.Contains(seen, h) {
				t.Errorf("%q: %q on the terminal, expected %q in it", c.args, seen, h)
			}
		}
	}
}

// TestProgressOnTerminalWithoutSize: the terminal cannot show bars, so there are lines.
func TestProgressOnTerminalWithoutSize(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	setup(t, dir)
	tty, text := terminal(t)
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{}); err != nil {
		t.Fatal(err)
	}
	got := run(context.Background(), []string{"daxfs", "convert", "-o", "image", "oci:layout:v1"},
		strings.NewReader(""), io.Discard, tty)
	if seen := text(); got != statusOK || !strings.Contains(seen, "(2 of 2 layers)") {
		t.Errorf("status %d, %q on the terminal", got, seen)
	}
}

// TestRetriesAreSaid: convert reports that it waits for a registry, with and without bars, but not with --quiet.
func TestRetriesAreSaid(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	l := ocitest.NewLayout(t, filepath.Join(dir, "layout"))
	layer := ocitest.Layer{Tar: treetest.Tar(treetest.Reg("a", "a"))}
	var busy atomic.Bool
	srv := httptest.NewServer(l.Registry(l.Manifest(ocitest.LinuxAMD64, layer), digest.FromBytes(layer.Tar),
		func(w http.ResponseWriter, r *http.Request, b []byte) {
			if busy.Swap(!busy.Load()) {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			_, _ = w.Write(b)
		}))
	defer srv.Close()
	_, host, _ := strings.Cut(srv.URL, "://")
	args := []string{"daxfs", "convert", "--plain-http", "-o", "image", "docker://" + host + "/some/image:v1"}
	const line = "503 Service Unavailable; attempt 2 of 6 follows in"

	busy.Store(true)
	tty, text := terminal(t)
	got := run(context.Background(), args, nil, io.Discard, tty)
	if seen := text(); got != statusOK || !strings.Contains(seen, line) {
		t.Errorf("status %d, %q on the terminal, expected %q", got, seen, line)
	}
	for _, quiet := range []bool{false, true} {
		busy.Store(true)
		var stderr bytes.Buffer
		if quiet {
			args = append([]string{"daxfs", "convert", "-q"}, args[2:]...)
		}
		got := run(context.Background(), args, nil, io.Discard, &stderr)
		if seen := stderr.String(); got != statusOK || strings.Contains(seen, line) == quiet {
			t.Errorf("status %d, %q, expected %q: %v", got, seen, line, !quiet)
		}
	}
}

// TestHostsDir: --hosts-dir leads to the address of a registry.
func TestHostsDir(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	l := ocitest.NewLayout(t, filepath.Join(dir, "layout"))
	layer := ocitest.Layer{Tar: treetest.Tar(treetest.Reg("a", "a"))}
	srv := httptest.NewServer(l.Registry(l.Manifest(ocitest.LinuxAMD64, layer), digest.FromBytes(layer.Tar),
		func(w http.ResponseWriter, _ *http.Request, b []byte) { _, _ = w.Write(b) }))
	defer srv.Close()
	hosts := filepath.Join("certs", "registry.example.com", "hosts.toml")
	if err := os.MkdirAll(filepath.Dir(hosts), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(hosts, fmt.Appendf(nil, "server = %q\n", srv.URL), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"convert", "--hosts-dir", "none", "--hosts-dir", "certs", "-o", "image"},
		{"pool", "put", "--hosts-dir", "certs", "pool"},
	} {
		if args[0] == "pool" {
			mustPool(t, "init", "--size", "64m", "pool")
		}
		var errs bytes.Buffer
		args = append(append([]string{"daxfs"}, args...), "docker://registry.example.com/some/image:v1")
		if got := run(context.Background(), args, nil, io.Discard, &errs); got != statusOK {
			t.Errorf("%q: status %d: %s", args, got, &errs)
		}
	}
}

// TestPushOnTerminal: each sent layer has a bar, which starts again when the registry asks for the layer again.
func TestPushOnTerminal(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	setup(t, dir)
	var lost atomic.Int64
	next := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/blobs/uploads/") && lost.Add(1) == 1 {
			_, _ = io.Copy(io.Discard, r.Body)
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		next.ServeHTTP(w, r)
	}))
	defer srv.Close()
	to := "docker://" + strings.TrimPrefix(srv.URL, "http://") + "/some/image:v1"
	tty, text := terminal(t)
	got := run(context.Background(), []string{"daxfs", "convert", "--to", to, "oci:layout:v1"}, nil, io.Discard, tty)
	seen := text()
	if got != statusOK {
		t.Fatalf("status %d: %s", got, seen)
	}
	form := regexp.MustCompile(`(sha256:[0-9a-f]{12}) push +\[[^\]]*\] +([0-9.]+) \w+ / ([0-9.]+) \w+`)
	bars := form.FindAllStringSubmatch(seen, -1)
	last := map[string][]string{}
	for _, m := range bars {
		sent, total := number(t, m[2]), number(t, m[3])
		if sent > total {
			t.Errorf("%s: more was sent than there is", m[0])
		}
		last[m[1]] = m
	}
	if len(last) != 2 {
		t.Errorf("bars for %d layers that are sent, expected 2: %q", len(last), seen)
	}
	for layer, m := range last {
		if m[2] != m[3] {
			t.Errorf("layer %s ends with %q", layer, m[0])
		}
	}
}

func number(t *testing.T, text string) float64 {
	t.Helper()
	v, err := strconv.ParseFloat(text, 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}
