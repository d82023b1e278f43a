package tree

import (
	"archive/tar"
	"testing"
	"time"

	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

type stack [][]File

func (s stack) tars() [][]byte {
	var out [][]byte
	for _, files := range s {
		out = append(out, Tar(files...))
	}
	return out
}

// rules has one stack of layers for each rule. What must come of it is not written here: containerd says it.
var rules = map[string]stack{
	"empty":                    {{}},
	"types":                    {{Dir("d"), Reg("d/f", "x"), Sym("d/s", "f"), Hard("d/h", "d/f"), Special(tar.TypeFifo, "d/p", 0, 0), Special(tar.TypeChar, "d/c", 1, 3), Special(tar.TypeBlock, "d/b", 259, 70000)}},
	"whiteout":                 {{Dir("d"), Reg("d/a", "1"), Reg("d/b", "2")}, {Reg("d/.wh.a", "")}},
	"whiteout of a directory":  {{Dir("d"), Dir("d/e"), Reg("d/e/f", "1")}, {Reg(".wh.d", "")}},
	"opaque first":             {{Dir("d"), Reg("d/a", "1"), Dir("d/e"), Reg("d/e/x", "1")}, {Dir("d"), Reg("d/.wh..wh..opq", ""), Reg("d/b", "2")}},
	"opaque last":              {{Dir("d"), Reg("d/a", "1"), Dir("d/e"), Reg("d/e/x", "1")}, {Dir("d"), Reg("d/b", "2"), Dir("d/e"), Reg("d/e/y", ""), Reg("d/.wh..wh..opq", "")}},
	"file becomes directory":   {{Reg("a", "1")}, {Dir("a"), Reg("a/b", "2")}, {Reg("a", "3")}},
	"link to lower layer":      {{Reg("a", "1").Own(5, 6)}, {Hard("b", "a").Own(7, 8).Perm(0o600)}},
	"link outlives its target": {{Reg("a", "1"), Hard("b", "a")}, {Reg(".wh.a", "")}},
	"link chain":               {{Reg("a", "1"), Hard("b", "a"), Hard("c", "b")}, {Reg("b", "2")}},
	"missing parents":          {{Reg("a/b/c", "1")}, {Reg("a/x/y", "2")}},
	"symlink parent":           {{Dir("c"), Sym("a", "c")}, {Reg("a/b", "1"), Dir("a/d").At(time.Unix(5, 0))}},
	"below a file":             {{Reg("a", "1")}, {Reg("a/b", "1")}},
	"root entry":               {{Dir("./").Perm(0o700).Own(1, 2)}},
}

func TestRules(t *testing.T) {
	requireRoot(t)
	for name, s := range rules {
		t.Run(name, func(t *testing.T) { compare(t, s.tars()) })
	}
}
