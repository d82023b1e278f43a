package daxfs

import (
	"cmp"
	"math"
	"slices"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
	"golang.org/x/sys/unix"
)

const (
	targetMax    = 4095    // bytes of a symlink target: a Linux path buffer without its NUL
	xattrNameMax = 255     // bytes of a full xattr name in Linux
	xattrListMax = 1 << 16 // bytes that listxattr(2) can return: the names of one inode, each with a NUL
	noID         = 1<<32 - 1
)

// checkName refuses an invalid name of a directory entry.
func checkName(name string) error {
	switch {
	case name == "":
		return invalid("an entry has no name")
	case name == "." || name == "..":
		return invalid("entry %q: the name is reserved", name)
	case len(name) > disk.ErofsNameMax:
		return invalid("entry %q: the name has %d bytes, expected at most %d", name, len(name), disk.ErofsNameMax)
	case strings.IndexByte(name, '/') >= 0 || strings.IndexByte(name, 0) >= 0:
		return invalid("entry %q: a name holds neither '/' nor NUL", name)
	}
	return nil
}

// checkNode refuses a node that an image cannot hold. Xattrs and entries are checked when they are planned.
func checkNode(n *Node) error {
	if n == nil {
		return invalid("the node is nil")
	}
	if n.Mode&^(unix.S_IFMT|0o7777) != 0 {
		return invalid("mode %#o: expected a file type and permissions, 16 bits", n.Mode)
	}
	if n.UID == noID || n.GID == noID {
		return invalid("owner %d:%d: id %d stands for no id", n.UID, n.GID, uint32(noID))
	}
	if n.Mtime.Nsec >= 1e9 {
		return invalid("modification time has %d nanoseconds, expected fewer than 1e9", n.Mtime.Nsec)
	}
	typ := n.Mode & unix.S_IFMT
	switch typ {
	case unix.S_IFREG:
		if err := checkData(n.Data); err != nil {
			return err
		}
	case unix.S_IFLNK:
		if n.Target == "" || len(n.Target) > targetMax || strings.IndexByte(n.Target, 0) >= 0 {
			return invalid("symlink target of %d bytes %.80q: expected 1 to %d bytes without NUL",
				len(n.Target), n.Target, targetMax)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if unix.Major(n.Rdev) > 0xfff || unix.Minor(n.Rdev) > 0xfffff ||
			n.Rdev != unix.Mkdev(unix.Major(n.Rdev), unix.Minor(n.Rdev)) {
			return invalid("device %d:%d: expected a major number of 12 bits and a minor number of 20",
				unix.Major(n.Rdev), unix.Minor(n.Rdev))
		}
	case unix.S_IFDIR, unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return invalid("mode %#o: unknown file type", n.Mode)
	}
	what := ""
	switch {
	case typ != unix.S_IFREG && n.Data.Size != 0:
		what = "contents"
	case typ != unix.S_IFLNK && n.Target != "":
		what = "a symlink target"
	case typ != unix.S_IFDIR && len(n.Entries) > 0:
		what = "entries"
	case typ != unix.S_IFCHR && typ != unix.S_IFBLK && n.Rdev != 0:
		what = "a device number"
	}
	if what != "" {
		return invalid("a %s cannot have %s", typeName(n.Mode), what)
	}
	return nil
}

func checkData(d Data) error {
	switch {
	case d.Size < 0:
		return invalid("size %d is negative", d.Size)
	case d.Size == 0:
		return nil
	case d.Off < 0 || d.Off%BlockSize != 0:
		return invalid("contents at %d: expected a multiple of %d", d.Off, BlockSize)
	case d.Off > math.MaxInt64-BlockSize-d.Size:
		return invalid("contents of %d bytes at %d: the end is beyond 63 bits", d.Size, d.Off)
	}
	return nil
}

// checkContents refuses files that overlap in part, as from a store with a corrupt index.
func (p *Plan) checkContents() error {
	type contents struct {
		off, size int64
		ino       int32
	}
	files := make([]contents, 0, p.stats.Files) // small, so that sorting stays in the CPU cache
	for i := range p.inodes.len() {
		if in := p.inodes.at(i); in.hasData() {
			files = append(files, contents{in.addr, in.size, int32(i)})
		}
	}
	slices.SortFunc(files, func(a, b contents) int {
		return cmp.Or(cmp.Compare(a.off, b.off), cmp.Compare(a.size, b.size), cmp.Compare(a.ino, b.ino))
	})
	for k := 1; k < len(files); k++ {
		x, y := files[k-1], files[k]
		if y.off >= roundUp(x.off+x.size, BlockSize) || x.off == y.off && x.size == y.size {
			continue
		}
		return &TreeError{p.path(y.ino), invalid("contents of %d bytes at %d overlap those of %q, %d bytes at %d",
			y.size, y.off, p.path(x.ino), x.size, x.off)}
	}
	return nil
}

// CheckXattr returns an error that wraps ErrInvalid if an image cannot hold x. It accepts user,
// trusted and security attributes and the two POSIX ACLs, in the form of getxattr(2): Linux serves no
// others from EROFS. NewPlan also checks the file type: see the rule xattr-type.
func CheckXattr(x Xattr) error {
	index, rest := splitXattr(x.Name)
	switch {
	case index == 0 || strings.IndexByte(x.Name, 0) >= 0 || len(x.Name) > xattrNameMax:
		return invalid("xattr %q: expected a name in user., trusted. or security. of at most %d bytes, or a POSIX ACL",
			x.Name, xattrNameMax)
	case rest == "" && index != disk.ErofsXattrACLAccess && index != disk.ErofsXattrACLDefault:
		return invalid("xattr %q has no name after its namespace", x.Name)
	case len(x.Value) > disk.ErofsXattrValueMax:
		return invalid("xattr %q: the value has %d bytes, expected at most %d", x.Name, len(x.Value),
			disk.ErofsXattrValueMax)
	}
	return checkXattrValue(index, x)
}

// splitXattr splits a full xattr name into name index and rest. Index 0 is an unknown namespace.
func splitXattr(name string) (uint8, string) {
	for _, i := range [...]uint8{disk.ErofsXattrACLAccess, disk.ErofsXattrACLDefault} {
		if name == disk.ErofsXattrPrefix(i) {
			return i, ""
		}
	}
	for _, i := range [...]uint8{disk.ErofsXattrUser, disk.ErofsXattrTrusted, disk.ErofsXattrSecurity} {
		if rest, ok := strings.CutPrefix(name, disk.ErofsXattrPrefix(i)); ok {
			return i, rest
		}
	}
	return 0, ""
}

// appendXattr appends the stored form of an attribute.
func appendXattr(b []byte, x Xattr) []byte {
	index, rest := splitXattr(x.Name)
	e := disk.ErofsXattrEntry{NameLen: uint8(len(rest)), Index: index, ValueLen: uint16(len(x.Value))}
	start := len(b)
	b = slices.Grow(b, e.Size())[:start+disk.ErofsXattrEntSize]
	e.Marshal(b[start:])
	b = append(append(b, rest...), x.Value...)
	return append(b, make([]byte, e.Size()-(len(b)-start))...)
}

// addXattrs plans the xattrs of one inode, sorted by name. Equal entries of all inodes share one id.
func (w *walker) addXattrs(mode uint32, xs []Xattr) ([]int32, error) {
	if len(xs) == 0 {
		return nil, nil
	}
	list := 0
	ids := make([]int32, 0, len(xs))
	for _, x := range xs {
		if err := CheckXattr(x); err != nil {
			return nil, err
		}
		index, _ := splitXattr(x.Name)
		if err := checkXattrType(index, x.Name, mode); err != nil {
			return nil, err
		}
		list += len(x.Name) + 1
		b := appendXattr(w.scratch[:0], x)
		w.scratch = b
		id, ok := w.entries[string(b)]
		if !ok {
			id = int32(len(w.plan.xattrs))
			enc := string(b)
			w.entries[enc] = id
			w.plan.xattrs = append(w.plan.xattrs, xattr{name: x.Name, enc: enc})
		}
		w.plan.xattrs[id].uses++
		ids = append(ids, id)
	}
	if list > xattrListMax {
		return nil, invalid("xattr names of %d bytes with their NULs, expected at most %d", list, xattrListMax)
	}
	all := w.plan.xattrs
	slices.SortFunc(ids, func(a, b int32) int { return strings.Compare(all[a].name, all[b].name) })
	for i := 1; i < len(ids); i++ {
		if all[ids[i]].name == all[ids[i-1]].name {
			return nil, invalid("xattr %q occurs twice", all[ids[i]].name)
		}
	}
	return ids, nil
}
