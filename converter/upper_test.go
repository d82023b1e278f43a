package converter_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// upperDir is an upper directory of an overlay, with marks in the older and newer forms.
func upperDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	mark := func(name, attr, value string) error { return unix.Lsetxattr(in(name), attr, []byte(value), 0) }
	err := errors.Join(
		os.Mkdir(in("opaque"), 0o755), mark("opaque", "trusted.overlay.opaque", "y"),
		os.WriteFile(in("opaque/file"), []byte("contents"), 0o640),
		mark("opaque/file", "trusted.overlay.origin", "\x00\xfb\x01"),
		os.Mkdir(in("impure"), 0o755), mark("impure", "trusted.overlay.impure", "y"),
		unix.Mknod(in("impure/gone"), unix.S_IFCHR, 0), os.Link(in("impure/gone"), in("also gone")),
		unix.Mknod(in("gone with a mode"), unix.S_IFCHR|0o644, 0), os.Chown(in("gone with a mode"), 3, 4),
		unix.Mknod(in("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), mark("null", "trusted.note", "x"),
		unix.Mknod(in("block"), unix.S_IFBLK|0o600, 0), // not a whiteout
		mark("opaque/file", "user.overlay.note", "user"), mark(".", "trusted.overlay.uuid", "0123456789abcdef"),
	)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// newerMarks adds whiteouts in xattr form, and attributes of a nested overlay.
func newerMarks(t *testing.T, dir string) {
	t.Helper()
	in := func(name string) string { return filepath.Join(dir, name) }
	mark := func(name, attr, value string) error { return unix.Lsetxattr(in(name), attr, []byte(value), 0) }
	err := errors.Join(
		mark(".", "trusted.overlay.opaque", "x"), os.Mkdir(in("x"), 0o755), mark("x", "trusted.overlay.opaque", "x"),
		os.WriteFile(in("x/gone"), nil, 0o644), mark("x/gone", "trusted.overlay.whiteout", "y"),
		os.WriteFile(in("x/stays"), []byte("contents"), 0o644),
		mark("x/stays", "trusted.overlay.overlay.whiteout", "y"),
	)
	if err != nil {
		t.Fatal(err)
	}
}

// mountOverlay mounts directories below a new upper directory, the top one first.
func mountOverlay(t *testing.T, lowers string) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	merged := filepath.Join(dir, "merged")
	data := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lowers, dir, dir)
	if err := unix.Mount("overlay", merged, "overlay", 0, data); err != nil {
		t.Fatalf("mount overlay with %q: %v", data, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(merged, 0); err != nil {
			t.Errorf("unmount %q: %v", merged, err)
		}
	})
	return merged
}

// rootTime ignores the time of the root directory, which an overlay takes from its upper directory.
func rootTime(want, got *treetest.Entry) {
	if want.Path == "." {
		want.Mtime = got.Mtime
	}
}

// userMarks ignores attributes that overlayfs claims only when mounted with userxattr.
func userMarks(want, got *treetest.Entry) {
	rootTime(want, got)
	delete(want.Xattrs, "user.overlay.note")
}

// TestNotesOfOverlayfs: the image of a plain directory keeps the marks, also for an overlay above it;
// that of an upper directory is the overlay's view.
func TestNotesOfOverlayfs(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes whiteouts, and mounts")
	}
	for _, newer := range []bool{false, true} {
		dir := upperDir(t)
		if newer {
			newerMarks(t, dir)
		}
		compare := func(what, want, got string, ignore func(want, got *treetest.Entry)) {
			t.Helper()
			a, err := treetest.FromPath(want)
			if err != nil {
				t.Fatal(err)
			}
			b, err := treetest.FromPath(got)
			if err != nil {
				t.Fatal(err)
			}
			if d := treetest.Diff(a, b, ignore); d != "" {
				t.Errorf("%s, newer marks %v: trees differ (-directory +image):\n%s", what, newer, d)
			}
		}
		plain, res, err := convert(t, "rootfs:"+dir, converter.Options{})
		if err != nil {
			t.Fatal(err)
		}
		want := layer.Stats{Whiteouts: 3, OverlayXattrs: 5}
		if newer {
			want.OverlayXattrs += 4
		}
		if s := res.Dir; s.Whiteouts != want.Whiteouts || s.OverlayXattrs != want.OverlayXattrs ||
			s.IgnoredXattrs != 0 {
			t.Errorf("newer marks %v: counts are %+v, expected %+v", newer, s, want)
		}
		mounted := mountErofs(t, plain)
		compare("mounted", dir, mounted, nil)
		// Overlayfs lists whiteouts that it cannot look up, except in merged directories.
		base := t.TempDir()
		for _, d := range []string{"impure", "opaque", "x"} {
			if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if !newer {
			os.Remove(filepath.Join(base, "x"))
		}
		compare("below an overlay", mountOverlay(t, dir+":"+base), mountOverlay(t, mounted+":"+base), rootTime)

		image := filepath.Join(t.TempDir(), "image")
		src, err := source.Parse("rootfs:"+dir, source.Config{OverlayUpper: true})
		if err != nil {
			t.Fatal(err)
		}
		defer src.Close()
		if res, err = converter.Convert(t.Context(), src, image, converter.Options{}); err != nil {
			t.Fatal(err)
		}
		if res.Dir.Whiteouts < 3 || res.Dir.OverlayXattrs < 5 {
			t.Errorf("newer marks %v: counts are %+v, expected those of what was left out", newer, res.Dir)
		}
		compare("as upper directory", mountOverlay(t, dir+":"+base), mountErofs(t, image), userMarks)
	}
}

func TestOverlayUpperNeedsDirectory(t *testing.T) {
	for _, s := range []string{"oci:x", "docker-archive:x", "docker://x", "containerd:x", "daxfs:x"} {
		if src, err := source.Parse(s, source.Config{OverlayUpper: true}); err == nil {
			t.Errorf("%s was taken for %v", s, src)
		}
	}
}
