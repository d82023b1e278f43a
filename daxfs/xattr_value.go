package daxfs

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// capabilityName is the attribute whose value Linux parses before it returns it.
const capabilityName = "security.capability"

// A value of security.capability is a header with a revision and one flag, two sets of 64 bits, and in
// revision 3 the id of the user who is root in the user namespace of these sets.
const (
	capRevision2 = 2 << 24
	capRevision3 = 3 << 24
	capEffective = 1
	capSize2     = 20
	capSize3     = 24
)

// A POSIX ACL is a version of 4 bytes, then entries of 8 bytes: tag, permissions and id.
const (
	aclVersion = 2
	aclHeader  = 4
	aclEntry   = 8

	aclOwner  = 0x01
	aclUser   = 0x02
	aclGroup  = 0x04 // the owning group
	aclGroupN = 0x08 // a group that the entry names
	aclMask   = 0x10
	aclOther  = 0x20
)

func isACL(index uint8) bool {
	return index == disk.ErofsXattrACLAccess || index == disk.ErofsXattrACLDefault
}

// checkXattrType refuses attributes that Linux lists for any inode but returns only for some file types.
func checkXattrType(index uint8, name string, mode uint32) error {
	typ := mode & unix.S_IFMT
	switch {
	case isACL(index) && typ == unix.S_IFLNK,
		index == disk.ErofsXattrUser && typ != unix.S_IFREG && typ != unix.S_IFDIR:
		return invalid("xattr %q: Linux never returns it for a %s", name, typeName(mode))
	}
	return nil
}

// checkXattrValue refuses values that Linux parses and then does not return, or returns in another form.
func checkXattrValue(index uint8, x Xattr) error {
	switch {
	case isACL(index):
		return checkACL(x)
	case index == disk.ErofsXattrSecurity && x.Name == capabilityName:
		return checkCapability(x)
	}
	return nil
}

// checkCapability refuses values that make getxattr(2) fail or change the value, or execve(2) fail.
// Revision 1 fails in getxattr only. Linux converts sets of revision 3 with root user 0 to revision 2.
func checkCapability(x Xattr) error {
	v := x.Value
	if len(v) < 4 {
		return invalid("xattr %q: %d bytes, expected %d or %d", x.Name, len(v), capSize2, capSize3)
	}
	le := binary.LittleEndian
	switch head := le.Uint32(v); {
	case head&^capEffective == capRevision2 && len(v) == capSize2:
		return nil
	case head&^capEffective == capRevision3 && len(v) == capSize3:
		if root := le.Uint32(v[capSize2:]); root == 0 || root == noID {
			return invalid("xattr %q: sets for user %d as root, expected revision 2 for user 0 and never user %d",
				x.Name, root, uint32(noID))
		}
		return nil
	default:
		return invalid("xattr %q: header %#x and %d bytes, expected revision 2 with %d or revision 3 with %d", x.Name,
			head, len(v), capSize2, capSize3)
	}
}

// checkACL refuses ACLs that make accesses to the file fail: the kernel parses the ACL before it checks
// a permission (EINVAL, EOPNOTSUPP) and expects a deciding entry (EIO). An entry without a named user or
// group must store the id that the kernel shows for it, so that all readers show the same bytes.
func checkACL(x Xattr) error {
	v := x.Value
	if len(v) < aclHeader+aclEntry || (len(v)-aclHeader)%aclEntry != 0 || binary.LittleEndian.Uint32(v) != aclVersion {
		return invalid("xattr %q: %d bytes are not a POSIX ACL of version 2 with entries", x.Name, len(v))
	}
	last, named, masked := uint16(0), false, false
	for e := v[aclHeader:]; len(e) > 0; e = e[aclEntry:] {
		tag, perm, id := binary.LittleEndian.Uint16(e), binary.LittleEndian.Uint16(e[2:]),
			binary.LittleEndian.Uint32(e[4:])
		switch tag {
		case aclOwner, aclGroup, aclMask, aclOther:
			if id != noID {
				return invalid("xattr %q: an entry of tag %#x names id %d, expected %d", x.Name, tag, id, uint32(noID))
			}
			masked = masked || tag == aclMask
		case aclUser, aclGroupN:
			if id == noID {
				return invalid("xattr %q: an entry names id %d", x.Name, uint32(noID))
			}
			named = true
		default:
			return invalid("xattr %q: unknown entry tag %#x", x.Name, tag)
		}
		if !aclFollows(last, tag) {
			return invalid("xattr %q: an entry of tag %#x follows one of tag %#x, expected owner, users, group, "+
				"groups, mask, others", x.Name, tag, last)
		}
		if perm > 7 {
			return invalid("xattr %q: permissions of an entry are %#o, expected 3 bits", x.Name, perm)
		}
		last = tag
	}
	if last != aclOther || named && !masked {
		return invalid("xattr %q: expected entries for owner, group and others, and a mask with users or groups",
			x.Name)
	}
	return nil
}

// aclFollows reports whether an entry of tag may follow one of tag last; 0 stands for the start.
func aclFollows(last, tag uint16) bool {
	switch tag {
	case aclOwner:
		return last == 0
	case aclUser, aclGroup:
		return last == aclOwner || last == aclUser
	case aclGroupN, aclMask:
		return last == aclGroup || last == aclGroupN
	default: // aclOther
		return last == aclGroup || last == aclGroupN || last == aclMask
	}
}
