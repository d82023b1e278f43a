package daxfs_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// surgeon changes single fields of an image through the readers, whose slices are the image itself.
type surgeon struct {
	t testing.TB
	b []byte
	f *daxfs.FS
	d *daxfs.DAXFS

	keepSum bool // leave the checksum alone
	cut     int  // bytes to cut from the end
}

// patient is a valid image with one of everything.
func patient(t testing.TB) []byte {
	t.Helper()
	s := newStore(daxfs.BlockSize)
	reg := func(content string) *daxfs.Node {
		return &daxfs.Node{
			Mode: unix.S_IFREG | 0o644, UID: 1, GID: 2, Mtime: daxfs.Time{Sec: 7, Nsec: 8},
			Data: s.put([]byte(content)),
		}
	}
	one := reg("one")
	one.Xattrs = []daxfs.Xattr{
		{Name: "user.first", Value: []byte("1")},
		{Name: "user.other", Value: []byte("2")},
		{Name: "system.posix_acl_access", Value: acl(5)},
	}
	shared := daxfs.Xattr{Name: "user.shared", Value: bytes.Repeat([]byte("s"), 300)}
	many := dir(map[string]*daxfs.Node{})
	for i := range 300 {
		n := &daxfs.Node{Mode: unix.S_IFREG | 0o600}
		if i < 5 {
			n.Xattrs = []daxfs.Xattr{shared, {Name: "user.shared2", Value: bytes.Repeat([]byte("t"), 300)}}
		}
		many.Entries[fmt.Sprintf("entry-%03d", i)] = n
	}
	fifo := &daxfs.Node{Mode: unix.S_IFIFO | 0o600, Xattrs: []daxfs.Xattr{
		{Name: "security.capability", Value: capability}, {Name: "trusted.mark"},
	}}
	root := dir(map[string]*daxfs.Node{
		"one": one, "hard": one, "two": reg("two"), "same": reg("two"),
		"pages": reg(strings.Repeat("pages", 3000)), "more": reg(strings.Repeat("more", 5000)), "empty": reg(""),
		"link": symlink("one"), "link2": symlink("two"), "long": symlink(strings.Repeat("l", 4095)),
		"dir": dir(map[string]*daxfs.Node{
			"sub": dir(map[string]*daxfs.Node{"leaf": reg("leaf")}), "sub2": dir(nil),
			"x": reg("x"), "y": reg("y"),
		}),
		"many": many, "fifo": fifo, "fifo2": fifo,
		"null": {Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3)},
	})
	_, b := s.fileImage(t, root, daxfs.Options{Label: "patient"})
	return b
}

func operate(t testing.TB, b []byte) *surgeon {
	t.Helper()
	f, err := daxfs.OpenBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	d, err := daxfs.OpenDAXFS(daxfs.Mem(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return &surgeon{t: t, b: b, f: f, d: d}
}

// close returns the changed image, with a corrected checksum unless keepSum is set.
func (s *surgeon) close() []byte {
	if !s.keepSum {
		binary.LittleEndian.PutUint32(s.b[disk.ErofsSuperOff+4:], disk.ErofsChecksum(s.b))
	}
	return s.b[:len(s.b)-s.cut]
}

func (s *surgeon) super(edit func(*disk.ErofsSuper)) {
	var sb disk.ErofsSuper
	sb.Unmarshal(s.b[disk.ErofsSuperOff:])
	edit(&sb)
	sb.Marshal(s.b[disk.ErofsSuperOff:])
}

func (s *surgeon) superV8(edit func(*disk.V8Super)) {
	var sb disk.V8Super
	sb.Unmarshal(s.b)
	edit(&sb)
	sb.Marshal(s.b)
}

func (s *surgeon) overlay(edit func(*disk.V8Overlay)) {
	var sb disk.V8Super
	sb.Unmarshal(s.b)
	var o disk.V8Overlay
	o.Unmarshal(s.b[sb.OverlayOff:])
	edit(&o)
	o.Marshal(s.b[sb.OverlayOff:])
}

// overlayBytes returns the overlay pair.
func (s *surgeon) overlayBytes() []byte {
	var sb disk.V8Super
	sb.Unmarshal(s.b)
	return s.b[sb.OverlayOff:][:sb.OverlaySize]
}

func (s *surgeon) lookup(path string) daxfs.Inode {
	s.t.Helper()
	in, err := s.f.Lookup(path, false)
	if err != nil {
		s.t.Fatal(err)
	}
	return in
}

func (s *surgeon) lookupV8(path string) daxfs.Inode {
	s.t.Helper()
	in, err := s.d.Lookup(path, false)
	if err != nil {
		s.t.Fatal(err)
	}
	return in
}

// raw returns the bytes from the inode of path on.
func (s *surgeon) raw(path string) []byte {
	return s.b[s.meta()+int64(s.lookup(path).Nid)*disk.ErofsSlot:]
}

// meta returns the offset of nid 0.
func (s *surgeon) meta() int64 {
	var sb disk.ErofsSuper
	sb.Unmarshal(s.b[disk.ErofsSuperOff:])
	return int64(sb.MetaBlock) * daxfs.BlockSize
}

func (s *surgeon) inode(path string, edit func(*disk.ErofsInode)) {
	b := s.raw(path)
	var i disk.ErofsInode
	i.Unmarshal(b)
	edit(&i)
	i.Marshal(b)
}

// rawV8 returns the bytes from the slot of the inode of path on.
func (s *surgeon) rawV8(path string) []byte {
	var sb disk.V8Super
	sb.Unmarshal(s.b)
	return s.b[sb.BaseOff+sb.InodeOff+(s.lookupV8(path).Nid-1)*disk.V8InodeSize:]
}

func (s *surgeon) inodeV8(path string, edit func(*disk.V8Inode)) {
	b := s.rawV8(path)
	var i disk.V8Inode
	i.Unmarshal(b)
	edit(&i)
	i.Marshal(b)
}

// block returns the directory block that holds a name, and the number of its entry there.
func (s *surgeon) block(path, name string) (block []byte, entry int) {
	s.t.Helper()
	in := s.lookup(path)
	for pos := int64(0); pos < in.Size; pos += daxfs.BlockSize {
		b, err := in.View(pos, daxfs.BlockSize)
		if err != nil {
			s.t.Fatal(err)
		}
		names := blockNames(b)
		if i := slices.Index(names, name); i >= 0 {
			return b, i
		}
	}
	s.t.Fatalf("no entry %q in %q", name, path)
	return nil, 0
}

// blockNames returns the names of a valid directory block.
func blockNames(b []byte) []string {
	var names []string
	count := int(binary.LittleEndian.Uint16(b[8:])) / disk.ErofsDirentSize
	for i := range count {
		begin, end := int(binary.LittleEndian.Uint16(b[i*disk.ErofsDirentSize+8:])), len(b)
		if i+1 < count {
			end = int(binary.LittleEndian.Uint16(b[(i+1)*disk.ErofsDirentSize+8:]))
		}
		name, _, _ := strings.Cut(string(b[begin:end]), "\x00")
		names = append(names, name)
	}
	return names
}

func (s *surgeon) dirent(path, name string, edit func(*disk.ErofsDirent)) {
	s.t.Helper()
	b, i := s.block(path, name)
	var e disk.ErofsDirent
	e.Unmarshal(b[i*disk.ErofsDirentSize:])
	edit(&e)
	e.Marshal(b[i*disk.ErofsDirentSize:])
}

// name returns the bytes of a name in its directory block.
func (s *surgeon) name(path, name string) []byte {
	b, i := s.block(path, name)
	off := binary.LittleEndian.Uint16(b[i*disk.ErofsDirentSize+8:])
	return b[off:][:len(name)]
}

// entryV8 returns the 272 bytes of an entry.
func (s *surgeon) entryV8(path, name string) []byte {
	s.t.Helper()
	in := s.lookupV8(path)
	for i := int64(0); i < in.Size/disk.V8DirentUnit; i++ {
		b := s.b[in.Off+i*disk.V8DirentSize:][:disk.V8DirentSize]
		var e disk.V8Dirent
		e.Unmarshal(b)
		if string(b[disk.V8DirentName:][:e.NameLen]) == name {
			return b
		}
	}
	s.t.Fatalf("no entry %q in %q", name, path)
	return nil
}

func (s *surgeon) direntV8(path, name string, edit func(*disk.V8Dirent)) {
	s.t.Helper()
	b := s.entryV8(path, name)
	var e disk.V8Dirent
	e.Unmarshal(b)
	edit(&e)
	e.Marshal(b)
}

// xattrs returns the bytes of an inode's xattrs.
func (s *surgeon) xattrs(path string) []byte {
	b := s.raw(path)
	var i disk.ErofsInode
	i.Unmarshal(b)
	return b[i.HeaderSize():][:disk.ErofsXattrBytes(i.XattrCount)]
}

// base and baseSize describe the base region of the DAXFS half.
func (s *surgeon) base() int64 {
	var sb disk.V8Super
	sb.Unmarshal(s.b)
	return int64(sb.BaseOff)
}

func (s *surgeon) baseSize() uint64 {
	var sb disk.V8Super
	sb.Unmarshal(s.b)
	return sb.BaseSize
}

// target returns the bytes of a symbolic link's target.
func (s *surgeon) target(path string) []byte {
	b, err := s.lookup(path).View(0, 4096)
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}
