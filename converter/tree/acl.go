package tree

import (
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// The kernel interprets POSIX ACLs: chmod(2) changes them, files inherit them, and an ACL equal to the
// mode bits is not stored. Merge does the same, because containerd leaves the outcome of that on disk.
// The value is a 4-byte version, then 8 bytes for each entry: tag, permissions, id.

const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"

	aclVersion = 2
	aclHeader  = 4
	aclEntry   = 8

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
	aclNoID     = 1<<32 - 1
)

type acl []ace

type ace struct {
	tag, perm uint16
	id        uint32
}

// parseACL returns the entries of a value, which may be incomplete or out of order: see valid. ok is
// false for a version unknown to the kernel, which containerd ignores.
func parseACL(value []byte) (a acl, ok bool, err error) {
	if len(value) == 0 {
		return nil, true, nil
	}
	if len(value) >= aclHeader && binary.LittleEndian.Uint32(value) != aclVersion {
		return nil, false, nil
	}
	if len(value) < aclHeader || (len(value)-aclHeader)%aclEntry != 0 {
		return nil, false, fmt.Errorf("%w: ACL of %d bytes", layer.ErrInvalid, len(value))
	}
	for b := value[aclHeader:]; len(b) > 0; b = b[aclEntry:] {
		e := ace{binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:]), binary.LittleEndian.Uint32(b[4:])}
		switch e.tag {
		case aclUser, aclGroup:
			if e.id == aclNoID {
				return nil, false, errACL
			}
		case aclUserObj, aclGroupObj, aclMask, aclOther:
			e.id = aclNoID
		default:
			return nil, false, errACL
		}
		a = append(a, e)
	}
	return a, true, nil
}

var errACL = fmt.Errorf("%w: ACL with missing, misplaced or malformed entries", layer.ErrInvalid)

// valid reports whether the entries are complete and in order: owner, users, group, groups, mask
// (required with users or groups), others.
func (a acl) valid() bool {
	at, extended, masked := uint16(0), false, false
	for _, e := range a {
		if e.perm > 7 {
			return false
		}
		switch e.tag {
		case aclUserObj:
			if at != 0 {
				return false
			}
		case aclUser, aclGroup:
			extended = true
			if e.tag == aclUser && at != aclUserObj || e.tag == aclGroup && at != aclGroupObj {
				return false
			}
			continue
		case aclGroupObj:
			if at != aclUserObj {
				return false
			}
		case aclMask:
			masked = true
			if at != aclGroupObj {
				return false
			}
		case aclOther:
			if at != aclMask && at != aclGroupObj || extended && !masked {
				return false
			}
		default:
			return false
		}
		at = e.tag
	}
	return at == aclOther
}

// chmod returns a with the permissions of owner, others, and mask or group taken from the mode.
func (a acl) chmod(mode uint32) acl {
	a = slices.Clone(a)
	group := -1
	for i := range a {
		switch a[i].tag {
		case aclUserObj:
			a[i].perm = uint16(mode >> 6 & 7)
		case aclOther:
			a[i].perm = uint16(mode & 7)
		case aclMask:
			group = i
		case aclGroupObj:
			if group < 0 {
				group = i
			}
		}
	}
	if group >= 0 {
		a[group].perm = uint16(mode >> 3 & 7)
	}
	return a
}

// minimal reports whether a is equal to mode bits.
func (a acl) minimal() bool {
	return !slices.ContainsFunc(a, func(e ace) bool { return e.tag&(aclUser|aclGroup|aclMask) != 0 })
}

func (a acl) value() []byte {
	b := binary.LittleEndian.AppendUint32(make([]byte, 0, aclHeader+aclEntry*len(a)), aclVersion)
	for _, e := range a {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

// setACL applies an ACL like setxattr(2), except for the mode bits, which the caller sets afterwards.
func setACL(n *daxfs.Node, x daxfs.Xattr) error {
	a, ok, err := parseACL(x.Value)
	if err != nil || !ok {
		return err
	}
	kind := n.Mode & unix.S_IFMT
	if kind == unix.S_IFLNK {
		return nil // no file system supports it; ignored
	}
	if len(a) > 0 && !a.valid() {
		return errACL
	}
	if x.Name == aclDefault && kind != unix.S_IFDIR {
		if len(a) == 0 {
			return nil
		}
		return fmt.Errorf("%w: default ACL of something that is not a directory", layer.ErrInvalid)
	}
	if len(a) == 0 || x.Name == aclAccess && a.minimal() {
		removeXattr(n, x.Name)
		return nil
	}
	setXattr(n, daxfs.Xattr{Name: x.Name, Value: a.value()})
	return nil
}

// maxInherited bounds the bytes of inherited ACLs. An ACL of 64 KiB is one entry of a layer, but each
// file below it, 512 bytes in the layer, gets a copy.
const maxInherited = 256 << 20

// inheritACL gives a new inode the ACLs of its directory.
func (m *Merger) inheritACL(n, dir *daxfs.Node) error {
	if len(dir.Xattrs) == 0 || n.Mode&unix.S_IFMT == unix.S_IFLNK {
		return nil
	}
	value, ok := getXattr(dir, aclDefault)
	if !ok {
		return nil
	}
	if m.inherited += 2 * int64(len(value)); m.inherited > maxInherited {
		return fmt.Errorf("%w: more than %d bytes of inherited ACLs", layer.ErrLimit, maxInherited)
	}
	if n.Mode&unix.S_IFMT == unix.S_IFDIR {
		setXattr(n, daxfs.Xattr{Name: aclDefault, Value: value})
	}
	if a, ok, err := parseACL(value); ok && err == nil && !a.minimal() {
		setXattr(n, daxfs.Xattr{Name: aclAccess, Value: value})
	}
	return nil
}

// chmod sets the permission bits of an inode other than a symbolic link, like chmod(2).
func chmod(n *daxfs.Node, mode uint32) {
	n.Mode = n.Mode&unix.S_IFMT | mode&permissions
	if len(n.Xattrs) == 0 {
		return
	}
	if value, ok := getXattr(n, aclAccess); ok {
		if a, ok, err := parseACL(value); ok && err == nil {
			setXattr(n, daxfs.Xattr{Name: aclAccess, Value: a.chmod(mode).value()})
		}
	}
}
