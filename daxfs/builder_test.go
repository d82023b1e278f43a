package daxfs_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"golang.org/x/sys/unix"
)

var regular = daxfs.Node{Mode: unix.S_IFREG | 0o644}

// build makes an image from files by their path, in the given order.
func build(t testing.TB, o daxfs.BuilderOptions, files ...string) (*daxfs.Plan, []byte) {
	t.Helper()
	f := &memFile{b: bytes.Repeat([]byte("old"), 5000)}
	b := daxfs.NewBuilder(f, o)
	for i := 0; i < len(files); i += 2 {
		if err := b.Add(files[i], regular, strings.NewReader(files[i+1])); err != nil {
			t.Fatal(err)
		}
	}
	p, err := b.Finish()
	if err != nil {
		t.Fatal(err)
	}
	mustCheck(t, f.b)
	fsys, err := daxfs.OpenBytes(f.b)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(files); i += 2 {
		got, err := fsys.ReadFile(files[i])
		if err != nil || string(got) != files[i+1] {
			t.Errorf("%s: %d bytes, %v; expected %d", files[i], len(got), err, len(files[i+1]))
		}
	}
	return p, f.b
}

func dataOf(t testing.TB, img []byte, path string) int64 {
	t.Helper()
	fsys, err := daxfs.OpenBytes(img)
	if err != nil {
		t.Fatal(err)
	}
	info, err := fsys.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*daxfs.Stat).Off
}

func TestBuilderLayout(t *testing.T) {
	const huge = daxfs.HugeSize
	large := strings.Repeat("0123456789abcdef", huge/16)
	small := strings.Repeat("s", 5000)
	files := []string{
		"a/first", "1", "b/large", large + "tail", "c/small", small, "d/same", small, "e/large again", large + "tail",
		"f/other", large + "tale", "g/exact", large, "h/exact again", large, "i/empty", "", "j/last", "2",
	}
	_, img := build(t, daxfs.BuilderOptions{}, files...)
	at := func(path string) int64 { return dataOf(t, img, path) }
	if at("b/large") != huge || at("f/other") != 3*huge || at("g/exact") != 5*huge {
		t.Errorf("large files at %d, %d and %d", at("b/large"), at("f/other"), at("g/exact"))
	}
	if at("a/first") != daxfs.BlockSize || at("c/small") != 2*daxfs.BlockSize || at("j/last") != 4*daxfs.BlockSize {
		t.Errorf("small files at %d, %d, %d; expected in the gap", at("a/first"), at("c/small"), at("j/last"))
	}
	if at("d/same") != at("c/small") || at("e/large again") != at("b/large") || at("h/exact again") != at("g/exact") {
		t.Error("equal contents are stored twice")
	}
	if zero := img[5*daxfs.BlockSize : huge]; len(bytes.Trim(zero, "\x00")) != 0 {
		t.Error("the rest of the gap is not zero")
	}

	p, img := build(t, daxfs.BuilderOptions{Unaligned: true}, files...)
	blocks := int64(1 + 513 + 2 + 513 + 512 + 1)
	if got, want := int64(len(img)), daxfs.BlockSize*(1+blocks)+p.MetaSize(); got != want {
		t.Errorf("unaligned: %d bytes, expected %d", got, want)
	}
}

func TestBuilderTree(t *testing.T) {
	f := &memFile{}
	b := daxfs.NewBuilder(f, daxfs.BuilderOptions{Options: daxfs.Options{Label: "tree"}})
	null := daxfs.Node{Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)}
	for _, err := range []error{
		b.Add("/usr/bin/env", regular, strings.NewReader("env")),
		b.Link("usr/bin/copy", "/usr/bin/env"),
		b.Add("usr", daxfs.Node{Mode: unix.S_IFDIR | 0o711, UID: 3}, nil), // after what is in it
		b.Add("", daxfs.Node{Mode: unix.S_IFDIR | 0o700, Mtime: daxfs.Time{Sec: 9}}, nil),
		b.Add("dev/null", null, nil),
		b.Add("link", *symlink("usr"), nil),
		b.Add("none", regular, nil),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		err  error
		want string
	}{
		"root twice":      {b.Add("/", daxfs.Node{Mode: unix.S_IFDIR}, nil), "already"},
		"dir twice":       {b.Add("usr", daxfs.Node{Mode: unix.S_IFDIR}, nil), "already"},
		"file twice":      {b.Add("none", regular, nil), "already"},
		"file over dir":   {b.Add("usr/bin", regular, nil), "already"},
		"root file":       {b.Add(".", regular, nil), "already"},
		"below a file":    {b.Add("none/x", regular, nil), "not a directory"},
		"dotdot":          {b.Add("usr/../x", regular, nil), "reserved"},
		"two slashes":     {b.Add("usr//x", regular, nil), "no name"},
		"bad node":        {b.Add("bad", daxfs.Node{Mode: unix.S_IFREG, UID: 1<<32 - 1}, nil), "owner"},
		"device contents": {b.Add("dev/x", null, strings.NewReader("x")), "contents"},
		"entries":         {b.Add("e", *dir(map[string]*daxfs.Node{"x": &null}), nil), "entries"},
		"link to none":    {b.Link("l", "nowhere"), "not there"},
		"link to dir":     {b.Link("l", "usr"), "directory"},
		"link over file":  {b.Link("none", "link"), "already"},
		"link from root":  {b.Link("", "link"), "already"},
	} {
		if !errors.Is(c.err, daxfs.ErrInvalid) || !strings.Contains(c.err.Error(), c.want) {
			t.Errorf("%s: error %v, expected %q", name, c.err, c.want)
		}
	}
	p, err := b.Finish()
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Add("late", regular, nil); err == nil {
		t.Error("a finished image takes files")
	}
	if _, err := b.Finish(); err == nil {
		t.Error("an image can be finished twice")
	}
	mustCheck(t, f.b)
	fsys, err := daxfs.OpenBytes(f.b)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"usr/bin/env", "usr/bin/copy"} {
		if got, err := fsys.ReadFile(name); string(got) != "env" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if s := p.Stats(); s.Inodes != 8 || s.Names != 8 {
		t.Errorf("stats %+v", s)
	}
	info, err := fsys.Stat("usr")
	if err != nil {
		t.Fatal(err)
	}
	if st := info.Sys().(*daxfs.Stat); st.Mode != unix.S_IFDIR|0o711 || st.UID != 3 || st.Nlink != 3 {
		t.Errorf("usr: %+v", st)
	}
}

// failing is a file that fails in one way.
type failing struct {
	memFile
	write, read, cut bool
}

var errDisk = errors.New("disk is broken")

func (f *failing) WriteAt(p []byte, off int64) (int, error) {
	if f.write {
		return 0, errDisk
	}
	return f.memFile.WriteAt(p, off)
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	if f.read {
		return 0, errDisk
	}
	return f.memFile.ReadAt(p, off)
}

func (f *failing) Truncate(n int64) error {
	if f.cut {
		return errDisk
	}
	return f.memFile.Truncate(n)
}

// TestBuilderErrors breaks the file or the reader at each place: the error comes out, now and from every later call.
func TestBuilderErrors(t *testing.T) {
	large := strings.Repeat("x", daxfs.HugeSize+1)
	add := func(content string) func(*daxfs.Builder) error {
		n := 0
		return func(b *daxfs.Builder) error {
			n++
			return b.Add(strings.Repeat("f", n), regular, strings.NewReader(content))
		}
	}
	for name, c := range map[string]struct {
		f     failing
		first func(*daxfs.Builder) error
		do    func(*daxfs.Builder) error
	}{
		"empty":       {f: failing{cut: true}, do: add("x")},
		"small":       {f: failing{write: true}, do: add("x")},
		"large":       {f: failing{write: true}, do: add(large)},
		"small again": {f: failing{read: true}, first: add("x"), do: func(b *daxfs.Builder) error { return b.Add("2", regular, strings.NewReader("x")) }},
		"large again": {f: failing{read: true}, first: add(large), do: func(b *daxfs.Builder) error { return b.Add("2", regular, strings.NewReader(large)) }},
		"finish":      {f: failing{write: true}, do: func(b *daxfs.Builder) error { _, err := b.Finish(); return err }},
		"reader": {do: func(b *daxfs.Builder) error {
			return b.Add("r", regular, io.MultiReader(strings.NewReader("x"), iotest.ErrReader(errDisk)))
		}},
		"reader of a large file": {do: func(b *daxfs.Builder) error {
			return b.Add("r", regular, io.MultiReader(strings.NewReader(large), iotest.ErrReader(errDisk)))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			f := c.f
			f.write, f.read = false, false
			b := daxfs.NewBuilder(&f, daxfs.BuilderOptions{})
			if c.first != nil {
				if err := c.first(b); err != nil {
					t.Fatal(err)
				}
			}
			f.write, f.read = c.f.write, c.f.read
			if err := c.do(b); !errors.Is(err, errDisk) {
				t.Errorf("error %v, expected that of the disk", err)
			}
			f.write, f.read, f.cut = false, false, false
			if _, err := b.Finish(); err == nil {
				t.Error("the image was finished all the same")
			}
		})
	}
}

// TestWriteErrors fails each write of a plan in turn.
func TestWriteErrors(t *testing.T) {
	s := newStore(daxfs.BlockSize)
	p, _ := s.fileImage(t, randomTree(2, 4000, s), daxfs.Options{})
	for n := 0; ; n++ {
		f := &countdown{left: n}
		err := p.WriteTo(f)
		if f.left >= 0 {
			if err != nil || n < 2 {
				t.Errorf("%d writes, error %v", n, err)
			}
			break
		}
		if !errors.Is(err, errDisk) {
			t.Errorf("write %d fails: error %v", n, err)
		}
		if f.super {
			t.Errorf("write %d fails, and superblocks are written all the same", n)
		}
	}
}

type countdown struct {
	left  int
	super bool
}

func (c *countdown) WriteAt(p []byte, off int64) (int, error) {
	if c.left--; c.left < 0 {
		return 0, errDisk
	}
	c.super = c.super || off == 0
	return len(p), nil
}
