package layer

import (
	"context"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// FromImage reads the tree of a dual image as one layer, with everything in its EROFS half: times,
// owners, extended attributes, devices, hard links. Contents go into s in the order of their paths.
//
// The image must not change, and should have been verified by daxfs.Check: FromImage refuses what it
// cannot read, but does not detect overlapping files.
func FromImage(ctx context.Context, img *daxfs.FS, s Store, lim Limits) (*Layer, error) {
	m := imageReader{builder: newBuilder(FromDirectory, lim), store: s, first: make(map[uint64]string)}
	err := img.Walk(func(path string, in daxfs.Inode) error {
		if path == "." {
			path = ""
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := m.entry(); err != nil {
			return entryError(path, err)
		}
		if err := m.inode(ctx, path, in); err != nil {
			return entryError(path, err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return m.layer, nil
}

type imageReader struct {
	*builder
	store Store
	first map[uint64]string // first path of inodes with several names
}

func (m *imageReader) inode(ctx context.Context, path string, in daxfs.Inode) error {
	if err := m.lim.checkPath(path); err != nil {
		return err
	}
	if !in.IsDir() && in.Nlink > 1 {
		if first, ok := m.first[in.Nid]; ok {
			return m.add(Change{Op: OpLink, Path: path, LinkTo: first})
		}
		m.first[in.Nid] = path
	}
	n := m.node()
	n.Mode, n.UID, n.GID, n.Mtime = in.Mode, in.UID, in.GID, in.Mtime
	if err := m.xattrs(in, n); err != nil {
		return err
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if err := m.file(ctx, in, n); err != nil {
			return err
		}
	case unix.S_IFLNK:
		var err error
		if n.Target, err = in.Target(); err != nil {
			return err
		}
		if err := m.keep(len(n.Target)); err != nil {
			return err
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Rdev = in.Rdev
	}
	return m.add(Change{Op: OpAdd, Path: path, Node: n})
}

// xattrs copies all attributes of an inode. The writer of the image has validated them.
func (m *imageReader) xattrs(in daxfs.Inode, n *daxfs.Node) error {
	list, err := in.Xattrs()
	if err != nil {
		return err
	}
	total := int64(0)
	for _, x := range list {
		total += int64(len(x.Name) + len(x.Value))
		n.Xattrs = append(n.Xattrs, x)
	}
	return m.sealXattrs(n, total)
}

func (m *imageReader) file(ctx context.Context, in daxfs.Inode, n *daxfs.Node) error {
	if err := m.content(in.Size); err != nil {
		return err
	}
	if in.Size == 0 {
		return nil
	}
	var err error
	if n.Data, err = m.store.Put(ctx, in.Size, io.NewSectionReader(&in, 0, in.Size)); err != nil {
		return fmt.Errorf("contents: %w", err)
	}
	return nil
}
