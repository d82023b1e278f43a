package daxfs_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// xattrCase is one attribute of one inode. The writer may refuse it.
type xattrCase struct {
	name  string
	typ   uint32
	index uint8
	rest  string // rest of the name
	value string
	rule  daxfs.Rule // expected of Check; "" if the attribute is valid
}

// le32 encodes numbers in little endian.
func le32(list ...uint32) string {
	var b []byte
	for _, n := range list {
		b = binary.LittleEndian.AppendUint32(b, n)
	}
	return string(b)
}

// aclOf encodes an ACL. An entry is tag, permissions and id.
func aclOf(entries ...[3]uint32) string {
	s := le32(2)
	for _, e := range entries {
		s += le32(e[0]|e[1]<<16, e[2])
	}
	return s
}

// xattrCases cover all namespaces of EROFS, the relevant file types, and Linux's treatment of values.
func xattrCases() []xattrCase {
	const (
		none   = 1<<32 - 1
		reg    = unix.S_IFREG
		user   = disk.ErofsXattrUser
		access = disk.ErofsXattrACLAccess
		byDir  = disk.ErofsXattrACLDefault
		secure = disk.ErofsXattrSecurity
		typ    = daxfs.RuleXattrType
		acls   = daxfs.RuleXattrACL
		capab  = daxfs.RuleXattrCaps
		caps   = "capability"
	)
	owner, group, other := [3]uint32{1, 6, none}, [3]uint32{4, 4, none}, [3]uint32{32, 4, none}
	mask, named, team := [3]uint32{16, 4, none}, [3]uint32{2, 4, 7}, [3]uint32{8, 4, 7}
	cases := []xattrCase{
		{"capability version 1", reg, secure, caps, le32(1<<24, 1, 0), capab},
		{"capability version 2", reg, secure, caps, le32(2<<24, 1, 0, 0, 0), ""},
		{"capability version 2 effective", reg, secure, caps, le32(2<<24|1, 1<<10, 1, 1, 1), ""},
		{"capability all bits", reg, secure, caps, le32(2<<24, none, none, none, none), ""},
		{"capability version 2 flag", reg, secure, caps, le32(2<<24|2, 1, 0, 0, 0), capab},
		{"capability version 2 short", reg, secure, caps, le32(2<<24, 1, 0, 0), capab},
		{"capability version 2 long", reg, secure, caps, le32(2<<24, 1, 0, 0, 0, 0), capab},
		{"capability version 3", reg, secure, caps, le32(3<<24, 1, 0, 0, 0, 1000), ""},
		{"capability version 3 effective", reg, secure, caps, le32(3<<24|1, 1, 0, 0, 0, 1000), ""},
		{"capability version 3 short", reg, secure, caps, le32(3<<24, 1, 0, 0, 0), capab},
		{"capability version 3 root", reg, secure, caps, le32(3<<24, 1, 0, 0, 0, 0), capab},
		{"capability version 3 nobody", reg, secure, caps, le32(3<<24, 1, 0, 0, 0, none), capab},
		{"capability version 4", reg, secure, caps, le32(4<<24, 1, 0, 0, 0), capab},
		{"capability header", reg, secure, caps, le32(2 << 24), capab},
		{"capability byte", reg, secure, caps, "\x02", capab},
		{"capability empty", reg, secure, caps, "", capab},
		{"capability text", reg, secure, caps, "cap_net_raw+ep", capab},
		{"capability large", reg, secure, caps, strings.Repeat("x", 5000), capab},
		{"capability of a directory", unix.S_IFDIR, secure, caps, le32(2<<24, 1, 0, 0, 0), ""},
		{"capability of a directory broken", unix.S_IFDIR, secure, caps, "x", capab},
		{"capability of a fifo", unix.S_IFIFO, secure, caps, le32(2<<24, 1, 0, 0, 0), ""},
		{"capability of a fifo broken", unix.S_IFIFO, secure, caps, "x", capab},
		{"capability of a link", unix.S_IFLNK, secure, caps, le32(2<<24, 1, 0, 0, 0), ""},
		{"capability of a link broken", unix.S_IFLNK, secure, caps, "x", capab},
		{"capability in upper case", reg, secure, "Capability", "x", ""},
		{"capability with more name", reg, secure, "capability2", "x", ""},
		{"capability of a user", reg, user, caps, "x", ""},
		{"capability trusted", reg, disk.ErofsXattrTrusted, caps, "x", ""},

		{"ACL", reg, access, "", aclOf(owner, group, other), ""},
		{"ACL with users and groups", reg, access, "", aclOf(owner, named, named, group, team, team, mask, other), ""},
		{"ACL with a mask alone", reg, access, "", aclOf(owner, group, mask, other), ""},
		{"ACL of ids in any order", reg, access, "", aclOf(owner, [3]uint32{2, 4, 9}, named, group, mask, other), ""},
		{"ACL version alone", reg, access, "", le32(2), acls},
		{"ACL version 3", reg, access, "", le32(3) + aclOf(owner, group, other)[4:], acls},
		{"ACL cut", reg, access, "", aclOf(owner, group, other)[:27], acls},
		{"ACL of 3 bytes", reg, access, "", "\x02\x00\x00", acls},
		{"ACL tag 0", reg, access, "", aclOf([3]uint32{0, 6, none}, group, other), acls},
		{"ACL tag 64", reg, access, "", aclOf(owner, group, [3]uint32{64, 4, none}, other), acls},
		{"ACL tag 3", reg, access, "", aclOf(owner, group, [3]uint32{3, 4, none}, other), acls},
		{"ACL user nobody", reg, access, "", aclOf(owner, [3]uint32{2, 4, none}, group, mask, other), acls},
		{"ACL group nobody", reg, access, "", aclOf(owner, group, [3]uint32{8, 4, none}, mask, other), acls},
		{"ACL owner with id", reg, access, "", aclOf([3]uint32{1, 6, 5}, group, other), acls},
		{"ACL mask with id", reg, access, "", aclOf(owner, group, [3]uint32{16, 4, 5}, other), acls},
		{"ACL others with id", reg, access, "", aclOf(owner, group, [3]uint32{32, 4, 0}), acls},
		{"ACL without others", reg, access, "", aclOf(owner, group), acls},
		{"ACL owner alone", reg, access, "", aclOf(owner), acls},
		{"ACL without others, with users", reg, access, "", aclOf(owner, named, group, mask), acls},
		{"default ACL", unix.S_IFDIR, byDir, "", aclOf(owner, named, group, mask, other), ""},
		{"default ACL broken", unix.S_IFDIR, byDir, "", le32(3), acls},
		{"ACL of a directory", unix.S_IFDIR, access, "", aclOf(owner, named, group, mask, other), ""},
		{"ACL of a directory without others", unix.S_IFDIR, access, "", aclOf(owner, group), acls},
		{"default ACL of a file", reg, byDir, "", aclOf(owner, group, other), ""},
		{"ACL of a link", unix.S_IFLNK, access, "", aclOf(owner, group, other), typ},
		{"default ACL of a link", unix.S_IFLNK, byDir, "", aclOf(owner, group, other), typ},
		{"ACL of a fifo", unix.S_IFIFO, access, "", aclOf(owner, group, other), ""},
		{"ACL of a socket", unix.S_IFSOCK, access, "", aclOf(owner, group, other), ""},
		{"ACL of a device", unix.S_IFCHR, access, "", aclOf(owner, group, other), ""},
	}
	for _, index := range []uint8{0, 5, 7, 64, 128, 129, 134, 255} { // 5 is lustre, 128 and above are long prefixes
		cases = append(cases,
			xattrCase{fmt.Sprint("namespace ", index), reg, index, "name", "value", daxfs.RuleXattrName})
	}
	types := []uint32{reg, unix.S_IFDIR, unix.S_IFLNK, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR, unix.S_IFBLK}
	for _, t := range types {
		rule := daxfs.Rule("")
		if t != reg && t != unix.S_IFDIR {
			rule = typ
		}
		cases = append(cases, xattrCase{fmt.Sprintf("user of %#o", t), t, user, "name", "value", rule})
		for _, name := range []string{"ima", "evm", "selinux", "SMACK64", "apparmor", "x"} {
			cases = append(cases,
				xattrCase{fmt.Sprintf("security.%s of %#o", name, t), t, secure, name, "\x00\xff", ""})
		}
		opaque := xattrCase{fmt.Sprintf("trusted of %#o", t), t, disk.ErofsXattrTrusted, "overlay.opaque", "y", ""}
		cases = append(cases, opaque)
	}
	for index, prefix := range map[uint8]string{
		user: "user.", disk.ErofsXattrTrusted: "trusted.",
		secure: "security.",
	} {
		full := daxfs.MaxName - len(prefix)
		cases = append(cases,
			xattrCase{prefix + " longest name", reg, index, strings.Repeat("n", full), "v", ""},
			xattrCase{prefix + " name too long", reg, index, strings.Repeat("n", full+1), "v", daxfs.RuleXattrName},
			xattrCase{prefix + " no name", reg, index, "", "v", daxfs.RuleXattrName},
			xattrCase{prefix + " NUL in the name", reg, index, "a\x00b", "v", daxfs.RuleXattrName},
			xattrCase{prefix + " name of bytes", reg, index, "\xff/\x01 .", "v", ""},
			xattrCase{prefix + " longest value", reg, index, "n", strings.Repeat("v", 65535), ""},
			xattrCase{prefix + " empty value", reg, index, "n", "", ""},
		)
	}
	return cases
}

// image makes an image in which the attribute replaces another one of the same size.
func (c *xattrCase) image(t *testing.T) []byte {
	t.Helper()
	s := newStore(daxfs.BlockSize)
	size := len(c.rest) + len(c.value)
	name := min(max(len(c.rest), 1), 247)
	n := &daxfs.Node{Mode: c.typ | 0o664, UID: 5, GID: 6}
	n.Xattrs = []daxfs.Xattr{{
		Name: "trusted." + strings.Repeat("x", name), Value: bytes.Repeat([]byte("y"), min(max(size-name, 0), 65535)),
	}}
	switch c.typ {
	case unix.S_IFREG:
		n.Data = s.put([]byte("contents"))
	case unix.S_IFLNK:
		n.Target = "target"
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Rdev = unix.Mkdev(1, 3)
	}
	_, b := s.fileImage(t, dir(map[string]*daxfs.Node{"it": n}), daxfs.Options{})
	o := operate(t, b)
	x := o.xattrs("it")[disk.ErofsXattrHdrSize:]
	clear(x)
	e := disk.ErofsXattrEntry{NameLen: uint8(len(c.rest)), Index: c.index, ValueLen: uint16(len(c.value))}
	if e.Size() != len(x) {
		t.Fatalf("an entry of %d bytes in place of one of %d", e.Size(), len(x))
	}
	e.Marshal(x)
	copy(x[disk.ErofsXattrEntSize:], c.rest+c.value)
	return o.close()
}

// TestKernelXattrs: Check accepts exactly those attributes that the kernel shows as they are stored.
func TestKernelXattrs(t *testing.T) {
	mountNamespace(t)
	for _, c := range xattrCases() {
		t.Run(c.name, func(t *testing.T) {
			b := c.image(t)
			var rules []string
			for _, f := range findings(t, b) {
				rules = append(rules, string(f.Rule))
			}
			if got := strings.Join(rules, " "); got != string(c.rule) {
				t.Errorf("Check finds %q, expected %q", got, c.rule)
			}
			// The kernel first lists the names, then returns each value.
			mnt, _ := mountImage(t, "loop", writeTemp(t, b), 0, int64(len(b)))
			bad := c.differs(mnt + "/it")
			if (bad == "") != (c.rule == "") {
				t.Errorf("the kernel: %q; rule %q", bad, c.rule)
			}
		})
	}
}

// differs returns the differences between the kernel's view and the stored attribute.
func (c *xattrCase) differs(host string) string {
	name := disk.ErofsXattrPrefix(c.index) + c.rest
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(host, buf)
	if err != nil || string(buf[:n]) != name+"\x00" {
		return fmt.Sprintf("list %.100q %v", buf[:max(n, 0)], err)
	}
	n, err = unix.Lgetxattr(host, name, buf)
	if err != nil || string(buf[:n]) != c.value {
		return fmt.Sprintf("value %.100q %v", buf[:max(n, 0)], err)
	}
	if c.typ == unix.S_IFLNK {
		return ""
	}
	// A user who is neither owner nor in the group has the access that the ACL grants.
	if err := unix.Faccessat(unix.AT_FDCWD, host, unix.R_OK, 0); err != nil {
		return fmt.Sprintf("access %v", err)
	}
	return ""
}

// TestKernelXattrList has the longest list of names that Linux returns, and one that is a byte longer.
func TestKernelXattrList(t *testing.T) {
	s := newStore(daxfs.BlockSize)
	n := &daxfs.Node{Mode: unix.S_IFREG | 0o644, Data: s.put([]byte("contents"))}
	for i := range 255 {
		n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: fmt.Sprintf("trusted.%0247d", i)})
	}
	n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: "user.last", Value: []byte("1")},
		daxfs.Xattr{Name: "user." + strings.Repeat("n", 240)})
	_, longest := s.fileImage(t, dir(map[string]*daxfs.Node{"it": n}), daxfs.Options{})

	o := operate(t, bytes.Clone(longest))
	x := o.xattrs("it")
	at := strings.Index(string(x), "last")
	x[at-4]++ // turn a byte of the value into one of the name
	x[at-2]--
	longer := o.close()
	list := findings(t, longer)
	if len(list) != 1 || list[0].Rule != daxfs.RuleXattrList {
		t.Errorf("findings %v, expected %s", list, daxfs.RuleXattrList)
	}

	mountNamespace(t)
	for want, b := range map[error][]byte{nil: longest, unix.E2BIG: longer} {
		mnt, _ := mountImage(t, "loop", writeTemp(t, b), 0, int64(len(b)))
		if size, err := unix.Llistxattr(mnt+"/it", make([]byte, 1<<17)); !isErr(err, want) ||
			err == nil && size != 1<<16 {
			t.Errorf("the kernel lists %d bytes, %v; expected %v", size, err, want)
		}
	}
}
