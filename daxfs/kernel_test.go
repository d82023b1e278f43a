package daxfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"golang.org/x/sys/unix"
)

// mountNamespace moves the test's thread into its own mount namespace: a mount cannot outlive the
// thread, even if the test is killed. The thread stays locked and ends with the test.
func mountNamespace(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	fs, err := os.ReadFile("/proc/filesystems")
	if err != nil || !bytes.Contains(fs, []byte("\terofs\n")) {
		t.Skipf("this kernel has no erofs (%v)", err)
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		t.Skipf("no mount namespace of our own: %v", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
}

// mountImage mounts size bytes at off of file with erofs. backing is "file" or "loop". device is the
// name of the mount in the kernel's log; it is empty for a file, because all mounts of files share one
// name in the log.
func mountImage(t testing.TB, backing, file string, off, size int64) (mnt string, device string) {
	t.Helper()
	mnt = t.TempDir()
	source, data := file, ""
	switch backing {
	case "file":
		if off > 0 {
			data = fmt.Sprintf("fsoffset=%d", off)
		}
	case "loop":
		var done func()
		source, done = attachLoop(t, file, off, size)
		defer done() // the mount keeps the device
		device = filepath.Base(source)
	}
	if err := unix.Mount(source, mnt, "erofs", unix.MS_RDONLY, data); err != nil {
		if backing == "file" && (errors.Is(err, unix.ENOTBLK) || off > 0 && errors.Is(err, unix.EINVAL)) {
			t.Skipf("this kernel or filesystem has no file-backed erofs: %v", err)
		}
		t.Fatalf("mount %s: %v", source, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return mnt, device
}

// attachLoop makes a read-only loop device of size bytes at off of file. It vanishes with its last user.
func attachLoop(t testing.TB, file string, off, size int64) (device string, done func()) {
	t.Helper()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no loop devices: %v", err)
	}
	defer ctl.Close()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 20 {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatal(err)
		}
		device = fmt.Sprintf("/dev/loop%d", n)
		loop, err := os.OpenFile(device, os.O_RDONLY, 0)
		if err != nil {
			t.Skipf("no loop devices: %v", err)
		}
		cfg := unix.LoopConfig{Fd: uint32(f.Fd())}
		cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_READ_ONLY
		cfg.Info.Offset, cfg.Info.Sizelimit = uint64(off), uint64(size)
		if err = unix.IoctlLoopConfigure(int(loop.Fd()), &cfg); err == nil {
			return device, func() { loop.Close() }
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) { // another process was faster
			t.Fatal(err)
		}
	}
	t.Skip("every free loop device was taken by others")
	return "", nil
}

// kernelLog returns a function for the warnings and errors that the kernel logs about device from now on.
func kernelLog(t testing.TB) func(device string) []string {
	t.Helper()
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Logf("the kernel's log is not looked at: %v", err)
		return func(string) []string { return nil }
	}
	t.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		t.Fatal(err)
	}
	return func(device string) (bad []string) {
		buf := make([]byte, 8192)
		for {
			n, err := unix.Read(fd, buf)
			if errors.Is(err, unix.EPIPE) {
				continue // records were overwritten
			}
			if err != nil {
				return bad
			}
			var prio int
			line := string(buf[:n])
			if _, err := fmt.Sscanf(line, "%d,", &prio); err != nil || prio&7 > 4 {
				continue
			}
			if strings.Contains(line, "(device "+device+")") {
				bad = append(bad, line)
			}
		}
	}
}

// tree compares a mounted image with its input tree, entry by entry.
type tree struct {
	t     testing.TB
	s     *store
	inos  map[uint64]*daxfs.Node
	nlink map[*daxfs.Node]uint64
	bad   int
}

func compareTree(t testing.TB, mnt string, root *daxfs.Node, s *store) {
	t.Helper()
	c := &tree{t: t, s: s, inos: map[uint64]*daxfs.Node{}, nlink: map[*daxfs.Node]uint64{}}
	c.links(root)
	fd, err := unix.Open(mnt, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	c.node(fd, ".", "/", root)
}

func (c *tree) links(n *daxfs.Node) {
	if n.Mode&unix.S_IFMT == unix.S_IFDIR {
		c.nlink[n] = 2
	}
	for _, k := range n.Entries {
		if k.Mode&unix.S_IFMT == unix.S_IFDIR {
			c.nlink[n]++
		} else if c.nlink[k]++; c.nlink[k] > 1 {
			continue
		}
		c.links(k)
	}
}

func (c *tree) errorf(path, format string, args ...any) {
	if c.bad++; c.bad <= 10 {
		c.t.Errorf("%q: %s", path, fmt.Sprintf(format, args...))
	}
}

// node compares the entry name of the directory dirfd with n. Absolute paths of deep trees are too long.
func (c *tree) node(dirfd int, name, path string, n *daxfs.Node) {
	var st unix.Stat_t
	if err := unix.Fstatat(dirfd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		c.errorf(path, "stat: %v", err)
		return
	}
	if old := c.inos[st.Ino]; old != nil && old != n || st.Ino == 0 {
		c.errorf(path, "inode number %d is that of another file", st.Ino)
	} else if old != nil {
		return // another name of an inode already compared
	}
	c.inos[st.Ino] = n
	size := n.Data.Size
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		size = int64(len(n.Target))
	case unix.S_IFDIR:
		size = st.Size
	}
	got := fmt.Sprintf("mode %o uid %d gid %d size %d mtime %d.%09d rdev %#x nlink %d", st.Mode, st.Uid,
		st.Gid, st.Size,
		st.Mtim.Sec, st.Mtim.Nsec, st.Rdev, st.Nlink)
	want := fmt.Sprintf("mode %o uid %d gid %d size %d mtime %d.%09d rdev %#x nlink %d", n.Mode, n.UID, n.GID, size,
		n.Mtime.Sec, n.Mtime.Nsec, n.Rdev, c.nlink[n])
	if got != want {
		c.errorf(path, "got  %s\nwant %s", got, want)
	}
	proc := fmt.Sprintf("/proc/self/fd/%d/%s", dirfd, name)
	if name == "." {
		proc = fmt.Sprintf("/proc/self/fd/%d", dirfd)
	}
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		buf := make([]byte, 5000)
		if k, err := unix.Readlinkat(dirfd, name, buf); err != nil || string(buf[:k]) != n.Target {
			c.errorf(path, "target %q, %v; expected %q", buf[:max(k, 0)], err, n.Target)
		}
	case unix.S_IFREG:
		if b, err := os.ReadFile(proc); err != nil || !bytes.Equal(b, c.s.get(n.Data)) {
			c.errorf(path, "%d bytes read, %v; they differ from the %d expected", len(b), err, n.Data.Size)
		}
	case unix.S_IFDIR:
		c.dir(dirfd, name, path, n)
	}
	c.xattrs(proc, path, n, name == ".")
}

func (c *tree) dir(dirfd int, name, path string, n *daxfs.Node) {
	fd, err := unix.Openat(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		c.errorf(path, "open: %v", err)
		return
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		c.errorf(path, "readdir: %v", err)
	}
	got := make([]string, 0, len(entries))
	for _, e := range entries {
		got = append(got, e.Name())
		if k := n.Entries[e.Name()]; k != nil && modeOf(e.Type()) != k.Mode&unix.S_IFMT {
			c.errorf(path, "entry %q has type %v, expected %o", e.Name(), e.Type(), k.Mode)
		}
	}
	if !sort.StringsAreSorted(got) {
		c.errorf(path, "entries are not sorted")
	}
	want := make([]string, 0, len(n.Entries))
	for k := range n.Entries {
		want = append(want, k)
	}
	sort.Strings(want)
	if !slices.Equal(got, want) {
		c.errorf(path, "%d entries, expected %d; or they differ", len(got), len(want))
	}
	for _, k := range want {
		c.node(fd, k, path+"/"+k, n.Entries[k])
	}
}

func modeOf(m os.FileMode) uint32 {
	switch m.Type() {
	case os.ModeDir:
		return unix.S_IFDIR
	case os.ModeSymlink:
		return unix.S_IFLNK
	case os.ModeDevice:
		return unix.S_IFBLK
	case os.ModeDevice | os.ModeCharDevice:
		return unix.S_IFCHR
	case os.ModeNamedPipe:
		return unix.S_IFIFO
	case os.ModeSocket:
		return unix.S_IFSOCK
	}
	return unix.S_IFREG
}

func (c *tree) xattrs(proc, path string, n *daxfs.Node, follow bool) {
	list, get := unix.Llistxattr, unix.Lgetxattr
	if follow {
		list, get = unix.Listxattr, unix.Getxattr
	}
	buf := make([]byte, 1<<16)
	k, err := list(proc, buf)
	if err != nil {
		c.errorf(path, "listxattr: %v", err)
		return
	}
	got := map[string]bool{}
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:k]), "\x00"), "\x00") {
		got[name] = name != ""
	}
	delete(got, "")
	for _, x := range n.Xattrs {
		k, err := get(proc, x.Name, buf)
		if err != nil || !bytes.Equal(buf[:k], x.Value) {
			c.errorf(path, "xattr %q: %d bytes, %v; expected %d", x.Name, k, err, len(x.Value))
		}
		if !got[x.Name] {
			c.errorf(path, "xattr %q is not listed", x.Name)
		}
		delete(got, x.Name)
	}
	if len(got) > 0 {
		c.errorf(path, "xattrs that were never there: %v", got)
	}
}
