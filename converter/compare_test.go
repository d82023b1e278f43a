package converter_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// compare compares an image with a source.
func compare(t *testing.T, name string, b []byte, o converter.Options) (list []string, err error) {
	t.Helper()
	src, err := source.Parse(name, source.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	img, err := daxfs.OpenBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	err = converter.Compare(t.Context(), src, img, o, func(f daxfs.Finding) bool {
		list = append(list, fmt.Sprintf("%s %s: %s", f.Rule, f.Path, f.Msg))
		return true
	})
	return list, err
}

// TestCompare compares images with their source, for all options.
func TestCompare(t *testing.T) {
	l := newLayout(t, packed(exampleLayers(), ocitest.Gzip)...)
	for _, o := range []converter.Options{{}, {NoAlign: true, Image: daxfs.Options{Label: "label"}}} {
		b, res := mustConvert(t, "oci:"+l.Dir, o)
		if list, err := compare(t, "oci:"+l.Dir, b, converter.Options{}); err != nil || len(list) > 0 {
			t.Errorf("%v, %q", err, list)
		}
		root, err := daxfs.ReadRootHash(daxfs.Mem(b), int64(len(b)))
		if err != nil || root != res.RootHash {
			t.Errorf("root hash %v, %v; the result says %v", root, err, res.RootHash)
		}
		if err := daxfs.Prove(t.Context(), daxfs.Mem(b), int64(len(b)), daxfs.ProveOptions{Root: &root},
			nil); err != nil {
			t.Error(err)
		}
		file := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if list, err := compare(t, "daxfs:"+file, b, converter.Options{}); err != nil || len(list) > 0 {
			t.Errorf("daxfs: %v, %q", err, list)
		}
	}
}

// TestCompareDiffers: each difference is found and located.
func TestCompareDiffers(t *testing.T) {
	base := func() []File {
		return []File{
			Dir("dir"), Reg("dir/file", noise(1, 10_000)), Reg("same", noise(1, 10_000)), Hard("dir/link", "dir/file"),
			Sym("sym", "dir/file"), Special('3', "null", 1, 3), Reg("note", "n").X("user.note", "hello"),
		}
	}
	image := func(files []File) string {
		return "oci:" + newLayout(t, ocitest.Layer{Tar: Tar(files...)}).Dir
	}
	b, _ := mustConvert(t, image(base()), converter.Options{})
	put := func(i int, f File) func([]File) []File {
		return func(files []File) []File {
			files[i] = f
			return files
		}
	}
	for name, c := range map[string]struct {
		edit func([]File) []File
		want string // the only finding, or empty
	}{
		"nothing":   {func(f []File) []File { return f }, ""},
		"contents":  {put(1, Reg("dir/file", noise(2, 10_000))), "source-data /dir/file: 10000 bytes have"},
		"size":      {put(1, Reg("dir/file", noise(1, 9_999))), "source-tree /dir/file: size is 10000, expected 9999"},
		"mode":      {put(2, base()[2].Perm(0o4755)), "source-tree /same: mode is 0100644, expected 0104755"},
		"owner":     {put(0, Dir("dir").Own(3, 4)), "source-tree /dir: owner is 0:0, expected 3:4"},
		"target":    {put(4, Sym("sym", "same")), `source-tree /sym: target is "dir/file", expected "same"`},
		"device":    {put(5, Special('3', "null", 1, 5)), "source-tree /null: device number is 0x103, expected 0x105"},
		"type":      {put(4, Reg("sym", "dir/file")), "source-tree /sym: mode is"},
		"attribute": {put(6, Reg("note", "n").X("user.note", "bye")), "source-tree /note: set of extended"},
		"missing": {
			func(f []File) []File { return append(f, Reg("dir/more", "")) },
			"source-tree /dir/more: the image has no",
		},
		"too many": {func(f []File) []File { return f[:6] }, "source-tree /note: the source has no such"},
		"no link":  {put(3, Reg("dir/link", noise(1, 10_000))), "source-tree /dir/link: it is a hard link to another"},
		"link":     {put(2, Hard("same", "dir/file")), "source-tree /same: it is a file of its own"},
	} {
		t.Run(name, func(t *testing.T) {
			list, err := compare(t, image(c.edit(base())), b, converter.Options{})
			one := len(list) == 1 && c.want != "" && strings.HasPrefix(list[0], c.want)
			if err != nil || !one && !(c.want == "" && len(list) == 0) {
				t.Errorf("got %q, %v; want %q", list, err, c.want)
			}
		})
	}
	// Changes in the image itself.
	other := bytes.Clone(b)
	img, err := daxfs.OpenBytes(other)
	if err != nil {
		t.Fatal(err)
	}
	in, err := img.Stat("same")
	if err != nil {
		t.Fatal(err)
	}
	other[in.Sys().(*daxfs.Stat).Off] ^= 1
	list, err := compare(t, image(base()), other, converter.Options{})
	want := []string{"source-data /dir/file: ", "source-data /same: "} // they share contents
	if err != nil || !slices.EqualFunc(list, want, strings.HasPrefix) {
		t.Errorf("a flip in the image: %q, %v", list, err)
	}
}

// TestCompareErrors: an impossible comparison is an error, not a difference.
func TestCompareErrors(t *testing.T) {
	l := newLayout(t, packed(exampleLayers(), ocitest.Gzip)...)
	b, _ := mustConvert(t, "oci:"+l.Dir, converter.Options{})
	if list, err := compare(t, "oci:"+t.TempDir(), b, converter.Options{}); err == nil || len(list) > 0 {
		t.Errorf("no source: %q, %v", list, err)
	}
	list, err := compare(t, "oci:"+l.Dir, b, converter.Options{MaxSize: 1 << 20})
	if !errors.Is(err, converter.ErrTooLarge) || len(list) > 0 {
		t.Errorf("too large: %q, %v", list, err)
	}
}

// TestDamagedImageFile: a changed image file is refused as a source.
func TestDamagedImageFile(t *testing.T) {
	l := newLayout(t, packed(exampleLayers(), ocitest.Gzip)...)
	b, _ := mustConvert(t, "oci:"+l.Dir, converter.Options{})
	b[daxfs.BlockSize+17] ^= 4
	file := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := convert(t, "daxfs:"+file, converter.Options{})
	if !errors.Is(err, daxfs.ErrCorrupt) || !strings.Contains(err.Error(), string(daxfs.RuleDigestData)) {
		t.Errorf("error %v", err)
	}
}
