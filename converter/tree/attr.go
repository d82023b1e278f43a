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

// setAttributes gives an inode the attributes of an entry, with the effects of the system calls of
// containerd's applier: chown, setxattr, chmod, utimes.
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
			// The kernel refuses it, and containerd ignores the error.
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

// asShown returns an attribute in the form of getxattr(2): capability sets of version 3 with root user
// 0 become version 2, which has no root.
func asShown(x daxfs.Xattr) daxfs.Xattr {
	const end2 = 20 // end of the sets; the root follows in version 3
	if v := x.Value; x.Name == capability && len(v) > end2 && v[3] == 3 && !slices.ContainsFunc(v[end2:], notZero) {
		x.Value = append([]byte{v[0], 0, 0, 2}, v[4:end2]...)
	}
	return x
}

func notZero(b byte) bool { return b != 0 }

// chown sets the owner like chown(2), which removes file capabilities.
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

// The attributes of an inode are sorted by name: a hostile layer may have thousands of them.

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

// setXattrs sets several attributes. Inserting many one by one would move the later ones each time.
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
		if i+1 == len(n.Xattrs) || n.Xattrs[i+1].Name != x.Name { // the last one of a name counts
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
	maxXattrList  = 64 << 10  // bytes that listxattr(2) can return: names, each with a NUL
	maxXattrBytes = 128 << 10 // bytes of names and values: with their headers they fit the 256 KiB of an EROFS inode
)

// checkXattrs bounds the sum of attributes from several layers.
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
