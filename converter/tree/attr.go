package tree

import (
	"bytes"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

const permissions = 0o7777

// implied gives a directory that no entry of the layer describes its attributes.
func (m *merger) implied(n *daxfs.Node) error {
	n.Mode = unix.S_IFDIR | 0o755
	return nil
}

// setAttributes gives an inode of the tree the attributes of an entry.
func (m *merger) setAttributes(n, from *daxfs.Node) error {
	n.Mtime = from.Mtime
	if m.exact {
		n.Mode = n.Mode&unix.S_IFMT | from.Mode&permissions
		n.UID, n.GID = from.UID, from.GID
		n.Xattrs = nil
		for _, x := range from.Xattrs {
			setXattr(n, x)
		}
		return nil
	}
	kind := n.Mode & unix.S_IFMT
	if from.UID != layer.KeepID {
		n.UID = from.UID
	}
	if from.GID != layer.KeepID {
		n.GID = from.GID
	}
	for _, x := range from.Xattrs {
		if strings.HasPrefix(x.Name, "user.") && kind != unix.S_IFREG && kind != unix.S_IFDIR {
			continue // the kernel refuses it, containerd ignores that
		}
		setXattr(n, x)
	}
	if kind != unix.S_IFLNK {
		n.Mode = kind | from.Mode&permissions
	}
	return nil
}

// setXattr sets an attribute to a copy of its value.
func setXattr(n *daxfs.Node, x daxfs.Xattr) {
	x.Value = bytes.Clone(x.Value)
	i := slices.IndexFunc(n.Xattrs, func(y daxfs.Xattr) bool { return y.Name == x.Name })
	if i < 0 {
		n.Xattrs = append(n.Xattrs, x)
		return
	}
	n.Xattrs[i] = x
}
