package live

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// verify compares a directory with its image: every name, all attributes, every byte. rnd chooses how
// files are read. over means that an overlay is mounted in between. It returns the number of names.
func verify(root string, want map[string]entry, rnd *rand.Rand, over bool) (int, error) {
	left := maps.Clone(want)
	inodes := map[uint64]string{}
	err := filepath.WalkDir(root, func(p string, de fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(strings.TrimPrefix(p, root), "/")
		e, ok := left[name]
		if !ok {
			return fmt.Errorf("%q is not in the image", name)
		}
		delete(left, name)
		if err := verifyOne(p, name, e, rnd, over, inodes); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		return nil
	})
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("%d of %d names are missing", len(left), len(want))
	}
	return len(want) - len(left), err
}

func verifyOne(p, name string, e entry, rnd *rand.Rand, over bool, inodes map[uint64]string) error {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return err
	}
	same := st.Mode == e.mode && st.Uid == e.uid && st.Rdev == e.rdev &&
		st.Mtim.Sec == e.mtime.Sec && st.Mtim.Nsec == int64(e.mtime.Nsec)
	if !same && !(over && name == "") { // the root of an overlay comes from its upper directory
		return fmt.Errorf("attributes %+v, expected %+v", st, e)
	}
	switch {
	case e.link != "":
		if got, err := os.Readlink(p); err != nil || got != e.link {
			return fmt.Errorf("target %q, %v, expected %q", got, err, e.link)
		}
	case e.regular():
		if st.Nlink != uint64(e.nlink) || st.Size != int64(e.size) {
			return fmt.Errorf("%d links, %d bytes, expected %d, %d", st.Nlink, st.Size, e.nlink, e.size)
		}
		if err := verifyXattrs(p, e); err != nil {
			return err
		}
		if err := verifyFile(p, e, rnd); err != nil {
			return err
		}
	}
	if e.dir() {
		return nil
	}
	// Only hard links may share an inode: an overlay would take the names for one file.
	other, again := inodes[st.Ino]
	inodes[st.Ino] = name
	if e.nlink > 1 {
		inodes[st.Ino] = e.first
		if again && other != e.first {
			return fmt.Errorf("has the inode of %q, expected that of %q", other, e.first)
		}
		return nil
	}
	if again {
		return fmt.Errorf("has the inode of %q", other)
	}
	return nil
}

func verifyXattrs(p string, e entry) error {
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		return fmt.Errorf("list xattrs: %w", err)
	}
	have := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		v := make([]byte, 4096)
		k, err := unix.Lgetxattr(p, name, v)
		if err != nil {
			return fmt.Errorf("xattr %q: %w", name, err)
		}
		have[name] = string(v[:k])
	}
	if !maps.Equal(have, e.xattrs) {
		return fmt.Errorf("xattrs %q, expected %q", have, e.xattrs)
	}
	return nil
}

// openLive opens a file of a live image. It does not wait for a lease: owners take leases only on dead
// inodes, because an owner that is stopped or killed meanwhile would block readers.
func openLive(p string) (*os.File, error) {
	f, err := os.OpenFile(p, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EAGAIN) {
		return nil, fmt.Errorf("somebody has a lease on a file of a living image: %w", err)
	}
	return f, err
}

// verifyFile reads a file in one of several ways.
func verifyFile(p string, e entry, rnd *rand.Rand) error {
	f, err := openLive(p)
	if err != nil {
		return err
	}
	defer f.Close()
	how := rnd.IntN(4)
	if how > 1 { // from the pool again
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			return err
		}
	}
	if how%2 == 1 && e.size > 0 {
		return verifyMapped(f, e)
	}
	b := make([]byte, e.size+1)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if n != e.size {
		return fmt.Errorf("%w: read %d bytes, expected %d", errForeign, n, e.size)
	}
	return compare(b[:n], e.id, e.size, 0)
}

// verifyMapped compares the mapped pages, including the rest of the last one.
func verifyMapped(f *os.File, e entry) error {
	m, err := unix.Mmap(int(f.Fd()), 0, pages(e.size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map: %w", err)
	}
	defer unix.Munmap(m)
	return compareMapped(m, e)
}

// pages returns the size of a mapping of n bytes.
func pages(n int) int { return (n + 4095) / 4096 * 4096 }

func compareMapped(m []byte, e entry) error {
	if err := compare(m[:e.size], e.id, e.size, 0); err != nil {
		return err
	}
	if rest := m[e.size:]; !bytes.Equal(rest, make([]byte, len(rest))) {
		return fmt.Errorf("%w: behind the end of the file", errForeign)
	}
	return nil
}
