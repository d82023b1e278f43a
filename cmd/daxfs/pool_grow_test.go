package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/pool/lease"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// TestPoolGrow: a full pool takes more after it has grown, and keeps its images. A refused grow changes nothing.
func TestPoolGrow(t *testing.T) {
	dir := t.TempDir()
	p, place := filepath.Join(dir, "pool"), filepath.Join(dir, "guest.lease")
	must(t, os.WriteFile(place, make([]byte, lease.MinSize), 0o600))
	mustPool(t, "init", "--size", "16m", "--readers", "leases", "--lease", place, p)
	none := []string{"--control", filepath.Join(dir, "none")}
	with := func(args ...string) []string { return append(args[:1:1], append(none, args[1:]...)...) }
	small := rootfs(t, map[string]string{"small": strings.Repeat("small ", 100_000)})
	large := rootfs(t, map[string]string{"large": strings.Repeat("0123456789abcdef", 20<<16)})
	mustPool(t, with("put", "--name", "small", p, small)...)
	status, _, errs := runPool(t, with("put", "--name", "large", p, large)...)
	if status != statusFailed || !strings.Contains(errs, "pool is full") {
		t.Fatalf("put into a pool that is too small: status %d, %s", status, errs)
	}
	size := func() int64 {
		t.Helper()
		st, err := os.Stat(p)
		must(t, err)
		return st.Size()
	}
	refused := func(want string, status int, args ...string) {
		t.Helper()
		before := showPool(t, p)
		if got, _, errs := runPool(t, with(append([]string{"grow"}, args...)...)...); got != status ||
			!strings.Contains(errs, want) {
			t.Errorf("grow %q: status %d, %s; expected %q", args, got, errs, want)
		}
		if now := showPool(t, p); now.Size != before.Size || size() != before.Size ||
			len(now.Images) != len(before.Images) {
			t.Errorf("grow %q: the pool was %+v and is %+v in a file of %d bytes", args, before, now, size())
		}
	}
	refused("does not shrink", statusFailed, p, "8m")
	refused("already", statusFailed, p, "16m")
	refused("already", statusFailed, p, "17m") // rounded to whole 2 MiB
	refused("expected a size", statusUsage, p, "large")
	refused("more than a pool can have", statusFailed, p, "17t")
	refused("no such file", statusFailed, filepath.Join(dir, "away"), "64m")

	rc, err := region.Named(p)
	must(t, err)
	cat, err := catalogue(rc)
	must(t, err)
	l, err := lease.Open(place, lease.Reader{Name: "guest", Machine: [16]byte{1}})
	must(t, err)
	defer l.Close()
	_, err = l.Claim(cat.PoolID, cat.Images[0])
	must(t, err)
	refused(`reader "guest"`, statusFailed, p, "64m")
	must(t, l.Release(cat.PoolID, cat.Images[0]))

	mustPool(t, with("grow", p, "128m")...)
	if state := showPool(t, p); state.Size != 128<<20 || size() != 128<<20 || len(state.Images) != 1 {
		t.Errorf("after it has grown: %+v in %d bytes", state, size())
	}
	mustPool(t, with("put", "--name", "large", p, large)...)
	mustPool(t, with("check", p)...)
	// Somebody enlarged the file by hand, or the command was killed.
	must(t, os.Truncate(p, 160<<20))
	status, _, errs = runPool(t, with("gc", p)...)
	if status != statusFailed || !strings.Contains(errs, "daxfs pool grow") || strings.Contains(errs, "corrupt") {
		t.Errorf("a file that was made larger: status %d, %s", status, errs)
	}
	mustPool(t, with("grow", p, "160m")...)
	mustPool(t, with("check", p)...)
	if state := showPool(t, p); state.Size != 160<<20 || len(state.Images) != 2 {
		t.Errorf("after it has grown again: %+v", state)
	}
	d := startDaemon(t, showPool(t, p).ID)
	status, _, errs = runPool(t, "grow", "--control", d.socket, p, "1g")
	if status != statusFailed || !strings.Contains(errs, "stop the daemon") {
		t.Errorf("grow of a daemon's pool: status %d, %s", status, errs)
	}
}
