package tree

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// Small layers that demand very much. Without the tested bound, each test would need hours or all memory.

func add(path string, mode uint32) layer.Change {
	return layer.Change{Op: layer.OpAdd, Path: path, Node: &daxfs.Node{Mode: mode}}
}

// TestInheritedACLsAreBounded: a default ACL of 64 KiB with many files below it.
func TestInheritedACLsAreBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("slow: merges 200 000 entries")
	}
	big := acl{{aclUserObj, 7, aclNoID}}
	for i := range 8000 {
		big = append(big, ace{aclUser, 5, uint32(i)})
	}
	big = append(big, ace{aclGroupObj, 5, aclNoID}, ace{aclMask, 7, aclNoID}, ace{aclOther, 0, aclNoID})
	dir := add("d", unix.S_IFDIR|0o755)
	dir.Node.Xattrs = []daxfs.Xattr{{Name: aclDefault, Value: big.value()}}
	few, many := treetest.LayerOf(dir), &layer.Layer{}
	for i := range 100 {
		few.Append(add(fmt.Sprintf("d/%d", i), unix.S_IFREG|0o644))
	}
	for i := range 100_000 {
		many.Append(add(fmt.Sprintf("d/%d", i), unix.S_IFREG|0o644))
	}
	root, err := Merge([]*layer.Layer{few})
	if err != nil {
		t.Fatal(err)
	}
	if got := len(root.Entries["d"].Entries["7"].Xattrs); got != 1 {
		t.Errorf("a file has %d ACLs, expected the one it inherits", got)
	}
	if _, err := Merge([]*layer.Layer{few, many}); !errors.Is(err, layer.ErrLimit) {
		t.Errorf("%v, expected ErrLimit", err)
	}
	// Implied directories inherit, too.
	many = &layer.Layer{}
	for i := range 100_000 {
		many.Append(add(fmt.Sprintf("d/%d/x", 1000+i), unix.S_IFREG|0o644))
	}
	if _, err := Merge([]*layer.Layer{few, many}); !errors.Is(err, layer.ErrLimit) {
		t.Errorf("%v, expected ErrLimit", err)
	}
}

// TestResolutionIsBounded: parents that lead through the maximum of links, at the end of long paths.
func TestResolutionIsBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("slow: resolves millions of links")
	}
	deep := strings.Repeat("d/", 100)
	links := &layer.Layer{}
	for i := range 200 {
		l := add(fmt.Sprintf("%sl%d", deep, i), unix.S_IFLNK|0o777)
		l.Node.Target = fmt.Sprintf("l%d", i+1)
		links.Append(l)
	}
	links.Append(add(deep+"l200", unix.S_IFDIR|0o755))
	links.Append(add("other", unix.S_IFDIR|0o755))
	through := &layer.Layer{}
	for i := range 50 {
		through.Append(add(fmt.Sprintf("%sl0/%d", deep, i), unix.S_IFREG|0o644))
		through.Append(add(fmt.Sprintf("other/%d", i), unix.S_IFREG|0o644))
	}
	stack := []*layer.Layer{links, through}
	if _, err := Merge(stack); err != nil {
		t.Errorf("some of them are no attack: %v", err)
	}
	for range 1000 { // every layer adds little
		stack = append(stack, through)
	}
	if _, err := Merge(stack); !errors.Is(err, layer.ErrLimit) {
		t.Errorf("%v, expected ErrLimit", err)
	}
}

// TestManyXattrs: attributes of one inode in the worst order, from two layers.
func TestManyXattrs(t *testing.T) {
	some := func(n int, prefix, value string) *layer.Layer {
		d := add("d", unix.S_IFDIR|0o755)
		for i := range n {
			d.Node.Xattrs = append(d.Node.Xattrs,
				daxfs.Xattr{Name: fmt.Sprintf("user.%s%04d", prefix, i), Value: []byte(value)})
		}
		return treetest.LayerOf(d)
	}
	z, a, again := some(2000, "z", "z"), some(2000, "a", "a"), some(1000, "z", "new")
	// z, then a before it, then half of z again.
	stack := []*layer.Layer{z}
	for range 100 {
		stack = append(stack, a, again)
	}
	root, err := Merge(stack)
	if err != nil {
		t.Fatal(err)
	}
	xs := root.Entries["d"].Xattrs
	if len(xs) != 4000 {
		t.Fatalf("%d xattrs, expected 4000", len(xs))
	}
	for i, x := range xs {
		want := "a"
		if i >= 2000 {
			want = "new"
		}
		if i >= 3000 {
			want = "z"
		}
		if string(x.Value) != want || i > 0 && xs[i-1].Name >= x.Name {
			t.Fatalf("xattr %d is %q=%q, expected the value %q", i, x.Name, x.Value, want)
		}
	}
	if string(treetest.Changes(z)[0].Node.Xattrs[0].Value) != "z" {
		t.Error("a layer was changed")
	}
}

// TestOpaqueIsLinear makes every directory of a large tree opaque, the deepest first and the deepest last.
func TestOpaqueIsLinear(t *testing.T) {
	deep := strings.TrimSuffix(strings.Repeat("d/", 1000), "/")
	lower, upper := &layer.Layer{}, &layer.Layer{}
	for i := range 50_000 {
		lower.Append(add(fmt.Sprintf("%s/%d", deep, i), unix.S_IFREG|0o644))
	}
	for n := len(deep); n > 0; n -= 2 {
		upper.Append(layer.Change{Op: layer.OpOpaque, Path: deep[:n]})
	}
	for n := 1; n <= len(deep); n += 2 {
		for range 20 {
			upper.Append(layer.Change{Op: layer.OpOpaque, Path: deep[:n]})
		}
	}
	root, err := Merge([]*layer.Layer{lower, upper})
	if err != nil {
		t.Fatal(err)
	}
	// Each marker makes its directory, wherever its parent's marker stands.
	n, depth := root, 0
	for n = root.Entries["d"]; n != nil; n = n.Entries["d"] {
		depth++
	}
	if depth != 1000 {
		t.Errorf("%d directories are left, expected 1000", depth)
	}
}
