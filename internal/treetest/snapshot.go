// Package treetest compares directory trees completely, for tests: a tree on disk or mounted, and a tree in memory.
//
// A [Tree] is a plain value; [Diff] prints the differences. Properties that differ between any two
// file systems are left out: sizes and link counts of directories, inode numbers (hard links are
// compared as groups of names instead), access and change times.
//
//	want, err := treetest.FromPath(dir)
//	got, err := treetest.FromNode(root, store.Open)
//	if d := treetest.Diff(want, got, nil); d != "" {
//		t.Fatalf("trees differ (-want +got):\n%s", d)
//	}
package treetest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// Entry describes one name of a tree completely.
type Entry struct {
	Path     string // relative to the root; the root is "."
	Mode     uint32 // as stat(2) has it, type included
	UID, GID uint32
	Size     int64  // of a regular file or symbolic link; else 0
	Nlink    uint64 // 0 for a directory
	Rdev     uint64
	Mtime    daxfs.Time
	Target   string
	Xattrs   map[string]string // nil if there are none
	Sum      string            // SHA-256 of the contents of a regular file, in hex
	Same     string            // first path, in order, with the same inode, if not this one
}

// Tree is the entries of a tree, sorted by path.
type Tree []Entry

// FromPath takes a snapshot of the directory tree at dir. It needs permission to read everything in
// it; only root sees trusted.* and security.* attributes.
func FromPath(dir string) (Tree, error) {
	var t Tree
	seen := make(map[[2]uint64]int)
	var walk func(p string) error
	walk = func(p string) error {
		full := path.Join(dir, p)
		var st unix.Stat_t
		if err := unix.Lstat(full, &st); err != nil {
			return fmt.Errorf("lstat %q: %w", full, err)
		}
		e, err := entryOf(full, p, &st)
		if err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			id := [2]uint64{st.Dev, st.Ino}
			if first, ok := seen[id]; ok && st.Nlink > 1 {
				e.Same = t[first].Path
			} else {
				seen[id] = len(t)
			}
			t = append(t, e)
			return nil
		}
		t = append(t, e)
		names, err := readNames(full)
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := walk(path.Join(p, name)); err != nil {
				return err
			}
		}
		return nil
	}
	if err := walk("."); err != nil {
		return nil, err
	}
	return t, nil
}

func readNames(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

func entryOf(full, p string, st *unix.Stat_t) (Entry, error) {
	e := Entry{
		Path: p, Mode: st.Mode, UID: st.Uid, GID: st.Gid, Nlink: uint64(st.Nlink),
		Mtime: daxfs.Time{Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec)},
	}
	var err error
	if e.Xattrs, err = readXattrs(full); err != nil {
		return e, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.Nlink = 0
	case unix.S_IFLNK:
		e.Size = st.Size
		e.Target, err = os.Readlink(full)
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Rdev = st.Rdev
	case unix.S_IFREG:
		e.Size = st.Size
		var f *os.File
		if f, err = os.Open(full); err != nil {
			return e, err
		}
		e.Sum, err = sum(f)
		f.Close()
	}
	return e, err
}

func sum(r io.Reader) (string, error) {
	h := sha256.New()
	_, err := io.Copy(h, r)
	return hex.EncodeToString(h.Sum(nil)), err
}

func readXattrs(full string) (map[string]string, error) {
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(full, list)
	if err == unix.ENOTSUP || n == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listxattr %q: %w", full, err)
	}
	m := make(map[string]string)
	value := make([]byte, 64<<10)
	for _, name := range strings.Split(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(full, name, value)
		if err != nil {
			return nil, fmt.Errorf("getxattr %q of %q: %w", name, full, err)
		}
		m[name] = string(value[:n])
	}
	return m, nil
}

// FromNode takes a snapshot of a tree in memory; open returns the contents that a Data refers to.
func FromNode(root *daxfs.Node, open func(daxfs.Data) (io.Reader, error)) (Tree, error) {
	var t Tree
	links := make(map[*daxfs.Node]uint64)
	first := make(map[*daxfs.Node]string)
	var count func(n *daxfs.Node)
	count = func(n *daxfs.Node) {
		links[n]++
		for _, c := range n.Entries {
			count(c)
		}
	}
	count(root)
	var walk func(p string, n *daxfs.Node) error
	walk = func(p string, n *daxfs.Node) error {
		e := Entry{Path: p, Mode: n.Mode, UID: n.UID, GID: n.GID, Mtime: n.Mtime, Rdev: n.Rdev, Target: n.Target}
		for _, x := range n.Xattrs {
			if e.Xattrs == nil {
				e.Xattrs = make(map[string]string)
			}
			if _, twice := e.Xattrs[x.Name]; twice {
				return fmt.Errorf("%q has xattr %q twice", p, x.Name)
			}
			e.Xattrs[x.Name] = string(x.Value)
		}
		if n.Mode&unix.S_IFMT != unix.S_IFDIR {
			e.Nlink = links[n]
			if f, ok := first[n]; ok {
				e.Same = f
			} else {
				first[n] = p
			}
		}
		switch n.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			e.Size = int64(len(n.Target))
		case unix.S_IFREG:
			e.Size = n.Data.Size
			var r io.Reader = strings.NewReader("")
			var err error
			if n.Data.Size > 0 {
				if r, err = open(n.Data); err != nil {
					return err
				}
			}
			if e.Sum, err = sum(r); err != nil {
				return err
			}
		}
		t = append(t, e)
		for _, name := range slices.Sorted(maps.Keys(n.Entries)) {
			if err := walk(path.Join(p, name), n.Entries[name]); err != nil {
				return err
			}
		}
		return nil
	}
	if err := walk(".", root); err != nil {
		return nil, err
	}
	return t, nil
}

// Exempt removes differences between two entries that do not count, by changing both.
type Exempt func(want, got *Entry)

// DirTimesSince exempts times of directories that are not before start in want, a tree on disk: the
// directory was changed without an entry that sets its time. The root directory's time is exempt, too.
func DirTimesSince(start time.Time) Exempt {
	return func(want, got *Entry) {
		isDir := want.Mode&unix.S_IFMT == unix.S_IFDIR && got.Mode&unix.S_IFMT == unix.S_IFDIR
		if isDir && (want.Path == "." || !time.Unix(want.Mtime.Sec, int64(want.Mtime.Nsec)).Before(start)) {
			want.Mtime = got.Mtime
		}
	}
}

// Diff returns one line for each difference, or "". exempt may be nil.
func Diff(want, got Tree, exempt Exempt) string {
	var b strings.Builder
	for len(want) > 0 || len(got) > 0 {
		switch c := comparePaths(want, got); {
		case c < 0:
			fmt.Fprintf(&b, "- %v\n", want[0])
			want = want[1:]
		case c > 0:
			fmt.Fprintf(&b, "+ %v\n", got[0])
			got = got[1:]
		default:
			w, g := want[0], got[0]
			if exempt != nil {
				exempt(&w, &g)
			}
			if ws, gs := w.String(), g.String(); ws != gs {
				fmt.Fprintf(&b, "- %s\n+ %s\n", ws, gs)
			}
			want, got = want[1:], got[1:]
		}
	}
	return b.String()
}

// comparePaths compares the first entries in the order of a walk: "a/b" comes before "a.b".
func comparePaths(a, b Tree) int {
	switch {
	case len(a) == 0:
		return 1
	case len(b) == 0:
		return -1
	}
	return slices.Compare(elements(a[0].Path), elements(b[0].Path))
}

func elements(p string) []string {
	if p == "." {
		return nil
	}
	return strings.Split(p, "/")
}

// String prints every field on one line; equal entries print alike and different ones differ.
func (e Entry) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q %o %d:%d size=%d mtime=%d.%09d", e.Path, e.Mode, e.UID, e.GID, e.Size,
		e.Mtime.Sec, e.Mtime.Nsec)
	if e.Nlink != 0 {
		fmt.Fprintf(&b, " nlink=%d", e.Nlink)
	}
	if e.Rdev != 0 {
		fmt.Fprintf(&b, " rdev=%d:%d", unix.Major(e.Rdev), unix.Minor(e.Rdev))
	}
	if e.Mode&unix.S_IFMT == unix.S_IFLNK {
		fmt.Fprintf(&b, " -> %q", e.Target)
	}
	if e.Sum != "" {
		fmt.Fprintf(&b, " sum=%s", e.Sum)
	}
	if e.Same != "" {
		fmt.Fprintf(&b, " same=%q", e.Same)
	}
	for _, name := range slices.Sorted(maps.Keys(e.Xattrs)) {
		fmt.Fprintf(&b, " %s=%q", name, e.Xattrs[name])
	}
	return b.String()
}
