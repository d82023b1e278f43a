package daxfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// findings checks an image and returns the findings. It fails the test if the error does not fit them.
func findings(t testing.TB, b []byte) []daxfs.Finding {
	t.Helper()
	var list []daxfs.Finding
	err := daxfs.Check(daxfs.Mem(b), int64(len(b)), func(f daxfs.Finding) bool {
		list = append(list, f)
		return true
	})
	if (err != nil) != (len(list) > 0) {
		t.Errorf("%d findings and the error %v", len(list), err)
	}
	return list
}

// mustCheck fails if there is a finding.
func mustCheck(t testing.TB, b []byte) {
	t.Helper()
	for _, f := range findings(t, b) {
		t.Errorf("finding: %v", f)
	}
	if err := daxfs.Check(bytes.NewReader(b), int64(len(b)), nil); err != nil {
		t.Errorf("check through a reader: %v", err)
	}
}

// entry holds all that an inode shows.
type entry struct {
	st     daxfs.Stat
	target string
	sum    uint64
	xattrs string
}

// readAll reads everything that one half of an image shows.
func readAll(walk func(func(string, daxfs.Inode) error) error) (map[string]entry, error) {
	all := map[string]entry{}
	err := walk(func(path string, in daxfs.Inode) error {
		e := entry{st: in.Stat}
		xs, err := in.Xattrs()
		if err != nil {
			return fmt.Errorf("xattrs of %q: %w", path, err)
		}
		e.xattrs = fmt.Sprintf("%q", xs)
		switch {
		case in.IsSymlink():
			if e.target, err = in.Target(); err != nil {
				return fmt.Errorf("target of %q: %w", path, err)
			}
		case in.IsRegular():
			for pos := int64(0); pos < in.Size; {
				b, err := in.View(pos, 1<<20)
				if err != nil {
					return fmt.Errorf("contents of %q: %w", path, err)
				}
				for _, c := range b {
					e.sum = e.sum*31 + uint64(c)
				}
				pos += int64(len(b))
			}
		case in.IsDir():
			// Every name that is listed can be looked up.
			var bad error
			err := in.Entries(0, func(d daxfs.Dirent) bool {
				var nid uint64
				if nid, bad = in.Lookup(d.Name); bad == nil && nid != d.Nid {
					bad = fmt.Errorf("lookup of %q in %q: got %d, want %d", d.Name, path, nid, d.Nid)
				}
				return bad == nil
			})
			if err = errors.Join(err, bad); err != nil {
				return err
			}
		}
		if _, ok := all[path]; ok {
			return fmt.Errorf("path %q is there twice", path)
		}
		all[path] = e
		return nil
	})
	return all, err
}

// mustAgree compares the complete views of both readers, which a silent Check guarantees.
func mustAgree(t testing.TB, b []byte) {
	t.Helper()
	f, err := daxfs.OpenBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	d, err := daxfs.OpenDAXFS(daxfs.Mem(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	all, err := readAll(f.Walk)
	if err != nil {
		t.Fatalf("EROFS half: %v", err)
	}
	v8, err := readAll(d.Walk)
	if err != nil {
		t.Fatalf("DAXFS half: %v", err)
	}
	for path, e := range all {
		switch e.st.Mode & unix.S_IFMT {
		case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
		default:
			continue
		}
		v, ok := v8[path]
		if !ok {
			t.Errorf("%q: not in the DAXFS half", path)
		}
		delete(v8, path)
		same := e.st.Mode == v.st.Mode && e.st.UID == v.st.UID && e.st.GID == v.st.GID && e.st.Nlink == v.st.Nlink &&
			e.target == v.target && e.sum == v.sum
		if e.st.Mode&unix.S_IFMT != unix.S_IFDIR {
			same = same && e.st.Size == v.st.Size
		}
		if e.st.Mode&unix.S_IFMT == unix.S_IFREG {
			same = same && e.st.Off == v.st.Off
		}
		if !same {
			t.Errorf("%q: halves differ: %+v and %+v", path, e, v)
		}
	}
	for _, path := range slices.Sorted(maps.Keys(v8)) {
		t.Errorf("%q: only in the DAXFS half", path)
	}
}

// TestCheckSilent: images of the writer are valid in both placements (their makers check them).
func TestCheckSilent(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			n := 1 << seed
			s := newStore(daxfs.BlockSize)
			_, b := s.fileImage(t, randomTree(seed, n, s), daxfs.Options{Label: "label"})
			mustAgree(t, b)

			s = newStore(16 << 20)
			_, b = s.windowImage(t, randomTree(seed, n, s), 2<<20)
			mustAgree(t, b)
		})
	}
}

// TestCheckStops: a check ends when no more findings are wanted, and returns errors of the reader.
func TestCheckStops(t *testing.T) {
	s := newStore(daxfs.BlockSize)
	_, b := s.fileImage(t, randomTree(1, 100, s), daxfs.Options{})
	for i := daxfs.BlockSize; i < len(b); i += 64 {
		b[i] ^= 0x55
	}
	all := len(findings(t, b))
	if all < 3 {
		t.Fatalf("got %d findings, want many", all)
	}
	for limit := 1; limit <= 3; limit++ {
		n := 0
		err := daxfs.Check(daxfs.Mem(b), int64(len(b)), func(daxfs.Finding) bool { n++; return n < limit })
		if n != limit || !isErr(err, daxfs.ErrCorrupt) {
			t.Errorf("got %d findings and %v, want %d", n, err, limit)
		}
	}
	if err := daxfs.Check(failingReader{}, 1<<20, nil); !isErr(err, io.ErrClosedPipe) {
		t.Errorf("got %v, want the error of the reader", err)
	}
	for _, size := range []int64{-1, 0, 4095, 1 << 45, 1<<63 - 1} {
		var f *daxfs.FormatError
		if err := daxfs.Check(daxfs.Mem(b), size, nil); !errors.As(err, &f) || f.Rule != daxfs.RuleImageSize {
			t.Errorf("size %d: got %v", size, err)
		}
	}
	short := bytes.NewReader(b[:len(b)-100])
	if err := daxfs.Check(short, int64(len(b)), nil); err == nil {
		t.Error("a short reader passes")
	}
}

// TestReadFaults fails one read after another: the check and both readers must return the error.
func TestReadFaults(t *testing.T) {
	one, large := patient(t), provableLarge(t)
	p := newSmallLive(t, 100, 1)
	p.publish(t, dir(map[string]*daxfs.Node{"f": file(p.s.put([]byte("f"))), "l": symlink("f")}))
	p.publish(t, dir(map[string]*daxfs.Node{"d": dir(nil)}))
	p.check(t) // makes the file complete
	live := p.s.f.b
	none := func(f daxfs.Finding) bool {
		t.Errorf("a failed read is the finding %v", f)
		return true
	}
	for name, c := range map[string]struct {
		b []byte
		f func(r io.ReaderAt, size int64) error
	}{
		"check": {one, func(r io.ReaderAt, size int64) error { return daxfs.Check(r, size, none) }},
		"erofs": {one, func(r io.ReaderAt, size int64) error {
			f, err := daxfs.Open(r, size)
			if err == nil {
				_, err = readAll(f.Walk)
			}
			return err
		}},
		"daxfs": {one, func(r io.ReaderAt, size int64) error {
			d, err := daxfs.OpenDAXFS(r, size)
			if err == nil {
				_, err = readAll(d.Walk)
			}
			return err
		}},
		"paths": {one, func(r io.ReaderAt, size int64) error {
			f, err := daxfs.Open(r, size)
			if err == nil {
				_, err = f.ReadLink("link")
			}
			if err == nil {
				_, err = f.ReadFile("link")
			}
			return err
		}},
		"attributes": {one, func(r io.ReaderAt, size int64) error {
			f, err := daxfs.Open(r, size)
			var in daxfs.Inode
			if err == nil {
				in, err = f.Lookup("many/entry-000", false)
			}
			if err == nil {
				_, err = in.Stat.Xattrs()
			}
			if err == nil {
				_, _, err = in.Xattr("user.shared")
			}
			return err
		}},
		"UUID": {one, func(r io.ReaderAt, size int64) error {
			f, err := daxfs.Open(r, size)
			if err == nil {
				_, err = daxfs.TreeUUID(f, dataOf(t, one))
			}
			return err
		}},
		"check of a live tree": {live, func(r io.ReaderAt, size int64) error {
			return daxfs.CheckLive(r, size, daxfs.LiveCheckOptions{}, none)
		}},
		"live tree": {live, func(r io.ReaderAt, size int64) error {
			l, err := daxfs.OpenLive(r, size)
			if errors.Is(err, daxfs.ErrUnsupported) {
				t.Errorf("a failed read is another file system: %v", err)
			}
			for i := 0; err == nil && i < p.used; i++ {
				var img *daxfs.FS
				if img, err = l.Image(i); err == nil {
					_, err = readAll(img.Walk)
				}
			}
			return err
		}},
		"root hash": {large, func(r io.ReaderAt, size int64) error {
			_, err := daxfs.ReadRootHash(r, size)
			return err
		}},
		"proof": {large, func(r io.ReaderAt, size int64) error {
			return daxfs.Prove(context.Background(), r, size, daxfs.ProveOptions{}, none)
		}},
	} {
		for n := 0; ; n += 1 + n/20 {
			r := &faultyReader{r: bytes.NewReader(c.b)}
			r.left.Store(int64(n))
			err := c.f(r, int64(len(c.b)))
			if err == nil && r.left.Load() >= 0 {
				break
			}
			if !isErr(err, io.ErrClosedPipe) {
				t.Fatalf("%s: read %d failed: got %v", name, n, err)
			}
		}
	}
}

// faultyReader fails the read after left reads. Several goroutines may use it.
type faultyReader struct {
	r    io.ReaderAt
	left atomic.Int64
}

func (f *faultyReader) ReadAt(p []byte, off int64) (int, error) {
	if f.left.Add(-1) == -1 {
		return 0, io.ErrClosedPipe
	}
	return f.r.ReadAt(p, off)
}

type failingReader struct{}

func (failingReader) ReadAt([]byte, int64) (int, error) { return 0, io.ErrClosedPipe }

// TestCheckLimits: images with too many inodes are refused.
func TestCheckLimits(t *testing.T) {
	s := newStore(daxfs.BlockSize)
	_, b := s.fileImage(t, randomTree(2, 200, s), daxfs.Options{})
	err := daxfs.CheckWith(daxfs.Mem(b), int64(len(b)), 20, true, nil)
	if !isErr(err, daxfs.ErrUnsupported) || !strings.Contains(fmt.Sprint(err), "more than 20") {
		t.Errorf("got %v", err)
	}
	rules := map[daxfs.Rule]int{}
	_ = daxfs.CheckWith(daxfs.Mem(b), int64(len(b)), 20, true, func(f daxfs.Finding) bool {
		if strings.Contains(f.Msg, "more than 20") {
			rules[f.Rule]++
		}
		return true
	})
	if rules[daxfs.RuleInodes] != 1 || rules[daxfs.RuleV8Table] != 1 {
		t.Errorf("got %v, want one finding for each half", rules)
	}
}

// TestCheckDeepPath: a finding names a deep inode by the end of its path.
func TestCheckDeepPath(t *testing.T) {
	for depth, want := range map[int]string{1: "/d/x", 63: strings.Repeat("/d", 63) + "/x", 64: "..." +
		strings.Repeat("/d", 63) + "/x", 200: "..." + strings.Repeat("/d", 63) + "/x"} {
		at := map[string]*daxfs.Node{"x": {Mode: unix.S_IFREG}}
		for range depth {
			at = map[string]*daxfs.Node{"d": dir(at)}
		}
		_, b := newStore(daxfs.BlockSize).fileImage(t, dir(at), daxfs.Options{})
		o := operate(t, b)
		o.inode(strings.Repeat("d/", depth)+"x", func(i *disk.ErofsInode) { i.Nlink = 7 })
		found := false
		for _, f := range findings(t, o.close()) {
			found = found || f.Rule == daxfs.RuleNlink && f.Path == want
		}
		if !found {
			t.Errorf("depth %d: %v, expected rule %s of %q", depth, findings(t, b), daxfs.RuleNlink, want)
		}
	}
}

// TestCheckSkipTails: contents can be skipped.
func TestCheckSkipTails(t *testing.T) {
	b := patient(t)
	in := operate(t, b).lookup("two")
	b[in.Off+in.Size] = 1
	if err := daxfs.Check(daxfs.Mem(b), int64(len(b)), nil); !isErr(err, daxfs.ErrCorrupt) {
		t.Errorf("with tails: got %v", err)
	}
	if err := daxfs.CheckWith(daxfs.Mem(b), int64(len(b)), 1<<24, false, nil); err != nil {
		t.Errorf("without tails: got %v", err)
	}
}

func BenchmarkCheck(b *testing.B) {
	const inodes = 60_000
	s := newStore(daxfs.BlockSize)
	root := dir(map[string]*daxfs.Node{})
	for i := range inodes / 100 {
		d := dir(map[string]*daxfs.Node{})
		for k := range 99 {
			d.Entries[fmt.Sprintf("file-with-a-name-%d", k)] = &daxfs.Node{
				Mode: unix.S_IFREG | 0o644,
				Data: s.put([]byte(fmt.Sprintf("%d/%d", i, k))),
			}
		}
		root.Entries[fmt.Sprintf("directory-%d", i)] = d
	}
	_, image := s.fileImage(b, root, daxfs.Options{})
	for name, r := range map[string]io.ReaderAt{"mapped": daxfs.Mem(image), "reader": bytes.NewReader(image)} {
		b.Run(fmt.Sprintf("%s/%d", name, inodes), func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				if err := daxfs.Check(r, int64(len(image)), nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
