package daxfs_test

import (
	"bytes"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// TestRules: every rule is explained in docs/format.md, and a test breaks it.
func TestRules(t *testing.T) {
	doc, err := os.ReadFile("../docs/format.md")
	if err != nil {
		t.Fatal(err)
	}
	tested := map[daxfs.Rule]bool{
		daxfs.RuleDirDepth: true, daxfs.RuleV8DirDepth: true, // TestDeep
		daxfs.RuleXattrList: true, // TestKernelXattrList
	}
	for _, c := range corruptions {
		tested[c.rule] = true
	}
	tested[daxfs.RuleDigestRoot] = true // TestRootHash
	for _, c := range lies {
		tested[c.rule] = true
	}
	for _, c := range liveCorruptions {
		tested[c.rule] = true
	}
	for _, r := range declaredRules() {
		if n := bytes.Count(doc, []byte("| `"+r+"` | ")); n != 1 {
			t.Errorf("rule %s: docs/format.md explains it %d times, want 1", r, n)
		}
		if !tested[r] {
			t.Errorf("rule %s: no test breaks it", r)
		}
	}
	for r := range tested {
		if !slices.Contains(declaredRules(), r) {
			t.Errorf("rule %s is tested, but not declared in rules.go", r)
		}
	}
}

// declaredRules returns the constants of type Rule in the source.
var declaredRules = sync.OnceValue(func() []daxfs.Rule {
	f, err := parser.ParseFile(token.NewFileSet(), "rules.go", nil, 0)
	if err != nil {
		panic(err)
	}
	var rules []daxfs.Rule
	ast.Inspect(f, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if typ, ok := v.Type.(*ast.Ident); ok && typ.Name == "Rule" {
			id, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				panic(err)
			}
			rules = append(rules, daxfs.Rule(id))
		}
		return true
	})
	return rules
})

// TestDeep: walks of both halves refuse trees deep enough to exhaust a stack, and Check reports them.
func TestDeep(t *testing.T) {
	// The writer accepts no deeper tree. So make two deep trees and hang the second below the first.
	chain := func(n int, last map[string]*daxfs.Node) *daxfs.Node {
		at := dir(last)
		for range n {
			at = dir(map[string]*daxfs.Node{strings.Repeat("d", 250): at})
		}
		return at
	}
	_, b := newStore(daxfs.BlockSize).fileImage(t, dir(map[string]*daxfs.Node{
		"first": chain(130, map[string]*daxfs.Node{"x": dir(nil)}), "second": chain(140, nil),
	}), daxfs.Options{})
	o := operate(t, b)
	leaf := "first" + strings.Repeat("/"+strings.Repeat("d", 250), 130)
	x, second, end := o.lookup(leaf+"/x").Nid, o.lookup("second").Nid, o.lookup(leaf).Nid
	x8, second8 := o.lookupV8(leaf+"/x").Nid, o.lookupV8("second").Nid
	o.dirent(leaf+"/x", "..", func(d *disk.ErofsDirent) { d.Nid = o.f.Root() })
	o.dirent("second", "..", func(d *disk.ErofsDirent) { d.Nid = end })
	o.dirent(leaf, "x", func(d *disk.ErofsDirent) { d.Nid = second })
	o.dirent(".", "second", func(d *disk.ErofsDirent) { d.Nid = x })
	o.direntV8(leaf, "x", func(d *disk.V8Dirent) { d.Ino = uint32(second8) })
	o.direntV8(".", "second", func(d *disk.V8Dirent) { d.Ino = uint32(x8) })
	b = o.close()

	for _, f := range findings(t, b) {
		if f.Rule != daxfs.RuleDirDepth && f.Rule != daxfs.RuleInodes {
			t.Errorf("finding: %.300v", f)
		}
	}
	walks := map[daxfs.Rule]func(func(string, daxfs.Inode) error) error{
		daxfs.RuleDirDepth:   o.f.Walk,
		daxfs.RuleV8DirDepth: o.d.Walk,
	}
	for rule, walk := range walks {
		err := walk(func(string, daxfs.Inode) error { return nil })
		var f *daxfs.FormatError
		if !errors.As(err, &f) || f.Rule != rule {
			t.Errorf("got %.300v, want rule %s", err, rule)
		}
	}
	if _, err := o.f.Stat(strings.Repeat("d/", 1<<16) + "d"); !isErr(err, fs.ErrInvalid) {
		t.Errorf("stat of a long path: got %.100v", err)
	}
}

// TestErrors pins the form of errors.
func TestErrors(t *testing.T) {
	b := patient(t)
	s := operate(t, b)
	s.raw("one")[1] = 1
	nid := s.lookup("two").Nid
	_, err := s.f.Stat("one")
	var f *daxfs.FormatError
	if !errors.As(err, &f) || f.Rule != daxfs.RuleInodeFormat || f.Ino == 0 || f.Off <= 0 ||
		!errors.Is(err, daxfs.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
	want := "stat one: unsupported image: format is 0x101, expected bits 4 to 15 to be 0 " +
		"(rule inode-format, inode 31, offset 62432)"
	if err.Error() != want {
		t.Errorf("got  %v\nwant %v", err, want)
	}
	if in, err := s.f.Inode(nid); err != nil || in.Size != 3 {
		t.Errorf("got %v, %v", in, err)
	}
}

// TestACLOrder tries every sequence of up to five entries: only the order that the kernel accepts is an ACL.
func TestACLOrder(t *testing.T) {
	// Owner, named users, owning group, named groups, mask, others.
	sound := regexp.MustCompile(`^(ogt|ou*gn*mt)$`)
	tags := map[byte]byte{'o': 0x01, 'u': 0x02, 'g': 0x04, 'n': 0x08, 'm': 0x10, 't': 0x20}
	accepted := 0
	var try func(order string)
	try = func(order string) {
		value := []byte{2, 0, 0, 0}
		for _, e := range []byte(order) {
			id := []byte{0xff, 0xff, 0xff, 0xff}
			if e == 'u' || e == 'n' {
				id = []byte{7, 0, 0, 0}
			}
			value = append(append(value, tags[e], 0, 5, 0), id...)
		}
		_, err := daxfs.NewPlan(dir(map[string]*daxfs.Node{"f": withXattr("system.posix_acl_access", value)}),
			daxfs.Options{})
		if err == nil {
			accepted++
		}
		if want := sound.MatchString(order); want != (err == nil) || err != nil && !errors.Is(err, daxfs.ErrInvalid) {
			t.Errorf("entries %q: %v, expected an ACL: %t", order, err, want)
		}
		if len(order) < 5 {
			for e := range tags {
				try(order + string(e))
			}
		}
	}
	try("")
	if accepted != 4 {
		t.Errorf("%d orders are accepted", accepted)
	}
}
