package snapshotter_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"

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

func (e *env) expectDirs(want string) {
	e.t.Helper()
	if got := e.dirs(); got != want {
		e.t.Errorf("the directories hold %q, expected %q", got, want)
	}
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
	e.expectDirs("a")
	e.must(e.Remove(ctx, "default/2/c"))
	e.must(e.Cleanup(ctx))
	e.expectDirs("")
}

// A layer may have left the pool since it was stored. Its directory goes only once it is stored again.
func TestDirectoryOfEvictedLayer(t *testing.T) {
	e := newEnv(t, snapshotter.Options{Durable: true})
	ctx := t.Context()
	e.layer("default/1/a", "", "a")
	e.prepare("default/2/extract-1-x b", "default/1/a") // keeps the directory
	e.prepare("default/3/c", "default/1/a")
	e.must(e.Flush(ctx))
	e.must(e.fake.reboot())
	e.must(e.Remove(ctx, "default/2/extract-1-x b"))
	e.fake.setFail(errors.New("no such luck"))
	if err := e.Cleanup(ctx); err == nil {
		t.Error("no word of the layer that cannot be stored")
	}
	if got := e.dirs(); got != "a" {
		t.Fatalf("while the layer cannot be stored the directories hold %q", got)
	}
	e.fake.setFail(nil)
	e.must(e.Cleanup(ctx))
	e.expectDirs("")
	c, err := e.Mounts(ctx, "default/3/c")
	e.must(err)
	e.expectFiles(c, "a")
}

// A directory stays if a layer is unpacked over it since it was chosen for removal.
func TestDirectoryTakenDuringRemoval(t *testing.T) {
	e := newEnv(t, snapshotter.Options{Durable: true})
	ctx := t.Context()
	e.layer("default/1/a", "", "a")
	e.must(e.Flush(ctx)) // the next time that the layer is added is before the removal
	var x []mount.Mount
	var err error
	e.fake.set(&e.fake.beforeAdd, func() { x, err = e.Prepare(ctx, "default/2/extract-1-x b", "default/1/a") })
	e.prepare("default/3/c", "default/1/a")
	e.must(e.Flush(ctx))
	e.must(err)
	if n := strings.Count(option(x, "lowerdir"), "/fs"); n != 1 {
		t.Fatalf("unpacked over %v", x)
	}
	e.expectFiles(x, "a")
	e.must(e.Remove(ctx, "default/2/extract-1-x b"))
	e.must(e.Cleanup(ctx))
	e.expectDirs("")
}

// A directory that is dropped while it is read for an image is removed only afterwards.
func TestDirectoryReadDuringRemoval(t *testing.T) {
	e := newEnv(t, snapshotter.Options{Durable: true})
	ctx := t.Context()
	e.layer("default/1/a", "", "a")
	e.layer("default/2/b", "default/1/a", "b")
	e.prepare("default/3/extract-1-x c", "default/1/a") // keeps the directory
	e.prepare("default/4/c", "default/1/a")
	e.must(e.Flush(ctx))
	var dirs string
	var err error
	e.fake.set(&e.fake.beforeLower, func() {
		err = errors.Join(e.Remove(ctx, "default/3/extract-1-x c"), e.Cleanup(ctx))
		dirs = e.dirs()
	})
	c := e.prepare("default/5/c", "default/2/b")
	e.must(err)
	if dirs != "a b" {
		t.Errorf("while they are read the directories hold %q", dirs)
	}
	e.expectFiles(c, "a b")
	e.must(e.Flush(ctx))
	e.must(e.Cleanup(ctx))
	e.expectDirs("")
}

// Short memory does not evict a layer whose directory is about to go.
func TestShortMemoryDuringRemoval(t *testing.T) {
	e := newEnv(t, snapshotter.Options{Durable: true})
	ctx := t.Context()
	e.layer("default/1/a", "", "a")
	e.layer("default/2/b", "", "b")
	e.must(e.Flush(ctx)) // the next time that the layer is added is before the removal
	swept := false
	var errs []error
	e.fake.set(&e.fake.afterAdd, func() {
		errs = append(errs, e.Remove(ctx, "default/3/c"))
		e.fake.setFull(true)
		_, err := e.Prepare(ctx, "default/4/c", "default/2/b")
		errs = append(errs, err)
		e.fake.setFull(false)
		swept = len(e.fake.state().images) == 0
	})
	e.prepare("default/3/c", "default/1/a")
	e.must(e.Flush(ctx))
	e.must(errors.Join(errs...))
	if !swept {
		t.Error("memory was not short")
	}
	e.must(e.Cleanup(ctx))
	e.expectDirs("b")
	e.expectFiles(e.prepare("default/5/c", "default/1/a"), "a")
	e.must(e.Flush(ctx))
}

// Short memory evicts a layer that has a directory, but never the only copy.
func TestShortMemoryKeepsOnlyCopy(t *testing.T) {
	e := newEnv(t, snapshotter.Options{Durable: true})
	ctx := t.Context()
	e.layer("default/1/a", "", "a")
	e.prepare("default/2/c", "default/1/a")
	e.must(e.Flush(ctx))
	e.layer("default/3/b", "", "b")
	e.must(e.Flush(ctx))
	e.must(e.Remove(ctx, "default/2/c"))
	e.must(e.Cleanup(ctx))
	if got, n := e.dirs(), len(e.fake.state().layers); got != "b" || n != 2 {
		t.Fatalf("the directories hold %q, and %d layers are stored", got, n)
	}
	e.fake.setFull(true)
	e.layer("default/4/d", "", "d")
	e.must(e.Flush(ctx))
	e.fake.setFull(false)
	if s := e.fake.state(); len(s.layers) != 1 || len(s.images) != 0 {
		t.Errorf("layers %v and images %v are left, expected one layer", s.layers, s.images)
	}
	e.expectFiles(e.prepare("default/5/c", "default/1/a"), "a")
	e.expectFiles(e.prepare("default/6/c", "default/3/b"), "b")
	e.expectFiles(e.prepare("default/7/c", "default/4/d"), "d")
	e.must(e.Flush(ctx))
}

// Short memory frees the image of a removed container, even if the kernel cannot be asked about another.
func TestShortMemoryFreesRemoved(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	ctx := t.Context()
	e.layer("default/1/a", "", "a")
	e.layer("default/2/b", "", "b")
	e.layer("default/6/e", "", "e")
	e.prepare("default/7/c", "default/6/e") // stays
	unknown := option(e.prepare("default/3/c", "default/1/a"), "upperdir")
	e.prepare("default/4/c", "default/2/b")
	e.must(e.Flush(ctx))
	e.must(os.Rename(unknown, unknown+".away"))
	e.must(os.WriteFile(unknown, nil, 0o600)) // no overlay can be tried on it
	e.must(e.Remove(ctx, "default/3/c"))
	e.must(e.Remove(ctx, "default/4/c"))
	if n := len(e.fake.state().images); n != 3 {
		t.Fatalf("%d images are there, expected three", n)
	}
	e.fake.setFull(true)
	e.layer("default/5/d", "", "d")
	e.must(e.Flush(ctx))
	e.fake.setFull(false)
	if n := len(e.fake.state().images); n != 2 {
		t.Errorf("%d images are left, expected those of a container and of the one that may live", n)
	}
	e.must(os.Remove(unknown))
	e.must(os.Rename(unknown+".away", unknown))
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
	e.expectFiles(c, "a b")
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
