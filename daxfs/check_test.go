package daxfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
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
	b := patient(t)
	size := int64(len(b))
	for name, f := range map[string]func(r io.ReaderAt) error{
		"check": func(r io.ReaderAt) error { return daxfs.Check(r, size, func(daxfs.Finding) bool { return true }) },
		"erofs": func(r io.ReaderAt) error {
			f, err := daxfs.Open(r, size)
			if err == nil {
				_, err = readAll(f.Walk)
			}
			return err
		},
		"daxfs": func(r io.ReaderAt) error {
			d, err := daxfs.OpenDAXFS(r, size)
			if err == nil {
				_, err = readAll(d.Walk)
			}
			return err
		},
	} {
		n := 0
		for ; ; n += 1 + n/20 {
			r := &faultyReader{r: bytes.NewReader(b), left: n}
			err := f(r)
			if err == nil && r.left >= 0 {
				break
			}
			if !isErr(err, io.ErrClosedPipe) {
				t.Fatalf("%s: read %d failed: got %v", name, n, err)
			}
		}
	}
}

// faultyReader fails the read after left reads.
type faultyReader struct {
	r    io.ReaderAt
	left int
}

func (f *faultyReader) ReadAt(p []byte, off int64) (int, error) {
	f.left--
	if f.left == -1 {
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
	err := daxfs.CheckWith(daxfs.Mem(b), int64(len(b)), daxfs.CheckOptions{MaxInodes: 20}, nil)
	if !isErr(err, daxfs.ErrUnsupported) || !strings.Contains(fmt.Sprint(err), "more than 20") {
		t.Errorf("got %v", err)
	}
	rules := map[daxfs.Rule]int{}
	_ = daxfs.CheckWith(daxfs.Mem(b), int64(len(b)), daxfs.CheckOptions{MaxInodes: 20}, func(f daxfs.Finding) bool {
		if strings.Contains(f.Msg, "more than 20") {
			rules[f.Rule]++
		}
		return true
	})
	if rules[daxfs.RuleInodes] != 1 || rules[daxfs.RuleV8Table] != 1 {
		t.Errorf("got %v, want one finding for each half", rules)
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
	if err := daxfs.CheckWith(daxfs.Mem(b), int64(len(b)), daxfs.CheckOptions{SkipTails: true}, nil); err != nil {
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
