// Package listing writes a directory tree as text, one line per entry with everything that a program
// can see of it, so that trees on different file systems, snapshotters and kernels can be compared.
package listing

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Options omit what a file system cannot show. The zero value omits nothing.
type Options struct {
	NoTimes bool // modification times
	// NoRootTime omits the time of dir itself: layers rarely contain it, so tools make it up.
	NoRootTime bool
	NoXattrs   bool
	// NoLinkCounts omits the number of names of an inode: overlayfs counts names that upper layers
	// removed. The listing still shows which names are the same inode.
	NoLinkCounts bool
	// NoSpecial omits devices, fifos and sockets altogether.
	NoSpecial bool
}

// Tree lists dir and all entries below it, sorted by name. It omits sizes and link counts of
// directories, because every file system counts them differently. A hard link shows the first path of
// its inode. Contents are read through a buffer of fixed size.
func Tree(dir string, o Options) ([]string, error) {
	var lines []string
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		line, err := entry(path, rel, o, first)
		if err != nil {
			return fmt.Errorf("%q: %w", rel, err)
		}
		if line != "" {
			lines = append(lines, line)
		}
		return nil
	})
	return lines, err
}

func entry(path, rel string, o Options, first map[uint64]string) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return "", err
	}
	kind := st.Mode & unix.S_IFMT
	special := kind != unix.S_IFREG && kind != unix.S_IFDIR && kind != unix.S_IFLNK
	if special && o.NoSpecial {
		return "", nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%q mode=%06o owner=%d:%d", rel, st.Mode, st.Uid, st.Gid)
	if !o.NoTimes && (rel != "." || !o.NoRootTime) {
		fmt.Fprintf(&b, " mtime=%d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
	}
	if kind != unix.S_IFDIR {
		fmt.Fprintf(&b, " size=%d", st.Size)
		if !o.NoLinkCounts {
			fmt.Fprintf(&b, " nlink=%d", st.Nlink)
		}
		if st.Nlink > 1 {
			if name, ok := first[st.Ino]; ok {
				fmt.Fprintf(&b, " same=%q", name)
			} else {
				first[st.Ino] = rel
			}
		}
	}
	switch kind {
	case unix.S_IFCHR, unix.S_IFBLK:
		fmt.Fprintf(&b, " device=%d,%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, " target=%q", target)
	case unix.S_IFREG:
		sum, err := contents(path)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, " sha256=%x", sum)
	}
	if !o.NoXattrs {
		list, err := xattrs(path)
		if err != nil {
			return "", err
		}
		for _, x := range list {
			fmt.Fprintf(&b, " %s", x)
		}
	}
	return b.String(), nil
}

func contents(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return nil, err
	}
	return h.Sum(nil), nil
}

// xattrs lists the extended attributes in order, without overlayfs's own, which do not belong to its view.
func xattrs(path string) ([]string, error) {
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	var list []string
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			continue
		}
		value := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("read extended attribute %q: %w", name, err)
		}
		list = append(list, fmt.Sprintf("%s=%q", name, value[:n]))
	}
	slices.Sort(list)
	return list, nil
}

// Diff returns an error with some of the differences between two listings, or nil if they are equal.
func Diff(want, got []string) error {
	if slices.Equal(want, got) {
		return nil
	}
	missing, extra := without(want, got), without(got, want)
	return fmt.Errorf("trees differ (%d entries, want %d; %d missing, %d not expected):\n%s%s",
		len(got), len(want), len(missing), len(extra), show("- ", missing), show("+ ", extra))
}

// without returns the lines of a that are not in b.
func without(a, b []string) []string {
	in := make(map[string]bool, len(b))
	for _, l := range b {
		in[l] = true
	}
	var list []string
	for _, l := range a {
		if !in[l] {
			list = append(list, l)
		}
	}
	return list
}

func show(mark string, lines []string) string {
	const most = 20
	var b strings.Builder
	for i, l := range lines {
		if i == most {
			fmt.Fprintln(&b, mark, "...")
			break
		}
		fmt.Fprintln(&b, mark+l)
	}
	return b.String()
}
