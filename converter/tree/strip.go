package tree

import (
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// LostXattr is an extended attribute that StripXattrs took away.
type LostXattr struct {
	// Name is the full name of the attribute.
	Name string
	// Inodes is how many inodes had it.
	Inodes int
	// Path is a name of one of these, from the root without a slash before it: the first one in the order of names. It is
	// empty for the root itself, and where the paths of all attributes would take more than 16 MiB.
	Path string
}

// maxLostPaths bounds the bytes of the paths in the result of StripXattrs: each inode of a hostile image may have an
// attribute with a name of its own.
const maxLostPaths = 16 << 20

// StripXattrs takes all extended attributes of a tree away, for readers that know none, and returns which ones it had,
// by name.
//
// The mode bits become what they are without an ACL. With one, those of the group are the mask, which may allow more
// than the ACL allows the group: it gets what its entry and the mask both have. So nobody can do more without the ACL
// than with it, except those whom a user's or a group's entry allowed less than it allows everybody.
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

// node strips an inode and all below it. A hard link comes several times, the second time without attributes.
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

// withoutACL returns the mode of an inode that loses its ACL.
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
