package tree

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

const (
	permissions = 0o7777
	capability  = "security.capability"
)

// setAttributes gives an inode of the tree the attributes of an entry, with the system calls of containerd's applier in
// mind: chown, setxattr, chmod, utimes.
func (m *Merger) setAttributes(n, from *daxfs.Node) error {
	n.Mtime = from.Mtime
	if m.exact {
		n.Mode = n.Mode&unix.S_IFMT | from.Mode&permissions
		n.UID, n.GID = from.UID, from.GID
		n.Xattrs = nil
		setXattrs(n, from.Xattrs)
		return nil
	}
	chown(n, from.UID, from.GID)
	kind := n.Mode & unix.S_IFMT
	var plain []daxfs.Xattr
	for _, x := range from.Xattrs {
		switch {
		case x.Name == aclAccess || x.Name == aclDefault:
			if err := setACL(n, x); err != nil {
				return fmt.Errorf("xattr %q: %w", x.Name, err)
			}
		case strings.HasPrefix(x.Name, "user.") && kind != unix.S_IFREG && kind != unix.S_IFDIR:
			// The kernel refuses it, containerd ignores that.
		default:
			plain = append(plain, asShown(x))
		}
	}
	setXattrs(n, plain)
	if kind != unix.S_IFLNK {
		chmod(n, from.Mode)
	}
	if len(from.Xattrs) > 0 {
		return checkXattrs(n)
	}
	return nil
}

// asShown returns an attribute as getxattr(2) shows it: capability sets of version 3 whose root is user 0 have the form of
// version 2, which has no root.
func asShown(x daxfs.Xattr) daxfs.Xattr {
	const end2 = 20 // of the sets; what version 3 has behind them is the root
	if v := x.Value; x.Name == capability && len(v) > end2 && v[3] == 3 && !slices.ContainsFunc(v[end2:], notZero) {
		x.Value = append([]byte{v[0], 0, 0, 2}, v[4:end2]...)
	}
	return x
}

func notZero(b byte) bool { return b != 0 }

// chown sets the owner as chown(2) does, which takes the capabilities of a program away.
func chown(n *daxfs.Node, uid, gid uint32) {
	if uid != layer.KeepID {
		n.UID = uid
	}
	if gid != layer.KeepID {
		n.GID = gid
	}
	if n.Mode&unix.S_IFMT != unix.S_IFDIR {
		removeXattr(n, capability)
	}
}

// The tree keeps the attributes of an inode sorted by name: a hostile layer may have thousands of them.

func findXattr(n *daxfs.Node, name string) (int, bool) {
	return slices.BinarySearchFunc(n.Xattrs, name,
		func(x daxfs.Xattr, name string) int { return strings.Compare(x.Name, name) })
}

func getXattr(n *daxfs.Node, name string) ([]byte, bool) {
	i, ok := findXattr(n, name)
	if !ok {
		return nil, false
	}
	return n.Xattrs[i].Value, true
}

// setXattr sets an attribute to a copy of its value.
func setXattr(n *daxfs.Node, x daxfs.Xattr) {
	x.Value = bytes.Clone(x.Value)
	i, ok := findXattr(n, x.Name)
	if ok {
		n.Xattrs[i] = x
		return
	}
	n.Xattrs = slices.Insert(n.Xattrs, i, x)
}

// setXattrs is setXattr for any number. Setting many one at a time would move those behind each of them every time.
func setXattrs(n *daxfs.Node, xs []daxfs.Xattr) {
	const few = 16
	if len(xs) <= few {
		for _, x := range xs {
			setXattr(n, x)
		}
		return
	}
	for _, x := range xs {
		n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: x.Name, Value: bytes.Clone(x.Value)})
	}
	slices.SortStableFunc(n.Xattrs, func(a, b daxfs.Xattr) int { return strings.Compare(a.Name, b.Name) })
	kept := n.Xattrs[:0]
	for i, x := range n.Xattrs {
		if i+1 == len(n.Xattrs) || n.Xattrs[i+1].Name != x.Name { // of one name, the last counts
			kept = append(kept, x)
		}
	}
	clear(n.Xattrs[len(kept):])
	n.Xattrs = kept
}

func removeXattr(n *daxfs.Node, name string) {
	if i, ok := findXattr(n, name); ok {
		n.Xattrs = slices.Delete(n.Xattrs, i, i+1)
	}
}

const (
	maxXattrList  = 64 << 10  // bytes that listxattr(2) can return: names with a NUL each
	maxXattrBytes = 128 << 10 // bytes of names and values; the 256 KiB of an EROFS inode hold them with their headers
)

// checkXattrs bounds what the entries of several layers add up to.
func checkXattrs(n *daxfs.Node) error {
	names, all := 0, 0
	for _, x := range n.Xattrs {
		names += len(x.Name) + 1
		all += len(x.Name) + len(x.Value)
	}
	if names > maxXattrList || all > maxXattrBytes {
		return fmt.Errorf("%w: xattrs add up to %d bytes of names and %d in all, expected at most %d and %d",
			layer.ErrLimit, names, all, maxXattrList, maxXattrBytes)
	}
	return nil
}
