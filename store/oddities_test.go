package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
)

func digestOf(files ...file) digest.Digest { return digest.FromBytes(makeTar(files...)) }

func dirSource(dir string) *source.Image {
	return &source.Image{Tree: func(ctx context.Context, to layer.Store, lim layer.Limits) (*layer.Layer, error) {
		return layer.FromDir(ctx, dir, to, lim)
	}}
}

func detach(dir string) error { return unix.Unmount(dir, unix.MNT_DETACH) }

func fdName(f *os.File) string { return strconv.Itoa(int(f.Fd())) }

// makeOddities makes one of everything that a directory can hold.
func makeOddities(t *testing.T, dir string) {
	t.Helper()
	in := func(name string) string { return filepath.Join(dir, name) }
	old := time.Unix(1_000_000_000, 123_456_789)
	err := errors.Join(
		os.Mkdir(in("d"), 0o700),
		os.WriteFile(in("d/file"), random(1, 300_000), 0o600),
		os.Link(in("d/file"), in("link")),
		os.WriteFile(in("empty"), nil, 0o644),
		os.Symlink("d/file", in("symlink")),
		unix.Mknod(in("fifo"), unix.S_IFIFO|0o640, 0),
		unix.Mknod(in("device"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		os.WriteFile(in("setuid"), []byte("x"), 0o755),
		os.Chown(in("setuid"), 7, 8),
		os.Chmod(in("setuid"), 0o755|os.ModeSetuid),
		unix.Setxattr(in("empty"), "user.note", []byte("hello"), 0),
		unix.Setxattr(in("empty"), "security.capability",
			[]byte("\x00\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0),
		os.Lchown(in("symlink"), 5, 6),
		os.Chtimes(in("d/file"), old, old),
		os.Chtimes(in("d"), old, old),
		os.Chmod(in("d"), 0o1777|os.ModeSticky),
	)
	if err != nil {
		t.Fatal(err)
	}
}

// describe lists a directory with all attributes.
func describe(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(p, &st); err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		links := st.Nlink
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			links = 0
		}
		fmt.Fprintf(&b, "%s %o %d:%d dev %d links %d time %d.%d", rel, st.Mode, st.Uid, st.Gid, st.Rdev, links,
			st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			body, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %s", digest.FromBytes(body).Encoded()[:12])
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %s", target)
		}
		for _, name := range []string{"user.note", "security.capability"} {
			value := make([]byte, 100)
			if n, err := unix.Lgetxattr(p, name, value); err == nil {
				fmt.Fprintf(&b, " %s=%x", name, value[:n])
			}
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}
