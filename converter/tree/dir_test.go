package tree

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// The kernel is the oracle: Merge must produce the view of an overlay mount from its directories.

// overlay mounts directories, the top one first, with a new upper directory, and returns that and the mount.
func overlay(t *testing.T, lowers []string, options string) (upper, merged string) {
	t.Helper()
	requireRoot(t)
	dir := t.TempDir()
	upper, merged = filepath.Join(dir, "upper"), filepath.Join(dir, "merged")
	for _, d := range []string{upper, merged, filepath.Join(dir, "work")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	data := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s/work,index=off%s", strings.Join(lowers, ":"),
		upper, dir, options)
	if err := unix.Mount("overlay", merged, "overlay", 0, data); err != nil {
		t.Skipf("needs overlayfs on %s: mount with %q: %v", dir, data, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(merged, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Errorf("unmount: %v", err)
		}
	})
	return upper, merged
}

// mergeDirs merges directories, the bottom one first.
func mergeDirs(t *testing.T, dirs ...string) treetest.Tree {
	t.Helper()
	var store treetest.Store
	var layers []*layer.Layer
	for _, dir := range dirs {
		l, err := layer.FromUpper(context.Background(), dir, &store, layer.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, l)
	}
	root, err := Merge(layers)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := treetest.FromNode(root, store.Open)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// makeDir returns a directory with one of everything.
func makeDir(t *testing.T) string {
	t.Helper()
	requireRoot(t)
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, d := range []string{"etc", "etc/deep", "etc/deep/er", "usr", "usr/lib", "var"} {
		must(os.Mkdir(in(d), 0o750))
	}
	for i, f := range []string{"etc/a", "etc/b", "etc/deep/c", "etc/deep/er/d", "usr/lib/e", "usr/lib/f", "top"} {
		must(os.WriteFile(in(f), []byte(strings.Repeat(f, 1000*i)), 0o640))
		must(os.Chown(in(f), i, 1000+i))
		must(os.Chtimes(in(f), time.Now(), time.Unix(int64(1000*i), int64(i))))
	}
	must(os.Symlink("usr/lib", in("lib")))
	must(os.Symlink("/etc", in("abs")))
	must(os.Symlink("nowhere", in("etc/dangling")))
	must(os.Link(in("etc/a"), in("var/hard")))
	must(os.Link(in("etc/dangling"), in("var/hardlink of a link")))
	must(unix.Mkfifo(in("var/fifo"), 0o600))
	must(unix.Mknod(in("var/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(unix.Mknod(in("var/disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 70000))))
	must(unix.Setxattr(in("etc/b"), "user.note", []byte("x"), 0))
	must(unix.Setxattr(in("etc/b"), "trusted.note", nil, 0))
	must(unix.Setxattr(in("usr"), "user.dir", []byte(strings.Repeat("v", 2000)), 0))
	must(unix.Setxattr(in("top"), "security.capability",
		[]byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	must(unix.Setxattr(in("var"), aclDefault,
		acl{{1, 7, aclNoID}, {2, 5, 12}, {4, 5, aclNoID}, {16, 7, aclNoID}, {32, 0, aclNoID}}.value(), 0))
	must(os.WriteFile(in("var/inherits"), []byte("x"), 0o666))
	must(os.Chmod(in("top"), 0o755|os.ModeSetuid))
	must(os.WriteFile(in("\xff name\n"+strings.Repeat("n", 200)), nil, 0o600))
	sock, err := net.Listen("unix", in("var/s"))
	must(err)
	sock.(*net.UnixListener).SetUnlinkOnClose(false)
	sock.Close()
	must(os.Truncate(in("usr/lib/f"), 300<<10)) // a hole
	return dir
}

func TestDirectory(t *testing.T) {
	dir := makeDir(t)
	want, err := treetest.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if d := treetest.Diff(want, mergeDirs(t, dir), nil); d != "" {
		t.Errorf("trees differ (- disk, + merge):\n%s", d)
	}
}

// noLinks ignores a difference of overlayfs: hard links of lower files break when one is changed.
func noLinks(want, got *treetest.Entry) {
	want.Nlink, got.Nlink, want.Same, got.Same = 0, 0, "", ""
}

// TestOverlay makes random changes in stacked overlay mounts.
func TestOverlay(t *testing.T) {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	for i := range 8 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Logf("-tree.seed=%d", seed+uint64(i))
			c := changer{r: rand.New(rand.NewPCG(seed+uint64(i), 0))}
			dirs := []string{makeDir(t)}
			for range 3 {
				var lowers []string
				for _, d := range dirs {
					lowers = append([]string{d}, lowers...)
				}
				upper, merged := overlay(t, lowers, "")
				for range 25 {
					c.change(t, merged)
				}
				want, err := treetest.FromPath(merged)
				if err != nil {
					t.Fatal(err)
				}
				if err := unix.Unmount(merged, 0); err != nil {
					t.Fatal(err)
				}
				dirs = append(dirs, upper)
				if d := treetest.Diff(want, mergeDirs(t, dirs...), noLinks); d != "" {
					t.Fatalf("trees differ (- overlayfs, + merge):\n%s", d)
				}
			}
		})
	}
}

type changer struct{ r *rand.Rand }

// change makes one random change to a mounted tree. It ignores refusals of the kernel.
func (c *changer) change(t *testing.T, root string) {
	t.Helper()
	tree, err := treetest.FromPath(root)
	if err != nil {
		t.Fatal(err)
	}
	e := tree[c.r.IntN(len(tree))]
	old := filepath.Join(root, e.Path)
	dir := old
	if e.Mode&unix.S_IFMT != unix.S_IFDIR {
		dir = filepath.Dir(old)
	}
	fresh := filepath.Join(dir, fmt.Sprintf("n%d", c.r.IntN(6)))
	switch op := c.r.IntN(14); {
	case op == 0 && e.Path != ".":
		err = os.RemoveAll(old)
	case op == 1 && e.Path != ".": // an opaque directory, or a directory in place of a file
		if err = os.RemoveAll(old); err == nil {
			if err = os.Mkdir(old, 0o711); err == nil {
				err = os.WriteFile(filepath.Join(old, "new"), []byte("new"), 0o600)
			}
		}
	case op == 2 && e.Path != ".":
		if err = os.RemoveAll(old); err == nil {
			err = os.Symlink("etc", old)
		}
	case op == 3:
		err = os.Mkdir(fresh, 0o755)
	case op == 4:
		var f *os.File
		if f, err = os.OpenFile(fresh, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644); err == nil { // not into a FIFO
			_, err = f.WriteString(e.Path)
			f.Close()
		}
	case op == 5:
		err = os.Link(old, fresh)
	case op == 6:
		err = os.Rename(old, fresh)
	case op == 7:
		err = unix.Fchmodat(unix.AT_FDCWD, old, uint32(c.r.IntN(0o10000)), unix.AT_SYMLINK_NOFOLLOW)
	case op == 8:
		err = os.Lchown(old, c.r.IntN(9), c.r.IntN(9))
	case op == 9:
		err = unix.Lsetxattr(old, "user.x", []byte{byte(op)}, 0)
	case op == 10:
		err = unix.Lremovexattr(old, "user.note")
	case op == 11 && e.Mode&unix.S_IFMT == unix.S_IFREG:
		err = os.Truncate(old, int64(c.r.IntN(9000)))
	case op == 12:
		err = unix.Mknod(fresh, unix.S_IFCHR|0o600, int(unix.Mkdev(5, uint32(c.r.IntN(9)))))
	case op == 13 && e.Path != ".":
		err = os.RemoveAll(old)
		if err == nil {
			err = unix.Mkfifo(old, 0o622)
		}
	}
	if errno := unix.Errno(0); err != nil && !errors.As(err, &errno) {
		t.Fatal(err)
	}
}

// TestOverlayMarks writes the rarer marks of overlayfs and lets overlayfs read them.
func TestOverlayMarks(t *testing.T) {
	lower, top := makeDir(t), t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	mkdir := func(name string, xattrs ...string) {
		t.Helper()
		must(os.Mkdir(filepath.Join(top, name), 0o755))
		for i := 0; i < len(xattrs); i += 2 {
			must(unix.Setxattr(filepath.Join(top, name), xattrs[i], []byte(xattrs[i+1]), 0))
		}
	}
	file := func(name string, xattrs ...string) {
		t.Helper()
		must(os.WriteFile(filepath.Join(top, name), nil, 0o644))
		for i := 0; i < len(xattrs); i += 2 {
			must(unix.Setxattr(filepath.Join(top, name), xattrs[i], []byte(xattrs[i+1]), 0))
		}
	}
	must(unix.Setxattr(top, "trusted.overlay.opaque", []byte("x"), 0)) // xattr whiteouts follow below
	mkdir("usr", "trusted.overlay.opaque", "y", "trusted.overlay.origin", "", "trusted.overlay.impure", "y")
	mkdir("etc", "trusted.overlay.opaque", "x")
	file("etc/a", "trusted.overlay.whiteout", "")
	file("etc/b", "trusted.overlay.overlay.whiteout", "", "trusted.overlay.overlay.origin", "o")
	mkdir("var")
	must(unix.Mknod(filepath.Join(top, "var/hard"), unix.S_IFCHR, 0))
	must(os.Link(filepath.Join(top, "var/hard"), filepath.Join(top, "var/fifo"))) // overlayfs makes whiteouts once

	upper, merged := overlay(t, []string{top, lower}, "")
	want, err := treetest.FromPath(merged)
	if err != nil {
		t.Fatal(err)
	}
	if d := treetest.Diff(want, mergeDirs(t, lower, top, upper), noLinks); d != "" {
		t.Errorf("trees differ (- overlayfs, + merge):\n%s", d)
	}
}

// TestOverlayUserMarks uses the names of overlayfs in a user namespace.
func TestOverlayUserMarks(t *testing.T) {
	lower := makeDir(t)
	upper, merged := overlay(t, []string{lower}, ",userxattr")
	for _, err := range []error{
		os.RemoveAll(filepath.Join(merged, "etc")), os.Mkdir(filepath.Join(merged, "etc"), 0o700),
		os.WriteFile(filepath.Join(merged, "usr/lib/new"), nil, 0o600), os.Remove(filepath.Join(merged, "top")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	want, err := treetest.FromPath(merged)
	if err != nil {
		t.Fatal(err)
	}
	if d := treetest.Diff(want, mergeDirs(t, lower, upper), noLinks); d != "" {
		t.Errorf("trees differ (- overlayfs, + merge):\n%s", d)
	}
}

// TestOverlayUnsupported lets overlayfs create references to other layers.
func TestOverlayUnsupported(t *testing.T) {
	for _, test := range []struct {
		options string
		change  func(merged string) error
		entry   string
	}{
		{",redirect_dir=on", func(m string) error { return os.Rename(m+"/etc/deep", m+"/etc/moved") }, "etc/moved"},
		{",metacopy=on", func(m string) error { return os.Chmod(m+"/usr/lib/f", 0o600) }, "usr/lib/f"},
	} {
		upper, merged := overlay(t, []string{makeDir(t)}, test.options)
		if err := test.change(merged); err != nil {
			t.Fatal(err)
		}
		_, err := layer.FromUpper(context.Background(), upper, new(treetest.Store), layer.Limits{})
		entry, ok := errors.AsType[*layer.EntryError](err)
		if !errors.Is(err, layer.ErrUnsupported) || !ok || entry.Entry != test.entry {
			t.Errorf("%s: %v, want ErrUnsupported of %q", test.options, err, test.entry)
		}
	}
}
