package main

import (
	"errors"
	"io/fs"
	"testing"
)

func TestMessage(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", ""},
		{`"/a b": größer, \x1b`, `"/a b": größer, \x1b`},
		{"walk a\x1b]0;title\x07\x9b2J\u202eb", `walk a\x1b]0;title\a\x9b2J\u202eb`},
		{"\xff\x00\r\t\u0085\x7f", `\xff\x00\r\t\u0085\x7f`},
		{"one\ndaxfs: two", "one\n  daxfs: two"},
	} {
		if got := message(&fs.PathError{Op: "x", Path: "y", Err: errors.New(c.in)}); got != "x y: "+c.want {
			t.Errorf("%q is shown as %q, expected %q", c.in, got, "x y: "+c.want)
		}
	}
}
