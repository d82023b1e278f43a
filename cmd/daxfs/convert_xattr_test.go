package main

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// TestConvertNoXattrs: convert lists the lost attributes, also with --quiet, but at most a screenful.
func TestConvertNoXattrs(t *testing.T) {
	dir := t.TempDir()
	layout := ocitest.NewLayout(t, filepath.Join(dir, "layout"))
	many := treetest.Reg("z", "text")
	for _, c := range "abcdefghijk" {
		many = many.X("user."+string(c), "v")
	}
	layout.Tag("v1", layout.Manifest(ocitest.LinuxAMD64, ocitest.Layer{Tar: treetest.Tar(
		treetest.Reg("f", "text").X("user.a", "1"), treetest.Reg("g", "text").X("user.a\x1b", "2"), many,
	)}))
	var out, errs bytes.Buffer
	args := []string{
		"daxfs", "convert", "--no-xattrs", "-q", "--json", "-o", filepath.Join(dir, "image"),
		"oci:" + layout.Dir,
	}
	if status := run(t.Context(), args, nil, &out, &errs); status != statusOK {
		t.Fatalf("convert: %s", &errs)
	}
	lines := strings.Split(strings.TrimSpace(errs.String()), "\n")
	for i, want := range map[int]string{
		0:  "daxfs: left out the extended attribute user.a of 2 inodes, the first is /f",
		1:  `daxfs: left out the extended attribute "user.a\x1b" of 1 inodes, the first is /g`,
		10: "daxfs: left out 2 more extended attributes",
	} {
		if len(lines) != 11 || lines[i] != want {
			t.Errorf("it says:\n%s\nexpected 11 lines, and line %d to be %q", &errs, i, want)
		}
	}
	var made summary
	if err := json.Unmarshal(out.Bytes(), &made); err != nil {
		t.Fatal(err)
	}
	first := lostXattr{Name: "user.a", Inodes: 2, Path: "/f"}
	if l := made.LostXattrs; len(l) != 12 || !reflect.DeepEqual(l[0], first) || made.Counts.WithXattrs != 0 {
		t.Errorf("the summary is %+v", made)
	}
}
