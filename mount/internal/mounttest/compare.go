package mounttest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"testing"

	"golang.org/x/sys/unix"
)

// Same fails the test unless the tree b shows everything that a does: names, types, permissions,
// owners, times, device numbers, hard links, extended attributes, link targets and contents. It looks
// from another process, because a process that serves a file system must not wait for it.
func Same(t testing.TB, a, b string) {
	t.Helper()
	out, err := Command("compare", a, b).CombinedOutput()
	if err != nil {
		t.Fatalf("%s and %s differ: %v\n%s", a, b, err, out)
	}
}

type node struct {
	st     unix.Stat_t
	xattrs map[string]string
	target string
	names  []string // of a directory
}

func look(path string) (n node, err error) {
	if err := unix.Lstat(path, &n.st); err != nil {
		return n, fmt.Errorf("lstat %q: %w", path, err)
	}
	if n.xattrs, err = xattrs(path); err != nil {
		return n, err
	}
	switch n.st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		n.target, err = os.Readlink(path)
	case unix.S_IFDIR:
		var des []fs.DirEntry
		des, err = os.ReadDir(path)
		for _, de := range des {
			n.names = append(n.names, de.Name()+" "+de.Type().String())
		}
		sort.Strings(n.names)
	}
	return n, err
}

func xattrs(path string) (map[string]string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return nil, fmt.Errorf("listxattr %q: %w", path, err)
	}
	m := map[string]string{}
	for name := range bytes.SplitSeq(bytes.TrimSuffix(buf[:n], []byte{0}), []byte{0}) {
		if len(name) == 0 {
			continue
		}
		val := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, string(name), val)
		if err != nil {
			return nil, fmt.Errorf("getxattr %q %q: %w", path, name, err)
		}
		m[string(name)] = string(val[:n])
	}
	return m, nil
}

// compare is the helper behind Same. It stops at the twentieth difference.
func compare(args []string) error {
	a, b := args[0], args[1]
	links := map[uint64]uint64{} // inode number in a to inode number in b
	diffs := 0
	report := func(path, format string, args ...any) error {
		diffs++
		fmt.Printf("%s: %s\n", path, fmt.Sprintf(format, args...))
		if diffs == 20 {
			return fs.SkipAll
		}
		return nil
	}
	err := filepath.WalkDir(a, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(a, path)
		if err != nil {
			return err
		}
		x, err := look(path)
		if err != nil {
			return err
		}
		y, err := look(filepath.Join(b, rel))
		if err != nil {
			return report(rel, "%v", err)
		}
		type attr struct {
			mode     uint32
			uid, gid uint32
			rdev     uint64
			sec, ns  int64
		}
		of := func(s unix.Stat_t) attr {
			return attr{s.Mode, s.Uid, s.Gid, s.Rdev, s.Mtim.Sec, s.Mtim.Nsec}
		}
		if of(x.st) != of(y.st) {
			return report(rel, "attributes %+v, found %+v", of(x.st), of(y.st))
		}
		if fmt.Sprint(x.xattrs) != fmt.Sprint(y.xattrs) || x.target != y.target ||
			fmt.Sprint(x.names) != fmt.Sprint(y.names) {
			return report(rel, "xattrs, target, names %q %q %q, found %q %q %q", x.xattrs, x.target, x.names, y.xattrs,
				y.target, y.names)
		}
		if x.st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return nil
		}
		if x.st.Nlink != y.st.Nlink || x.st.Size != y.st.Size {
			return report(rel, "%d links and size %d, found %d and %d", x.st.Nlink, x.st.Size, y.st.Nlink, y.st.Size)
		}
		if ino, ok := links[x.st.Ino]; ok && ino != y.st.Ino {
			return report(rel, "hard link has inode %d, another name of it has %d", y.st.Ino, ino)
		}
		links[x.st.Ino] = y.st.Ino
		if x.st.Mode&unix.S_IFMT == unix.S_IFREG {
			if err := sameBytes(path, filepath.Join(b, rel)); err != nil {
				return report(rel, "%v", err)
			}
		}
		return nil
	})
	if err == nil && diffs > 0 {
		err = fmt.Errorf("%d differences", diffs)
	}
	return err
}

func sameBytes(a, b string) error {
	x, err := os.ReadFile(a)
	if err != nil {
		return err
	}
	y, err := os.ReadFile(b)
	if err != nil {
		return err
	}
	if !bytes.Equal(x, y) {
		return fmt.Errorf("contents differ: %d bytes, %d bytes", len(x), len(y))
	}
	return nil
}

// readall is a helper that walks each directory once: it lists and stats everything, reads every
// regular file and link, and looks up a missing name in every directory.
func readall(args []string) error {
	for _, root := range args {
		err := filepath.WalkDir(root, func(path string, de fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if _, err := de.Info(); err != nil {
				return err
			}
			switch {
			case de.Type()&fs.ModeSymlink != 0:
				_, err := os.Readlink(path)
				return err
			case de.IsDir():
				if _, err := os.Lstat(filepath.Join(path, "no such name")); !errors.Is(err, fs.ErrNotExist) {
					return fmt.Errorf("%q: a name that does not exist: %w", path, err)
				}
				return nil
			case !de.Type().IsRegular():
				return nil
			}
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = io.Copy(struct{ io.Writer }{io.Discard}, f)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
