package tree

import (
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// LostXattr is an extended attribute that StripXattrs removed.
type LostXattr struct {
	// Name is the full name of the attribute.
	Name string
	// Inodes is the number of inodes that had it.
	Inodes int
	// Path is the first name of such an inode in path order, from the root without a leading slash. It is
	// empty for the root itself, and when the paths of all attributes exceed 16 MiB.
	Path string
}

// maxLostPaths bounds the bytes of paths returned by StripXattrs: in a hostile image each inode may
// have an attribute with a different name.
const maxLostPaths = 16 << 20

// StripXattrs removes all extended attributes of a tree, for readers without support for them, and
// returns a list of them, sorted by name.
//
// The mode bits are adapted to the loss of the ACL. With an ACL, the group bits are its mask, which
// may allow more than the group's entry. Without it, they are the intersection of that entry and the
// mask. So only users and groups whose entry allowed them less than everybody gain access.
func StripXattrs(root *daxfs.Node) []LostXattr {
	s := stripper{lost: map[string]*LostXattr{}}
	s.node(root)
	list := make([]LostXattr, 0, len(s.lost))
	for _, name := range slices.Sorted(maps.Keys(s.lost)) {
		list = append(list, *s.lost[name])
	}
	return list
}

type stripper struct {
	lost  map[string]*LostXattr
	path  []string
	bytes int // of paths in lost
}

// node strips an inode and everything below it. A hard link has no attributes left at its second visit.
func (s *stripper) node(n *daxfs.Node) {
	for _, x := range n.Xattrs {
		l := s.lost[x.Name]
		if l == nil {
			l = &LostXattr{Name: x.Name}
			if path := strings.Join(s.path, "/"); s.bytes+len(path) <= maxLostPaths {
				s.bytes += len(path)
				l.Path = path
			}
			s.lost[x.Name] = l
		}
		l.Inodes++
		if x.Name == aclAccess {
			n.Mode = withoutACL(n.Mode, x.Value)
		}
	}
	n.Xattrs = nil
	for _, name := range slices.Sorted(maps.Keys(n.Entries)) {
		s.path = append(s.path, name)
		s.node(n.Entries[name])
		s.path = s.path[:len(s.path)-1]
	}
}

// withoutACL returns the mode of an inode after the loss of its ACL.
func withoutACL(mode uint32, value []byte) uint32 {
	a, ok, err := parseACL(value)
	if !ok || err != nil {
		return mode
	}
	for _, e := range a {
		if e.tag == aclGroupObj {
			mode &= ^uint32(unix.S_IRWXG) | uint32(e.perm)<<3
		}
	}
	return mode
}
