package daxfs_test

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"golang.org/x/sys/unix"
)

// TestRandomTrees writes random trees as files and as windows, and reads both halves back.
func TestRandomTrees(t *testing.T) {
	seeds := uint64(150)
	if testing.Short() {
		seeds = 30
	}
	for seed := range seeds {
		n := 3 + int(seed*seed)%400
		var uuid [2][16]byte
		for i, start := range []int64{daxfs.BlockSize, 16 << 20} {
			s := newStore(start)
			root := randomTree(1000+seed, n, s)
			var p *daxfs.Plan
			var img []byte
			base := int64(0) // base of the image in the space of Data.Off
			if i == 0 {
				p, img = s.fileImage(t, root, daxfs.Options{})
			} else {
				base = 2 << 20
				p, img = s.windowImage(t, root, base)
			}
			uuid[i] = p.UUID()
			compareHalves(t, img, base, root, s)
			if t.Failed() {
				t.Fatalf("seed %d, start %d", seed, start)
			}
		}
		if uuid[0] != uuid[1] {
			t.Errorf("seed %d: the place counts for the UUID", seed)
		}
	}
}

func compareHalves(t *testing.T, img []byte, base int64, root *daxfs.Node, s *store) {
	t.Helper()
	want := map[string]*daxfs.Node{}
	links := map[*daxfs.Node]uint32{}
	v8 := 0
	var walk func(path string, n *daxfs.Node)
	walk = func(path string, n *daxfs.Node) {
		want[path] = n
		if inV8(n) {
			v8++
		}
		links[n]++
		if n.Mode&unix.S_IFMT == unix.S_IFDIR {
			links[n] = 2
		}
		for name, k := range n.Entries {
			if k.Mode&unix.S_IFMT == unix.S_IFDIR {
				links[n]++
			}
			if path == "." {
				walk(name, k)
			} else {
				walk(path+"/"+name, k)
			}
		}
	}
	walk(".", root)

	f, err := daxfs.OpenBytes(img)
	if err != nil {
		t.Fatal(err)
	}
	d, err := daxfs.OpenDAXFS(bytes.NewReader(img), int64(len(img)))
	if err != nil {
		t.Fatal(err)
	}
	names := 0
	nids := map[uint64]*daxfs.Node{}
	err = f.Walk(func(path string, in daxfs.Inode) error {
		names++
		n := want[path]
		if n == nil {
			return fmt.Errorf("%q was never there", path)
		}
		if old := nids[in.Nid]; old != nil && old != n {
			t.Errorf("%q: nid %d is that of another file", path, in.Nid)
		}
		nids[in.Nid] = n
		if in.Mtime != n.Mtime || in.Rdev != n.Rdev {
			t.Errorf("%q: time %v, device %#x, expected %v, %#x", path, in.Mtime, in.Rdev, n.Mtime, n.Rdev)
		}
		got, err := in.Xattrs()
		if err != nil {
			return err
		}
		byName := func(a, b daxfs.Xattr) int { return cmp.Compare(a.Name, b.Name) }
		if !slices.EqualFunc(slices.SortedFunc(slices.Values(got), byName),
			slices.SortedFunc(slices.Values(n.Xattrs), byName),
			func(a, b daxfs.Xattr) bool { return a.Name == b.Name && bytes.Equal(a.Value, b.Value) }) {
			t.Errorf("%q: xattrs %q, expected %q", path, got, n.Xattrs)
		}
		return compareInode(t, img, base, path, in, n, links[n], s)
	})
	if err != nil || names != len(want) {
		t.Errorf("EROFS half: %d names, %v; expected %d", names, err, len(want))
	}
	names = 0
	err = d.Walk(func(path string, in daxfs.Inode) error {
		names++
		n := want[path]
		if n == nil || !inV8(n) {
			return fmt.Errorf("%q was never there", path)
		}
		return compareInode(t, img, base, path, in, n, links[n], s)
	})
	if err != nil || names != v8 {
		t.Errorf("DAXFS half: %d names, %v; expected %d", names, err, v8)
	}
}

func inV8(n *daxfs.Node) bool {
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
		return true
	}
	return false
}

// compareInode compares the fields that both halves have.
func compareInode(t *testing.T, img []byte, base int64, path string, in daxfs.Inode, n *daxfs.Node, nlink uint32,
	s *store,
) error {
	t.Helper()
	if in.Mode != n.Mode || in.UID != n.UID || in.GID != n.GID || in.Nlink != nlink {
		t.Errorf("%q: mode %o, owner %d:%d, %d links; expected %o, %d:%d, %d", path, in.Mode, in.UID, in.GID, in.Nlink,
			n.Mode, n.UID, n.GID, nlink)
	}
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		if target, err := in.Target(); err != nil || target != n.Target {
			t.Errorf("%q: target %q, %v; expected %q", path, target, err, n.Target)
		}
	case unix.S_IFREG:
		if in.Size != n.Data.Size {
			t.Errorf("%q: %d bytes, expected %d", path, in.Size, n.Data.Size)
		}
		off, size, ok := in.Data()
		if n.Data.Size > 0 && (!ok || off != n.Data.Off-base || size != n.Data.Size ||
			!bytes.Equal(img[off:off+size], s.get(n.Data))) {
			t.Errorf("%q: contents of %d bytes at %d (%v), expected %d at %d", path, size, off, ok, n.Data.Size,
				n.Data.Off-base)
		}
	}
	return nil
}
