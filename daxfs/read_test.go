package daxfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// TestSuper checks the fields of the superblock.
func TestSuper(t *testing.T) {
	b := patient(t)
	sb := operate(t, b).f.Super()
	if sb.Label != "patient" || int64(sb.Blocks)*daxfs.BlockSize != int64(len(b)) || sb.Inodes != 319 ||
		sb.UUID == [16]byte{} {
		t.Errorf("got %+v", sb)
	}
}

// TestBothHalves reads one file of each kind through both readers.
func TestBothHalves(t *testing.T) {
	o := operate(t, patient(t))
	for name, fsys := range map[string]interface {
		fs.ReadLinkFS
		fs.ReadFileFS
		fs.ReadDirFS
	}{"EROFS": o.f, "DAXFS": o.d} {
		t.Run(name, func(t *testing.T) {
			if got, err := fsys.ReadFile("link"); string(got) != "one" || err != nil {
				t.Errorf("read file: got %q, %v", got, err)
			}
			if got, err := fsys.ReadLink("link2"); got != "two" || err != nil {
				t.Errorf("read link: got %q, %v", got, err)
			}
			if _, err := fsys.ReadLink("none"); !isErr(err, fs.ErrNotExist) {
				t.Errorf("read link of nothing: got %v", err)
			}
			if _, err := fsys.ReadLink("one"); !isErr(err, unix.EINVAL) {
				t.Errorf("read link of a file: got %v", err)
			}
			if _, err := fsys.ReadFile("dir"); !isErr(err, unix.EISDIR) {
				t.Errorf("read file of a directory: got %v", err)
			}
			if _, err := fsys.ReadDir("one"); err == nil {
				t.Error("read dir of a file: got no error")
			}
			list, err := fsys.ReadDir("dir")
			if err != nil || len(list) != 4 || !list[0].IsDir() || fs.FormatDirEntry(list[2]) != "- x" {
				t.Errorf("read dir: got %v, %v", list, err)
			}
			info, err := fsys.Lstat("one")
			if err != nil || info.Mode() != 0o644 || info.Size() != 3 || info.IsDir() ||
				info.Sys().(*daxfs.Stat).UID != 1 {
				t.Errorf("lstat: got %v, %v", info, err)
			}
			if _, err := fsys.Lstat("none"); !isErr(err, fs.ErrNotExist) {
				t.Errorf("lstat of nothing: got %v", err)
			}
			if err := fs.WalkDir(fsys, ".", func(_ string, _ fs.DirEntry, err error) error { return err }); err != nil {
				t.Errorf("walk: %v", err)
			}
		})
	}
	if _, err := o.d.Lstat("null"); !isErr(err, fs.ErrNotExist) {
		t.Errorf("device in the DAXFS half: got %v", err)
	}
	if o.d.Root() != 1 || o.d.Inodes() != 317 {
		t.Errorf("DAXFS half: root %d, %d inodes", o.d.Root(), o.d.Inodes())
	}
}

// TestFSDAXFS runs the suite of the standard library on the DAXFS half. No link of this image dangles.
func TestFSDAXFS(t *testing.T) {
	s := newStore(daxfs.BlockSize)
	_, b := s.fileImage(t, dir(map[string]*daxfs.Node{
		"file": {Mode: unix.S_IFREG | 0o4755, Data: s.put([]byte("contents"))}, "link": symlink("dir/../file"),
		"dir": dir(map[string]*daxfs.Node{"sub": dir(nil), "up": symlink("/dir")}),
	}), daxfs.Options{})
	o := operate(t, b)
	for _, fsys := range []fs.FS{o.f, o.d} {
		if err := fstest.TestFS(fsys, "file", "link", "dir/sub", "dir/up"); err != nil {
			t.Errorf("%T: %v", fsys, err)
		}
	}
}

// TestFiles checks open files: random access, reading directories in pieces, unreadable files.
func TestFiles(t *testing.T) {
	o := operate(t, patient(t))
	open := func(path string) fs.File {
		f, err := o.f.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	f := open("pages")
	defer f.Close()
	if _, err := f.(io.Seeker).Seek(-5, io.SeekEnd); err != nil {
		t.Error(err)
	}
	if got, err := io.ReadAll(f); string(got) != "pages" || err != nil {
		t.Errorf("end of a file: got %q, %v", got, err)
	}
	p := make([]byte, 7)
	if n, err := f.(io.ReaderAt).ReadAt(p, 15000-5); n != 5 || err != io.EOF {
		t.Errorf("read over the end: got %d, %v", n, err)
	}

	d := open("many").(fs.ReadDirFile)
	defer d.Close()
	var names []string
	for {
		list, err := d.ReadDir(7)
		for _, e := range list {
			names = append(names, e.Name())
		}
		if err == io.EOF {
			break
		}
		if err != nil || len(list) > 7 {
			t.Fatalf("got %d entries, %v", len(list), err)
		}
	}
	if len(names) != 300 || !slices.IsSorted(names) {
		t.Errorf("got %d names", len(names))
	}
	if _, err := d.Read(p); !isErr(err, unix.EISDIR) {
		t.Errorf("read of a directory: got %v", err)
	}
	for path, want := range map[string]fs.FileMode{
		"null": fs.ModeDevice | fs.ModeCharDevice, "fifo": fs.ModeNamedPipe, "dir": fs.ModeDir, "long": fs.ModeSymlink,
	} {
		info, err := o.f.Lstat(path)
		if err != nil || info.Mode().Type() != want || !strings.Contains(fs.FormatFileInfo(info), path) {
			t.Errorf("%q: got %v, %v, want %v", path, info, err, want)
		}
	}
}

// TestFileModes: each file type and permission bit of stat(2) has its counterpart in Go, and only contents of
// regular files can be read.
func TestFileModes(t *testing.T) {
	root := dir(nil)
	root.Entries = map[string]*daxfs.Node{}
	modes := map[uint32]fs.FileMode{
		unix.S_IFREG | 0o6755: fs.ModeSetuid | fs.ModeSetgid | 0o755,
		unix.S_IFDIR | 0o1777: fs.ModeDir | fs.ModeSticky | 0o777,
		unix.S_IFBLK | 0o660:  fs.ModeDevice | 0o660, unix.S_IFCHR | 0o666: fs.ModeDevice | fs.ModeCharDevice | 0o666,
		unix.S_IFSOCK | 0o2700: fs.ModeSocket | fs.ModeSetgid | 0o700, unix.S_IFIFO: fs.ModeNamedPipe,
	}
	for mode := range modes {
		root.Entries[fmt.Sprint(mode)] = &daxfs.Node{Mode: mode}
	}
	_, b := newStore(daxfs.BlockSize).fileImage(t, root, daxfs.Options{})
	o := operate(t, b)
	for mode, want := range modes {
		path := fmt.Sprint(mode)
		info, err := o.f.Lstat(path)
		if err != nil || info.Mode() != want {
			t.Errorf("mode %#o: got %v, %v, want %v", mode, info.Mode(), err, want)
		}
		_, err = o.f.ReadFile(path)
		f, openErr := o.f.Open(path)
		if openErr != nil {
			t.Fatal(openErr)
		}
		_, readErr := f.Read(make([]byte, 1))
		switch {
		case want.IsRegular():
			if err != nil || readErr != io.EOF {
				t.Errorf("mode %#o: got %v and %v", mode, err, readErr)
			}
		case want.IsDir():
			if !isErr(err, unix.EISDIR) || !isErr(readErr, unix.EISDIR) {
				t.Errorf("mode %#o: got %v and %v, want %v", mode, err, readErr, unix.EISDIR)
			}
		default:
			if !isErr(err, unix.EINVAL) || !isErr(readErr, unix.EINVAL) {
				t.Errorf("mode %#o: got %v and %v, want %v", mode, err, readErr, unix.EINVAL)
			}
		}
	}
}

// TestHostileReads: a call that meets bad bytes gives the rule that they break, whichever way it came there.
func TestHostileReads(t *testing.T) {
	sound := patient(t)
	for name, c := range map[string]struct {
		rule daxfs.Rule
		read func(o *surgeon) error
	}{
		"NUL in a target": {daxfs.RuleSymlink, func(o *surgeon) error {
			_, open := o.f.Open("link")
			_, link := o.f.ReadLink("link")
			if open == nil || link == nil {
				t.Errorf("open %v, read link %v", open, link)
			}
			return errors.Join(open, link)
		}},
		"unknown type of an entry": {daxfs.RuleDirType, func(o *surgeon) error {
			list, err := o.f.ReadDir("dir")
			i := slices.IndexFunc(list, func(e fs.DirEntry) bool { return e.Name() == "x" })
			if err != nil || i < 0 || list[i].Type() != fs.ModeIrregular {
				t.Fatalf("read dir: got %v, %v, want an irregular file", list, err)
			}
			_, err = list[i].Info()
			return err
		}},
		"inode after the end": {daxfs.RuleNid, func(o *surgeon) error {
			list, err := o.f.ReadDir("dir")
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(list, func(e fs.DirEntry) bool { return e.Name() == "x" })
			_, err = list[i].Info()
			return err
		}},
		"directory of 5 bytes": {daxfs.RuleDirBlock, func(o *surgeon) error {
			_, err := o.f.Stat("dir/sub2/none")
			return err
		}},
		"slash in a DAXFS name": {daxfs.RuleV8DirName, func(o *surgeon) error {
			_, err := o.d.Stat("dir/y") // behind the bad one
			return err
		}},
		"xattr of another namespace": {daxfs.RuleXattrName, func(o *surgeon) error {
			_, _, err := o.lookup("one").Xattr("user.other")
			return err
		}},
	} {
		o := operate(t, bytes.Clone(sound))
		o.corrupt(name)
		var fe *daxfs.FormatError
		if err := c.read(operate(t, o.close())); !errors.As(err, &fe) || fe.Rule != c.rule {
			t.Errorf("%s: got %v, want rule %s", name, err, c.rule)
		}
	}
	// Numbers that no directory names.
	o := operate(t, sound)
	for _, n := range []uint64{0, 318, 1 << 32, 1<<32 + 1, 1<<64 - 1} {
		var fe *daxfs.FormatError
		if _, err := o.d.Inode(n); !errors.As(err, &fe) || fe.Rule != daxfs.RuleV8Ino || fe.Ino != n {
			t.Errorf("DAXFS inode %d: got %v, want rule %s", n, err, daxfs.RuleV8Ino)
		}
	}
	for _, n := range []uint64{1 << 20, 1 << 59, 1<<64 - 1} {
		var fe *daxfs.FormatError
		if _, err := o.f.Inode(n); !errors.As(err, &fe) || fe.Rule != daxfs.RuleNid || fe.Ino != n {
			t.Errorf("EROFS inode %d: got %v, want rule %s", n, err, daxfs.RuleNid)
		}
	}
}

// TestInodes checks access by number.
func TestInodes(t *testing.T) {
	b := patient(t)
	o := operate(t, b)
	in := o.lookup("one")
	off, size, ok := in.Data()
	if !ok || size != 3 || string(b[off:off+size]) != "one" {
		t.Errorf("data: got %d, %d, %v", off, size, ok)
	}
	if _, size, ok := o.lookup("empty").Data(); !ok || size != 0 {
		t.Errorf("data of an empty file: got %d, %v", size, ok)
	}
	if _, _, ok := o.lookup("dir").Data(); ok {
		t.Error("a directory has data")
	}
	view, err := in.View(1, 100)
	if err != nil || &view[0] != &b[off+1] || len(view) != 2 || cap(view) != 2 {
		t.Errorf("view: got %q, %v; want the memory of the image and no more", view, err)
	}
	if view, err := in.View(3, 1); len(view) != 0 || err != nil {
		t.Errorf("view after the end: got %q, %v", view, err)
	}
	if _, err := in.View(-1, 1); err == nil {
		t.Error("view before the beginning: got no error")
	}
	if _, err := in.ReadAt(nil, -1); err == nil {
		t.Error("read before the beginning: got no error")
	}
	xs, err := in.Stat.Xattrs()
	if err != nil || len(xs) != 3 {
		t.Errorf("xattrs: got %q, %v", xs, err)
	}
	if v, ok, err := in.Xattr("user.other"); string(v) != "2" || !ok || err != nil {
		t.Errorf("xattr: got %q, %v, %v", v, ok, err)
	}
	if v, ok, err := in.Xattr("user.none"); v != nil || ok || err != nil {
		t.Errorf("xattr that is not there: got %q, %v, %v", v, ok, err)
	}
	if _, err := in.Lookup("x"); !isErr(err, unix.ENOTDIR) {
		t.Errorf("lookup in a file: got %v", err)
	}
	if err := in.Entries(0, func(daxfs.Dirent) bool { return true }); !isErr(err, unix.ENOTDIR) {
		t.Errorf("entries of a file: got %v", err)
	}
	for _, d := range []daxfs.Inode{o.lookup("many"), o.lookupV8("many")} {
		for _, cursor := range []int64{-1, -1 << 63, 13, 1 << 62, 1<<63 - 1, 4096 - 4} {
			n := 0
			err := d.Entries(cursor, func(daxfs.Dirent) bool { n++; return true })
			if n > 300 || err != nil && !isErr(err, unix.EINVAL) {
				t.Errorf("cursor %d: got %d entries, %v", cursor, n, err)
			}
		}
	}
}

// TestWalkStops checks the return values of the function that Walk calls.
func TestWalkStops(t *testing.T) {
	o := operate(t, patient(t))
	boom := errors.New("boom")
	count := func(skip string, with error) (n int, err error) {
		err = o.f.Walk(func(path string, _ daxfs.Inode) error {
			n++
			if path == skip {
				return with
			}
			return nil
		})
		return n, err
	}
	for _, c := range []struct {
		path string
		with error
		n    int
		err  error
	}{
		{"", nil, 321, nil},
		{"many", fs.SkipDir, 21, nil},
		{".", fs.SkipDir, 1, nil},
		{".", boom, 1, boom},
		{"dir/sub/leaf", boom, 4, boom},
	} {
		if n, err := count(c.path, c.with); n != c.n || !isErr(err, c.err) {
			t.Errorf("%v at %q: got %d calls, %v, want %d, %v", c.with, c.path, n, err, c.n, c.err)
		}
	}
}

// TestMem checks that Mem is a correct io.ReaderAt.
func TestMem(t *testing.T) {
	m := daxfs.Mem("0123456789")
	r := bytes.NewReader(m)
	for _, off := range []int64{0, 3, 9, 10, 11} {
		a, b := make([]byte, 4), make([]byte, 4)
		n, err := m.ReadAt(a, off)
		wantN, wantErr := r.ReadAt(b, off)
		if n != wantN || err != wantErr || !bytes.Equal(a, b) {
			t.Errorf("at %d: got %d, %v, want %d, %v", off, n, err, wantN, wantErr)
		}
	}
	if _, err := m.ReadAt(nil, -1); err == nil {
		t.Error("read before the beginning: got no error")
	}
}

// TestFindingString pins the line that tools print.
func TestFindingString(t *testing.T) {
	for want, f := range map[string]daxfs.Finding{
		`r: "/a": m (inode 1, offset 2)`: {Rule: "r", Path: "/a", Msg: "m", Ino: 1, Off: 2},
		`r: m (inode 1)`:                 {Rule: "r", Msg: "m", Ino: 1, Off: -1},
		`r: m (offset 0)`:                {Rule: "r", Msg: "m"},
	} {
		if got := f.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// TestConcurrent reads one image from several goroutines, for the race detector.
func TestConcurrent(t *testing.T) {
	b := patient(t)
	for _, mapped := range []bool{true, false} {
		f := open(t, b, mapped)
		want, err := readAll(f.Walk)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				got, err := readAll(f.Walk)
				if err != nil || !maps.Equal(got, want) {
					t.Errorf("got %d entries, %v, want %d", len(got), err, len(want))
				}
				if text, err := f.ReadFile("link"); string(text) != "one" || err != nil {
					t.Errorf("got %q, %v", text, err)
				}
			})
		}
		wg.Wait()
	}
}
