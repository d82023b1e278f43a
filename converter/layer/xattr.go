package layer

import (
	"archive/tar"
	"encoding/binary"
	"slices"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

const (
	capabilityXattr = "security.capability"
	aclAccessXattr  = "system.posix_acl_access"
	aclDefaultXattr = "system.posix_acl_default"
)

// xattrs copies those extended attributes of a tar entry that containerd sets: it never sets
// trusted.*, and it ignores namespaces unknown to file systems.
func (t *tarReader) xattrs(hdr *tar.Header, n *daxfs.Node) error {
	total := int64(0)
	for record, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(record, xattrRecord)
		if !ok {
			continue
		}
		if name == "" || len(name) > maxXattrNm {
			return invalidf("xattr name of %d bytes", len(name))
		}
		if !settable(name) {
			t.layer.Stats.IgnoredXattrs++
			continue
		}
		if err := checkXattr(name, value); err != nil {
			return err
		}
		total += int64(len(name) + len(value))
		n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: name, Value: []byte(value)})
	}
	return t.sealXattrs(n, total)
}

// sealXattrs sorts and counts the attributes of an entry. total is the size of their names and values.
func (b *builder) sealXattrs(n *daxfs.Node, total int64) error {
	if total == 0 {
		return nil
	}
	if total > b.lim.MaxXattrBytes {
		return limitError("bytes of xattrs of one entry", b.lim.MaxXattrBytes)
	}
	if err := b.spend(xattrCost(len(n.Xattrs))); err != nil {
		return err
	}
	slices.SortFunc(n.Xattrs, func(a, b daxfs.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return b.keep(int(total))
}

// settable reports whether the kernel stores an attribute of that name and containerd sets it. An
// image can also hold trusted.*.
func settable(name string) bool {
	return strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "security.") ||
		name == aclAccessXattr || name == aclDefaultXattr
}

// checkXattr refuses what setxattr(2) refuses.
func checkXattr(name, value string) error {
	if len(value) > maxXattr {
		return limitError("bytes of an xattr", maxXattr)
	}
	if strings.IndexByte(name, 0) >= 0 {
		return invalidf("xattr %q: name with a NUL byte", name)
	}
	if name == "user." || name == "security." {
		return invalidf("xattr %q: nothing behind the namespace", name)
	}
	if name == capabilityXattr && !validCapability(value) {
		return invalidf("xattr %q: not a capability set of version 2 or 3", name)
	}
	return nil
}

// validCapability checks a struct vfs_ns_cap_data: a revision with the only flag known to the kernel,
// and in version 3, behind the sets, the root user.
func validCapability(v string) bool {
	if len(v) < 4 {
		return false
	}
	const effective = 1
	switch revision := binary.LittleEndian.Uint32([]byte(v[:4])) &^ effective; revision {
	case 2 << 24:
		return len(v) == 20
	case 3 << 24:
		return len(v) == 24 && v[20:] != "\xff\xff\xff\xff"
	}
	return false
}
