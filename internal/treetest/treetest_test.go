package treetest

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// TestDiff changes every field of an entry: Diff must not overlook any.
func TestDiff(t *testing.T) {
	base := Entry{
		Path: "a", Mode: unix.S_IFREG | 0o644, Size: 1, Nlink: 1, Sum: "00",
		Xattrs: map[string]string{"user.a": "1"},
	}
	for name, change := range map[string]func(*Entry){
		"path": func(e *Entry) { e.Path = "b" }, "type": func(e *Entry) { e.Mode = unix.S_IFLNK | 0o644 },
		"mode": func(e *Entry) { e.Mode |= unix.S_ISVTX },
		"uid":  func(e *Entry) { e.UID = 1 }, "gid": func(e *Entry) { e.GID = 1 },
		"size":  func(e *Entry) { e.Size = 2 },
		"nlink": func(e *Entry) { e.Nlink = 2 },
		"rdev":  func(e *Entry) { e.Rdev = 1 }, "seconds": func(e *Entry) { e.Mtime.Sec = -1 },
		"nanoseconds": func(e *Entry) { e.Mtime.Nsec = 1 },
		"xattr value": func(e *Entry) { e.Xattrs = map[string]string{"user.a": "2"} },
		"no xattr":    func(e *Entry) { e.Xattrs = nil },
		"sum":         func(e *Entry) { e.Sum = "01" }, "same": func(e *Entry) { e.Same = "0" },
	} {
		other := base
		change(&other)
		if d := Diff(Tree{base}, Tree{other}, nil); !strings.Contains(d, "- ") || !strings.Contains(d, "+ ") {
			t.Errorf("another %s: %q", name, d)
		}
	}
	link := Entry{Path: "a", Mode: unix.S_IFLNK | 0o777, Target: "x"}
	other := link
	other.Target = "y"
	if Diff(Tree{link}, Tree{other}, nil) == "" {
		t.Error("another target is not seen")
	}
	if d := Diff(Tree{base}, Tree{base}, nil); d != "" {
		t.Errorf("equal trees differ: %s", d)
	}
	if d := Diff(Tree{{Path: "."}, {Path: "a"}, {Path: "a/b"}, {Path: "a.b"}},
		Tree{{Path: "."}, {Path: "a"}, {Path: "a.b"}}, nil); strings.Count(d, "\n") != 1 ||
		!strings.HasPrefix(d, `- "a/b"`) {
		t.Errorf("one entry too few gives %q", d)
	}
}

// TestDirTimesSince checks that only the stated times are exempt.
func TestDirTimesSince(t *testing.T) {
	start := time.Unix(1000, 0)
	entry := func(p string, mode uint32, sec int64) Entry {
		return Entry{Path: p, Mode: mode, Mtime: daxfs.Time{Sec: sec}}
	}
	for _, test := range []struct {
		want Entry
		same bool
	}{
		{entry("d", unix.S_IFDIR, 1000), true},
		{entry("d", unix.S_IFDIR, 999), false},
		{entry(".", unix.S_IFDIR, 999), true},
		{entry("f", unix.S_IFREG, 1000), false},
	} {
		got := test.want
		got.Mtime.Sec = 5
		if d := Diff(Tree{test.want}, Tree{got}, DirTimesSince(start)); (d == "") != test.same {
			t.Errorf("%v: %q", test.want, d)
		}
	}
}

// TestPathAndNode compares the same tree on disk and in memory.
func TestPathAndNode(t *testing.T) {
	dir := t.TempDir()
	for _, err := range []error{
		os.Mkdir(filepath.Join(dir, "d"), 0o755), os.WriteFile(filepath.Join(dir, "d/f"), []byte("hello"), 0o600),
		os.Link(filepath.Join(dir, "d/f"), filepath.Join(dir, "e")), os.Symlink("d", filepath.Join(dir, "s")),
		os.WriteFile(filepath.Join(dir, "empty"), nil, 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	want, err := FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	var store Store
	data, err := store.Put(context.Background(), 5, strings.NewReader("hello, more"))
	if err != nil {
		t.Fatal(err)
	}
	node := func(mode uint32) *daxfs.Node {
		return &daxfs.Node{Mode: mode, UID: uint32(os.Getuid()), GID: want[0].GID}
	}
	root, d, f, s := node(unix.S_IFDIR|want[0].Mode&0o7777), node(unix.S_IFDIR|0o755), node(unix.S_IFREG|0o600),
		node(unix.S_IFLNK|0o777)
	f.Data, s.Target = data, "d"
	d.Entries = map[string]*daxfs.Node{"f": f}
	root.Entries = map[string]*daxfs.Node{"d": d, "e": f, "s": s, "empty": node(unix.S_IFREG | 0o600)}
	got, err := FromNode(root, store.Open)
	if err != nil {
		t.Fatal(err)
	}
	if d := Diff(want, got, func(w, g *Entry) { w.Mtime = g.Mtime }); d != "" {
		t.Errorf("trees differ (- disk, + memory):\n%s", d)
	}
}

func TestStore(t *testing.T) {
	var s Store
	if _, err := s.Put(context.Background(), 4, strings.NewReader("abc")); err == nil ||
		!strings.Contains(err.Error(), "3 of 4 bytes") {
		t.Errorf("short contents: %v", err)
	}
	a, err := s.Put(context.Background(), 5000, strings.NewReader(strings.Repeat("a", 5000)))
	if err != nil {
		t.Fatal(err)
	}
	b, _ := s.Put(context.Background(), 1, strings.NewReader("b"))
	again, _ := s.Put(context.Background(), 1, strings.NewReader("b"))
	if a.Off%daxfs.BlockSize != 0 || b.Off < a.Off+2*daxfs.BlockSize || again != b {
		t.Errorf("contents at %d, %d and %d", a.Off, b.Off, again.Off)
	}
	r, err := s.Open(b)
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := io.ReadAll(r); string(got) != "b" {
		t.Errorf("read %q", got)
	}
	if _, err := s.Open(daxfs.Data{Off: 1 << 40, Size: 1}); err == nil {
		t.Error("opened contents that are not there")
	}
}
