package mount_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// windows is a driver that mounts a window of each image, like daxfs.ko, as a tmpfs.
type windows struct{ fail error }

func (windows) Name() string                               { return "windows" }
func (windows) Sharing() string                            { return "nothing" }
func (windows) Windows() bool                              { return true }
func (w windows) Probe(context.Context, region.Info) error { return w.fail }

func (windows) Mount(_ context.Context, src mount.Source, dir string) error {
	if err := sys.Do(sys.Mount{Type: "tmpfs", Source: fmt.Sprint(src.Off, "+", src.Size)}, dir); err != nil {
		return err
	}
	return nil
}

func (windows) Match(_ context.Context, src mount.Source, dir string) error {
	m, err := sys.MatchTop(dir, "tmpfs", false)
	if err == nil && m.Source != fmt.Sprint(src.Off, "+", src.Size) {
		err = fmt.Errorf("mounted from %q", m.Source)
	}
	return err
}

func (windows) Unmount(ctx context.Context, dir string) error { return sys.Unmount(ctx, dir) }

func TestWindows(t *testing.T) {
	b := fileBed(t)
	checked := 0
	opts := mount.Options{Check: func(_ context.Context, src mount.Source) error { checked++; return nil }}
	tab := b.open(t, opts, windows{}, erofs.Loop{})
	img := b.add(t, "a", "one")
	img.Window, img.WindowSize = 2<<20, 8192
	m := mustMount(t, tab, img)
	if m.Driver != "windows" || checked != 1 {
		t.Errorf("mounted %+v, %d checks", m, checked)
	}
	// An image without a window uses the next driver. A table without the driver of a window does not adopt it.
	if m := mustMount(t, tab, b.add(t, "b", "two")); m.Driver != "erofs-loop" || read(t, m.Dir) != "two" {
		t.Errorf("mounted %+v", m)
	}
	tab = b.open(t, opts, erofs.Loop{})
	if got := tab.List(); len(got) != 1 {
		t.Errorf("adopted %+v without the driver of the window", got)
	}
	tab = b.open(t, opts, windows{})
	if m = mustMount(t, tab, img); m.Driver != "windows" {
		t.Errorf("mounted %+v", m)
	}
	if err := tab.Healthy(t.Context()); err != nil {
		t.Error(err)
	}

	// No mount table shows the user.
	over := overlay(t, m.Dir)
	dir, err := os.Open(over)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if used, err := tab.UsedBy(t.Context(), "a"); err != nil || used == "" {
		t.Errorf("used by %q, %v", used, err)
	}
	if err := unix.Unmount(over, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := tab.Unmount(t.Context(), "a"); !errors.Is(err, mount.ErrBusy) {
			t.Errorf("unmount: %v, expected ErrBusy", err)
		}
	}
	dir.Close()
	// The kernel destroys a detached file system some time after its last file was closed.
	err = tab.Unmount(t.Context(), "a")
	for end := time.Now().Add(time.Minute); errors.Is(err, mount.ErrBusy) && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
		err = tab.Unmount(t.Context(), "a")
	}
	if err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Dir(m.Dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the image directory is still there: %v", err)
	}
}
