package tree

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// TestStripXattrs: nothing is left, and each loss is counted once for each inode.
func TestStripXattrs(t *testing.T) {
	file := func(xs ...string) *daxfs.Node {
		n := &daxfs.Node{Mode: unix.S_IFREG | 0o644}
		for _, x := range xs {
			n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: x, Value: []byte("v")})
		}
		return n
	}
	ping := file("security.capability", "user.a")
	root := &daxfs.Node{
		Mode: unix.S_IFDIR | 0o755, Xattrs: []daxfs.Xattr{{Name: "user.root"}},
		Entries: map[string]*daxfs.Node{
			"usr": {Mode: unix.S_IFDIR | 0o755, Entries: map[string]*daxfs.Node{
				"ping": ping, "ping6": ping, "arping": file("security.capability"), "plain": file(),
			}},
			"z": file("user.a"),
		},
	}
	want := []LostXattr{{"security.capability", 2, "usr/arping"}, {"user.a", 2, "usr/ping"}, {"user.root", 1, ""}}
	if got := StripXattrs(root); !reflect.DeepEqual(got, want) {
		t.Errorf("lost %+v, expected %+v", got, want)
	}
	if got := StripXattrs(root); len(got) != 0 {
		t.Errorf("a second time it lost %+v", got)
	}
}

// TestStripACL: the kernel shows the mask as the permissions of the group. Without the ACL, the group
// has the intersection of its entry and the mask, as after setfacl -b on a mode that chmod(1) took the
// mask from: it must not get what only the mask allows.
func TestStripACL(t *testing.T) {
	for group, want := range map[uint16]uint32{0: 0o604, 4: 0o644, 6: 0o664, 7: 0o664} {
		name := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(name, nil, 0o604); err != nil {
			t.Fatal(err)
		}
		list := acl{
			{aclUserObj, 6, aclNoID},
			{aclUser, 6, 5},
			{aclGroupObj, group, aclNoID},
			{aclMask, 6, aclNoID},
			{aclOther, 4, aclNoID},
		}
		if err := unix.Setxattr(name, aclAccess, list.value(), 0); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			t.Fatal(err)
		}
		if st.Mode != unix.S_IFREG|0o664 {
			t.Fatalf("with the ACL the mode is %#o, expected the mask for the group", st.Mode)
		}
		n := &daxfs.Node{Mode: st.Mode, Xattrs: []daxfs.Xattr{{Name: aclAccess, Value: list.value()}}}
		StripXattrs(n)
		if n.Mode != unix.S_IFREG|want {
			t.Errorf("group entry %o: mode %#o, expected %#o", group, n.Mode, unix.S_IFREG|want)
		}
	}
}
