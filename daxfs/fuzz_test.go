package daxfs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// Each target except FuzzOpen and FuzzCheck changes one kind of structure of a valid image: an input is a
// list of changes of 8 bytes each. So nearly every input passes the first checks, and inputs stay small.

// fuzzImage is small for fast runs, and has one of everything.
func fuzzImage(t testing.TB) []byte {
	t.Helper()
	s := newStore(daxfs.BlockSize)
	_, b := s.fileImage(t, fuzzTree(s), daxfs.Options{Label: "fuzz"})
	return b
}

// fuzzWindow is the same tree in a window of a pool.
func fuzzWindow(t testing.TB) []byte {
	t.Helper()
	s := newStore(64 << 10)
	_, b := s.windowImage(t, fuzzTree(s), 8192)
	return b
}

func fuzzTree(s *store) *daxfs.Node {
	reg := func(content string) *daxfs.Node {
		return &daxfs.Node{Mode: unix.S_IFREG | 0o644, Data: s.put([]byte(content))}
	}
	one := reg("one")
	one.Mtime.Nsec = 5
	one.Xattrs = []daxfs.Xattr{{Name: "user.a", Value: []byte("1")}, {Name: "system.posix_acl_access", Value: acl(5)}}
	shared := []daxfs.Xattr{{Name: "trusted.shared", Value: bytes.Repeat([]byte("s"), 100)}}
	e1, e2 := reg(""), reg("")
	e1.Xattrs, e2.Xattrs = shared, shared
	many := dir(map[string]*daxfs.Node{"one": one, "e1": e1, "e2": e2})
	for i := range 25 { // two blocks
		many.Entries[string(bytes.Repeat([]byte{byte('a' + i)}, 180))] = one
	}
	return dir(map[string]*daxfs.Node{
		"one": one, "two": reg("two"), "link": symlink("one"), "long": symlink(string(bytes.Repeat([]byte("l"), 4095))),
		"sub": dir(map[string]*daxfs.Node{"sub": dir(nil)}), "many": many,
		"null": {Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)},
	})
}

// fuzzLimit bounds the allocations for one input: the images are below 64 KiB.
const fuzzLimit = 64 << 20

// prove checks the guarantees for arbitrary bytes: no panic, bounded memory, and a rule in each error.
// If Check finds nothing, both halves must be completely readable and agree.
func prove(t *testing.T, b []byte) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	sound := true
	err := daxfs.Check(daxfs.Mem(b), int64(len(b)), func(f daxfs.Finding) bool {
		sound = false
		if f.Rule.Meaning() == "" || f.Msg == "" {
			t.Errorf("finding without rule or message: %v", f)
		}
		return true
	})
	if sound != (err == nil) {
		t.Errorf("sound is %v and the error %v", sound, err)
	}
	wantRule(t, err)
	// The same bytes give the same result when they are not mapped.
	if other := daxfs.Check(bytes.NewReader(b), int64(len(b)), nil); (err == nil) != (other == nil) {
		t.Errorf("mapped: %v; read: %v", err, other)
	}
	f, err := daxfs.OpenBytes(b)
	wantRule(t, err)
	if err == nil {
		use(t, f.Walk, f)
	}
	d, err := daxfs.OpenDAXFS(daxfs.Mem(b), int64(len(b)))
	wantRule(t, err)
	if err == nil {
		use(t, d.Walk, d)
	}
	if sound {
		mustAgree(t, b)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > fuzzLimit {
		t.Errorf("%d bytes allocated, want at most %d", n, fuzzLimit)
	}
}

// wantRule fails if a reader's error has no rule, or is neither ErrCorrupt nor ErrUnsupported.
func wantRule(t *testing.T, err error) {
	if err == nil {
		return
	}
	var f *daxfs.FormatError
	if !errors.As(err, &f) || f.Rule.Meaning() == "" ||
		errors.Is(err, daxfs.ErrCorrupt) == errors.Is(err, daxfs.ErrUnsupported) {
		t.Errorf("error names no rule: %v", err)
	}
}

// use reads everything, by inode and by path, in bounded time.
func use(t *testing.T, walk func(func(string, daxfs.Inode) error) error, fsys fs.FS) {
	wantRule(t, walk(func(path string, in daxfs.Inode) error {
		if _, err := in.Xattrs(); err != nil {
			wantRule(t, err)
		}
		if in.IsSymlink() {
			_, err := in.Target()
			wantRule(t, err)
		}
		if _, err := in.View(0, 4096); err != nil {
			t.Errorf("view of %q: %v", path, err)
		}
		if _, err := in.View(max(in.Size-1, 0), 4096); err != nil {
			t.Errorf("view of the end of %q: %v", path, err)
		}
		return nil
	}))
	left := 1000
	_ = fs.WalkDir(fsys, ".", func(path string, e fs.DirEntry, err error) error {
		if left--; left < 0 {
			return fs.SkipAll
		}
		if err != nil {
			return nil
		}
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() && info.Size() < 1<<20 {
			_, _ = fs.ReadFile(fsys, path)
		}
		return nil
	})
}

// apply applies the changes in data to the ranges of b: 2 bytes of range number, 2 of offset, 1 of
// width, 1 of kind, 2 of value.
func apply(b []byte, ranges [][2]int64, data []byte) {
	for ; len(data) >= 8; data = data[8:] {
		r := ranges[int(binary.LittleEndian.Uint16(data))%len(ranges)]
		width := int64(1) << (data[4] & 3)
		if r[1]-r[0] < width {
			continue
		}
		at := r[0] + int64(binary.LittleEndian.Uint16(data[2:]))%(r[1]-r[0]-width+1)
		value := uint64(int64(int16(binary.LittleEndian.Uint16(data[6:]))))
		var old [8]byte
		copy(old[:], b[at:at+width])
		switch data[5] & 3 {
		case 0: // set, small or negative
		case 1:
			value += binary.LittleEndian.Uint64(old[:])
		case 2:
			value ^= binary.LittleEndian.Uint64(old[:])
		case 3:
			value <<= data[5] >> 2 & 63
		}
		var now [8]byte
		binary.LittleEndian.PutUint64(now[:], value)
		copy(b[at:at+width], now[:])
	}
	binary.LittleEndian.PutUint32(b[disk.ErofsSuperOff+4:], disk.ErofsChecksum(b))
}

// fuzzRanges runs a target that changes ranges of a valid image. Its seeds change each in every way.
func fuzzRanges(f *testing.F, ranges func(s *surgeon) [][2]int64) {
	sound := fuzzImage(f)
	rs := ranges(operate(f, bytes.Clone(sound)))
	f.Add([]byte{})
	for i := range rs {
		for _, off := range []byte{0, 2, 4, 8, 16, 24, 32} {
			f.Add([]byte{byte(i), byte(i >> 8), off, 0, off & 3, 1, 1, 0})
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 256 {
			return
		}
		b := bytes.Clone(sound)
		apply(b, rs, data)
		prove(t, b)
	})
}

// FuzzCorruptSuper changes both superblocks and the overlay pair.
func FuzzCorruptSuper(f *testing.F) {
	fuzzRanges(f, func(s *surgeon) [][2]int64 {
		o := int64(len(s.b) - len(s.overlayBytes()))
		return [][2]int64{
			{0, disk.V8SuperSize},
			{disk.ErofsSuperOff, disk.ErofsSuperOff + disk.ErofsSuperSize},
			{o, o + 80},
		}
	})
}

// FuzzCorruptInode changes inodes of both halves and their xattrs.
func FuzzCorruptInode(f *testing.F) {
	fuzzRanges(f, func(s *surgeon) (rs [][2]int64) {
		walkRanges(s, func(path string, _ daxfs.Inode, off int64) {
			rs = append(rs, [2]int64{off, off + 64 + int64(len(s.xattrs(path)))})
		}, func(_ daxfs.Inode, off int64) {
			rs = append(rs, [2]int64{off, off + disk.V8InodeSize})
		})
		return rs
	})
}

// FuzzCorruptDirent changes directories of both halves and targets of symbolic links.
func FuzzCorruptDirent(f *testing.F) {
	fuzzRanges(f, func(s *surgeon) (rs [][2]int64) {
		walkRanges(s, func(_ string, in daxfs.Inode, _ int64) {
			if in.IsRegular() {
				return
			}
			for pos := int64(0); pos < in.Size; pos += daxfs.BlockSize {
				b, err := in.View(pos, daxfs.BlockSize)
				if err != nil {
					f.Fatal(err)
				}
				at := in.Off + pos
				if in.Off < 0 {
					at = int64(bytes.Index(s.b, b)) // not contiguous; a block of names occurs only once
				}
				rs = append(rs, [2]int64{at, at + int64(len(b))})
			}
		}, func(in daxfs.Inode, _ int64) {
			if in.IsDir() && in.Size > 0 {
				rs = append(rs, [2]int64{in.Off, in.Off + in.Size/disk.V8DirentUnit*disk.V8DirentSize})
			}
		})
		return rs
	})
}

// walkRanges calls fn for every inode of either half with its offset.
func walkRanges(s *surgeon, erofs func(string, daxfs.Inode, int64), v8 func(daxfs.Inode, int64)) {
	err := s.f.Walk(func(path string, in daxfs.Inode) error {
		erofs(path, in, s.meta()+int64(in.Nid)*disk.ErofsSlot)
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	table := int64(len(s.b) - len(s.rawV8(".")))
	for ino := uint64(1); ino <= s.d.Inodes(); ino++ {
		in, err := s.d.Inode(ino)
		if err != nil {
			s.t.Fatal(err)
		}
		v8(in, table+int64(ino-1)*disk.V8InodeSize)
	}
}

// FuzzCheck changes the size and any metadata of a file image or a window, depending on bit 0 of cut.
func FuzzCheck(f *testing.F) {
	var images [2][]byte
	var ranges [2][][2]int64
	for i, sound := range [][]byte{fuzzImage(f), fuzzWindow(f)} {
		images[i] = sound
		s := operate(f, bytes.Clone(sound))
		ranges[i] = [][2]int64{{0, daxfs.BlockSize}, {s.meta(), s.meta() + 16<<10}, {0, int64(len(sound))}}
	}
	for _, window := range []uint32{0, 1} {
		f.Add([]byte{}, window)
		f.Add([]byte{1, 0, 40, 0, 2, 1, 1, 0}, window)
		f.Add([]byte{2, 0, 200, 3, 3, 2, 1, 0, 1, 0, 44, 0, 1, 0, 9, 0}, 8192+window)
	}
	f.Fuzz(func(t *testing.T, data []byte, cut uint32) {
		if len(data) > 512 {
			return
		}
		i := cut & 1
		b := bytes.Clone(images[i])
		apply(b, ranges[i], data)
		prove(t, b[:len(b)-int(cut>>1%uint32(len(b)))])
	})
}

// FuzzOpen reads arbitrary bytes as an image. An input is both superblocks without the zeros around
// them, and the bytes behind block 0 up to the last one that is not zero: a third of the image.
func FuzzOpen(f *testing.F) {
	const supers = disk.V8SuperSize + disk.ErofsSuperSize
	f.Add([]byte{}, uint16(0))
	for _, b := range seedImages(f) {
		data := append(bytes.Clone(b[:disk.V8SuperSize]), b[disk.ErofsSuperOff:][:disk.ErofsSuperSize]...)
		f.Add(append(data, bytes.TrimRight(b[daxfs.BlockSize:], "\x00")...), uint16(len(b)))
	}
	f.Fuzz(func(t *testing.T, data []byte, size uint16) {
		b := make([]byte, size)
		if len(data) >= supers && len(b) >= daxfs.BlockSize {
			copy(b, data[:disk.V8SuperSize])
			copy(b[disk.ErofsSuperOff:], data[disk.V8SuperSize:supers])
			copy(b[daxfs.BlockSize:], data[supers:])
			// Without this, nearly no input passes the checksum.
			binary.LittleEndian.PutUint32(b[disk.ErofsSuperOff+4:], disk.ErofsChecksum(b))
		} else {
			copy(b, data)
		}
		prove(t, b)
	})
}

// seedImages returns small images with one feature each.
func seedImages(t testing.TB) [][]byte {
	var list [][]byte
	for _, entries := range []map[string]*daxfs.Node{
		{},
		{"link": symlink("x")},
		{"dir": dir(nil)},
		{"fifo": {Mode: unix.S_IFIFO}},
		{"file": {Mode: unix.S_IFREG, Xattrs: []daxfs.Xattr{{Name: "user.x", Value: []byte("y")}}}},
	} {
		_, b := newStore(daxfs.BlockSize).fileImage(t, dir(entries), daxfs.Options{})
		list = append(list, b)
	}
	return list
}
