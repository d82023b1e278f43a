package daxfs_test

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// makeTree fills dir with everything that matters to a reader; special files only with privileges.
func makeTree(t *testing.T, dir string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	path := func(p string) string { return filepath.Join(dir, p) }
	for _, d := range []string{"empty", "many", "a/b/c/d/e", "bin", "odd"} {
		must(os.MkdirAll(path(d), 0o755))
	}
	for _, n := range []int{0, 1, 100, 4095, 4096, 4097, 8192, 100_000} {
		must(os.WriteFile(path(fmt.Sprintf("size%d", n)), bytes.Repeat([]byte("daxfs!\n"), n/7+1)[:n], 0o640))
	}
	for i := range 3000 {
		must(os.WriteFile(path(fmt.Sprintf("many/%d-%s", i, strings.Repeat("n", i%240))), nil, 0o600))
	}
	// 254: the reference tool of Debian 12 fails for names of 255 bytes.
	must(os.WriteFile(path("a/b/c/d/e/"+strings.Repeat("l", 254)), []byte("long"), 0o444))
	must(os.WriteFile(path("odd/b\xff\xfe"), []byte("bytes"), 0o444))
	must(os.Symlink("../size100", path("a/link")))
	must(os.Symlink("/a/./link", path("bin/abs")))
	must(os.Symlink(strings.Repeat("t/", 2047), path("odd/longlink")))
	must(os.Symlink("nowhere", path("odd/dangling")))
	must(os.Symlink("loop", path("odd/loop")))
	must(os.Link(path("size4097"), path("a/hard")))
	must(os.Chmod(path("size1"), 0o4755))
	must(os.Chmod(path("empty"), os.ModeSticky|0o777))
	must(os.Chtimes(path("size100"), fixedTime, fixedTime))
	must(unix.Mkfifo(path("odd/fifo"), 0o600))
	if err := unix.Lsetxattr(path("size100"), "user.hello", []byte("world"), 0); err != nil {
		t.Logf("no user xattrs here: %v", err)
	}
	for i := range 20 { // enough equal ones for mkfs to share them
		_ = unix.Lsetxattr(path(fmt.Sprintf("many/%d-%s", i, strings.Repeat("n", i%240))), "user.shared",
			bytes.Repeat([]byte("s"), 200), 0)
	}
	if os.Geteuid() == 0 {
		must(unix.Mknod(path("odd/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
		must(unix.Mknod(path("odd/disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 300))))
		must(os.Lchown(path("size100"), 1000, 70000))
		_ = unix.Lsetxattr(path("size4096"), "trusted.overlay.opaque", []byte("y"), 0)
		_ = unix.Lsetxattr(path("size8192"), "security.capability",
			[]byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0)
	}
}

// mkfs runs the reference tool.
func mkfs(t *testing.T, dir string, args ...string) string {
	t.Helper()
	tool, err := exec.LookPath("mkfs.erofs")
	if err != nil {
		t.Skip("mkfs.erofs is not installed")
	}
	image := filepath.Join(t.TempDir(), "image")
	out, err := exec.Command(tool, append(append([]string{"--quiet"}, args...), image, dir)...).CombinedOutput()
	if err != nil {
		t.Fatalf("mkfs.erofs %q: %v\n%s", args, err, out)
	}
	return image
}

// TestReadMkfs compares images of the independent reference tool with their source.
func TestReadMkfs(t *testing.T) {
	if testing.Short() {
		t.Skip("slow: reads three whole images; TestFSMkfs remains")
	}
	dir := t.TempDir()
	makeTree(t, dir)
	for _, args := range [][]string{{"-Enoinline_data"}, {"-T0"}, {"-Eforce-inode-extended", "-x1"}} {
		t.Run(strings.Join(args, ""), func(t *testing.T) {
			image := mkfs(t, dir, args...)
			b, err := os.ReadFile(image)
			if err != nil {
				t.Fatal(err)
			}
			for _, mapped := range []bool{true, false} {
				f := open(t, b, mapped)
				compareDir(t, f, dir, args)
			}
		})
	}
}

// TestFSMkfs runs the suite of the standard library, except for files it cannot open: dangling links,
// special files and names that are not UTF-8.
func TestFSMkfs(t *testing.T) {
	dir := t.TempDir()
	makeTree(t, dir)
	b, err := os.ReadFile(mkfs(t, dir, "--exclude-path=odd"))
	if err != nil {
		t.Fatal(err)
	}
	if err := fstest.TestFS(open(t, b, true), "size100000", "a/b/c/d/e", "many", "bin/abs", "empty"); err != nil {
		t.Error(err)
	}
}

func open(t *testing.T, b []byte, mapped bool) *daxfs.FS {
	t.Helper()
	var r io.ReaderAt = bytes.NewReader(b)
	if mapped {
		r = daxfs.Mem(b)
	}
	f, err := daxfs.Open(r, int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// compareDir compares an image with its source directory.
func compareDir(t *testing.T, f *daxfs.FS, dir string, args []string) {
	t.Helper()
	seen := 0
	err := f.Walk(func(path string, in daxfs.Inode) error {
		seen++
		host := filepath.Join(dir, path)
		var st unix.Stat_t
		if err := unix.Lstat(host, &st); err != nil {
			return err
		}
		if in.Mode != st.Mode || in.UID != st.Uid || in.GID != st.Gid || in.Rdev != st.Rdev {
			t.Errorf("%q: got mode %#o owner %d:%d rdev %d, want %#o %d:%d %d", path, in.Mode, in.UID, in.GID, in.Rdev,
				st.Mode, st.Uid, st.Gid, st.Rdev)
		}
		if uint64(in.Nlink) != uint64(st.Nlink) { // of another type on other machines
			t.Errorf("%q: got %d links, want %d", path, in.Nlink, st.Nlink)
		}
		if !in.IsDir() && in.Size != st.Size {
			t.Errorf("%q: got size %d, want %d", path, in.Size, st.Size)
		}
		if !slices.Contains(args, "-T0") &&
			(in.Mtime.Sec != int64(st.Mtim.Sec) || in.Mtime.Nsec != uint32(st.Mtim.Nsec)) {
			t.Errorf("%q: got mtime %v, want %v", path, in.Mtime, st.Mtim)
		}
		compareContents(t, host, path, in)
		compareXattrs(t, host, path, in)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want := 0
	_ = filepath.WalkDir(dir, func(string, fs.DirEntry, error) error { want++; return nil })
	if seen != want {
		t.Errorf("walk found %d entries, want %d", seen, want)
	}
}

func compareContents(t *testing.T, host, path string, in daxfs.Inode) {
	t.Helper()
	switch {
	case in.IsRegular():
		want, err := os.ReadFile(host)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, in.Size)
		if _, err := in.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%q: contents differ (error %v)", path, err)
		}
		var viewed []byte
		for len(viewed) < len(want) {
			v, err := in.View(int64(len(viewed)), 1<<20)
			if err != nil || len(v) == 0 {
				t.Fatalf("%q: view: %d bytes, %v", path, len(v), err)
			}
			viewed = append(viewed, v...)
		}
		if !bytes.Equal(viewed, want) {
			t.Errorf("%q: viewed contents differ", path)
		}
	case in.IsSymlink():
		want, _ := os.Readlink(host)
		if got, err := in.Target(); got != want || err != nil {
			t.Errorf("%q: got target %q, %v, want %q", path, got, err, want)
		}
	case in.IsDir():
		n, cursor := 0, int64(0)
		for more := true; more; { // one entry per call, each looked up by name
			more = false
			err := in.Entries(cursor, func(e daxfs.Dirent) bool {
				n, cursor, more = n+1, e.Next, true
				if nid, err := in.Lookup(e.Name); nid != e.Nid || err != nil {
					t.Errorf("%q: lookup of %q: got %d, %v, want %d", path, e.Name, nid, err, e.Nid)
				}
				return false
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		list, _ := os.ReadDir(host)
		if n != len(list) {
			t.Errorf("%q: got %d entries, want %d", path, n, len(list))
		}
		for _, missing := range []string{"", ".", "..", "!", "zzzz", "many0", strings.Repeat("x", 300)} {
			if nid, err := in.Lookup(missing); err == nil {
				t.Errorf("%q: lookup of %q: got %d, want none", path, missing, nid)
			}
		}
	}
}

func compareXattrs(t *testing.T, host, path string, in daxfs.Inode) {
	t.Helper()
	got, err := in.Xattrs()
	if err != nil {
		t.Errorf("%q: %v", path, err)
	}
	buf := make([]byte, 64<<10)
	n, _ := unix.Llistxattr(host, buf)
	var names []string
	if n > 0 {
		names = strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	}
	if len(got) != len(names) {
		t.Errorf("%q: got %d xattrs %q, want %q", path, len(got), got, names)
	}
	for _, name := range names {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(host, name, value)
		if err != nil {
			t.Fatal(err)
		}
		if v, ok, err := in.Xattr(name); !ok || err != nil || !bytes.Equal(v, value[:n]) {
			t.Errorf("%q: xattr %q: got %q, %v, %v, want %q", path, name, v, ok, err, value[:n])
		}
	}
}

// TestPaths pins path resolution: it stays inside the image, whatever the symbolic links.
func TestPaths(t *testing.T) {
	dir := t.TempDir()
	makeTree(t, dir)
	b, err := os.ReadFile(mkfs(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	f := open(t, b, true)
	for _, c := range []struct {
		path string
		err  error
	}{
		{"a/link", nil},
		{"bin/abs", nil},
		{"odd/b\xff\xfe", nil},
		{".", nil},
		{"odd/dangling", fs.ErrNotExist},
		{"odd/loop", unix.ELOOP},
		{"size1/x", unix.ENOTDIR},
		{"", fs.ErrInvalid},
		{"/", fs.ErrInvalid},
		{"a/", fs.ErrInvalid},
		{"a/../a", fs.ErrInvalid},
		{"./a", fs.ErrInvalid},
	} {
		_, err := f.Stat(c.path)
		if !isErr(err, c.err) {
			t.Errorf("stat %q: got %v, want %v", c.path, err, c.err)
		}
	}
	if b, err := f.ReadFile("bin/abs"); len(b) != 100 || err != nil {
		t.Errorf("read through links: got %d bytes, %v", len(b), err)
	}
	info, err := f.Lstat("a/link")
	if err != nil || info.Mode().Type() != fs.ModeSymlink {
		t.Errorf("lstat: got %v, %v", info, err)
	}
	if st, ok := info.Sys().(*daxfs.Stat); !ok || st.Nid == 0 || st.Nlink != 1 {
		t.Errorf("sys: got %v", st)
	}
	if _, err := f.ReadFile("odd/fifo"); !isErr(err, unix.EINVAL) {
		t.Errorf("read of a fifo: got %v", err)
	}
}
