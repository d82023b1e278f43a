package layer_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// Attributes and marks of overlayfs are tested with tree.Merge against the kernel. These tests need no
// privileges, or test what must not happen.

// dirWithTraps has entries that a careless reader would hang on or walk into.
func dirWithTraps(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, err := range []error{
		os.Mkdir(in("b"), 0o755), os.WriteFile(in("b/file"), []byte("contents"), 0o640),
		os.Link(in("b/file"), in("a hard link")),
		unix.Mkfifo(in("fifo"), 0o600), os.Symlink("/", in("root")), os.Symlink("loop", in("loop")),
		os.Symlink("b", in("c")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestDirOrder(t *testing.T) {
	got := ""
	for _, c := range treetest.Changes(fromDirOf(t)) {
		got += fmt.Sprintf("%v %q", c.Op, c.Path)
		if c.Op == layer.OpLink {
			got += fmt.Sprintf(" to %q", c.LinkTo)
		} else if c.Node.Target != "" {
			got += fmt.Sprintf(" -> %q", c.Node.Target)
		}
		got += "\n"
	}
	want := `add ""
add "a hard link"
add "b"
link "b/file" to "a hard link"
add "c" -> "b"
add "fifo"
add "loop" -> "loop"
add "root" -> "/"
`
	if got != want {
		t.Errorf("changes:\n%swant:\n%s", got, want)
	}
}

// swap replaces the file being read.
type swap struct {
	treetest.Store
	do func()
}

func (s *swap) Put(ctx context.Context, size int64, r io.Reader) (daxfs.Data, error) {
	s.do()
	return s.Store.Put(ctx, size, r)
}

func TestDirChanges(t *testing.T) {
	dir := dirWithTraps(t)
	file := filepath.Join(dir, "a hard link")
	_, err := layer.FromDir(context.Background(), dir, &swap{do: func() { _ = os.Truncate(file, 3) }}, layer.Limits{})
	if !errors.Is(err, io.ErrUnexpectedEOF) ||
		!strings.Contains(err.Error(), `"a hard link": shorter than its 8 bytes`) {
		t.Errorf("a file that shrinks: %v", err)
	}
	// The entries after the file being read turn into something else.
	dir = dirWithTraps(t)
	_, err = layer.FromDir(context.Background(), dir, &swap{do: func() {
		_ = os.RemoveAll(filepath.Join(dir, "b"))
		_ = os.Symlink("/proc", filepath.Join(dir, "b"))
		_ = os.Remove(filepath.Join(dir, "fifo"))
	}}, layer.Limits{})
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), `"fifo"`) {
		t.Errorf("a name that vanishes: %v, want that it does not exist", err)
	}
}

func TestDirErrors(t *testing.T) {
	dir := dirWithTraps(t)
	for _, test := range []struct {
		dir  string
		lim  layer.Limits
		want error
	}{
		{dir + "/none", layer.Limits{}, os.ErrNotExist},
		{dir + "/fifo", layer.Limits{}, unix.ENOTDIR},
		{dir + "/c", layer.Limits{}, nil}, // the directory itself may be a symbolic link
		{dir, layer.Limits{MaxEntries: 6}, layer.ErrLimit},
		{dir, layer.Limits{MaxEntries: 7, MaxBytes: 8}, nil},
		{dir, layer.Limits{MaxBytes: 7}, layer.ErrLimit},
		{dir, layer.Limits{MaxDepth: 1}, layer.ErrLimit},
		{dir, layer.Limits{MaxPath: 10}, layer.ErrLimit},
		{dir, layer.Limits{MaxMetaBytes: 30}, layer.ErrLimit},
	} {
		if _, err := layer.FromDir(context.Background(), test.dir, new(treetest.Store),
			test.lim); !errors.Is(err, test.want) {
			t.Errorf("%s with %+v: %v, want %v", test.dir, test.lim, err, test.want)
		}
	}
}

// TestDirXattrs needs user.* attributes. The names are those of overlayfs in a user namespace.
func TestDirXattrs(t *testing.T) {
	dir := t.TempDir()
	for name, value := range map[string]string{
		"user.b": "2", "user.a": "", "user.big": strings.Repeat("x", 3000), "user.overlay.opaque": "y",
		"user.overlay.origin": "\x00\xfb", "user.overlay.overlay.origin": "inner",
	} {
		if err := unix.Setxattr(dir, name, []byte(value), 0); err != nil {
			t.Skipf("needs user xattrs on %s: %v", dir, err)
		}
	}
	l, err := layer.FromUpper(context.Background(), dir, new(treetest.Store), layer.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	changes := treetest.Changes(l)
	got := ""
	for _, x := range changes[0].Node.Xattrs {
		got += fmt.Sprintf("%s=%.10s ", x.Name, x.Value)
	}
	if want := "user.a= user.b=2 user.big=xxxxxxxxxx user.overlay.origin=inner "; got != want {
		t.Errorf("xattrs %q, want %q", got, want)
	}
	if len(changes) != 2 || changes[1].Op != layer.OpOpaque || l.Stats.OverlayXattrs != 2 {
		t.Errorf("changes %v, stats %+v, want the directory opaque and two xattrs of overlayfs", changes, l.Stats)
	}
}
