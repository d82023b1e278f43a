package snapshotter_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// dirs lists the files in the directories of snapshots.
func (e *env) dirs() string {
	e.t.Helper()
	found, err := filepath.Glob(filepath.Join(e.root, "snapshots/*/fs/*"))
	e.must(err)
	var names []string
	for _, f := range found {
		names = append(names, filepath.Base(f))
	}
	return strings.Join(names, " ")
}

// The directory of an unpacked layer is removed when the pool stores the layer durably and its chain is complete.
func TestDirectoriesGo(t *testing.T) {
	e := newEnv(t, snapshotter.Options{Durable: true})
	ctx := t.Context()
	e.layer("default/1/a", "", "a")
	e.layer("default/2/b", "default/1/a", "b")
	e.must(e.Flush(ctx))
	if got := e.dirs(); got != "a b" {
		t.Fatalf("before anything was started the directories hold %q", got)
	}
	// A layer that is being unpacked over the directories keeps them.
	x := e.prepare("default/3/extract-1-x c", "default/2/b")
	if n := strings.Count(option(x, "lowerdir"), "/fs"); n != 2 {
		t.Fatalf("unpacked over %v", x)
	}
	c := e.prepare("default/4/c", "default/2/b")
	e.must(e.Flush(ctx))
	if got := e.dirs(); got != "a b" {
		t.Fatalf("while a layer is unpacked over them the directories hold %q", got)
	}
	e.must(os.WriteFile(filepath.Join(option(x, "upperdir"), "c"), nil, 0o644))
	e.must(e.Commit(ctx, "default/3/c", "default/3/extract-1-x c"))
	e.must(e.Flush(ctx))
	e.must(e.Cleanup(ctx))
	if got := e.dirs(); got != "c" {
		t.Fatalf("in the end the directories hold %q", got)
	}
	e.expectFiles(c, "a b")
	// A layer without a directory can still be unpacked over and run, also after a restart.
	e.restart()
	y := e.prepare("default/5/extract-1-x d", "default/2/b")
	if low := option(y, "lowerdir"); low == "" || strings.Contains(low, "/snapshots/") {
		t.Errorf("unpacked over %v, expected the image", y)
	}
	e.expectFiles(e.prepare("default/6/c", "default/3/c"), "a b c")
	e.must(e.Remove(ctx, "default/5/extract-1-x d"))
}

// A directory stays if a container stands on it because there was no room for its image.
func TestDirectoryInUseStays(t *testing.T) {
	e := newEnv(t, snapshotter.Options{Durable: true})
	ctx := t.Context()
	e.layer("default/1/a", "", "a")
	e.must(e.Flush(ctx))
	e.fake.setFull(true)
	plain := e.prepare("default/2/c", "default/1/a")
	e.fake.setFull(false)
	e.prepare("default/3/c", "default/1/a")
	e.must(e.Flush(ctx))
	e.must(e.Cleanup(ctx))
	e.expectFiles(plain, "a")
	if got := e.dirs(); got != "a" {
		t.Errorf("the directories hold %q", got)
	}
	e.must(e.Remove(ctx, "default/2/c"))
	e.must(e.Cleanup(ctx))
	if got := e.dirs(); got != "" {
		t.Errorf("the directories hold %q", got)
	}
}

// Where memory does not survive a reboot, the layer is restored from its directory.
func TestDirectoriesStayWithoutDurability(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	e.layer("default/1/a", "", "a")
	c := e.prepare("default/2/c", "default/1/a")
	e.must(e.Flush(t.Context()))
	e.must(e.Cleanup(t.Context()))
	e.must(e.fake.reboot())
	_, err := e.Mounts(t.Context(), "default/2/c")
	e.must(err)
	e.expectFiles(c, "a")
}

// Without room for an image that has no directories, a container stands on a copy on disk.
func TestPlainCopy(t *testing.T) {
	e := newEnv(t, snapshotter.Options{Durable: true})
	ctx := t.Context()
	p := newPull(e)
	p.stream("default/1/"+chainA, "", tarOf("a"))
	p.stream("default/2/"+chainB, "default/1/"+chainA, tarOf("b"))
	e.fake.setFull(true)
	c := e.prepare("default/3/c", "default/2/"+chainB)
	e.expectFiles(c, "a b")
	if got := strings.Join(e.fallbacks(), " "); got != "full" {
		t.Errorf("fallbacks %q", got)
	}
	e.restart()
	again, err := e.Mounts(ctx, "default/3/c")
	if e.must(err); option(again, "lowerdir") != option(c, "lowerdir") {
		t.Errorf("after a restart %v, before %v", again, c)
	}
	e.must(e.Cleanup(ctx))
	e.fake.setFull(false)
	shared := e.prepare("default/4/c", "default/2/"+chainB)
	if option(shared, "lowerdir") == option(c, "lowerdir") {
		t.Error("with room a container stands on the copy")
	}
	e.must(e.Remove(ctx, "default/3/c"))
	e.must(e.Cleanup(ctx))
	if _, err := os.Stat(option(c, "lowerdir")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the copy is left over: %v", err)
	}
	e.expectFiles(shared, "a b")
}
