package daxfs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// view compares the kernel's view of a mounted image with that of our reader.
type view struct {
	mnt   string
	progs *programs
	seen  map[uint64]bool // inodes already compared
	bad   []string
	buf   []byte
}

// compareView returns a few lines of differences. It runs programs with capabilities if progs is not nil.
func compareView(f *daxfs.FS, mnt string, progs *programs) []string {
	v := &view{mnt: mnt, progs: progs, seen: map[uint64]bool{}, buf: make([]byte, 64<<10)}
	v.super(f)
	if err := f.Walk(func(path string, in daxfs.Inode) error { return v.inode(path, &in) }); err != nil {
		v.errorf("", "our reader: %v", err)
	}
	return v.bad
}

const maxDifferences = 10

func (v *view) errorf(path, format string, args ...any) {
	v.bad = append(v.bad, fmt.Sprintf("%.100q: %s", path, fmt.Sprintf(format, args...)))
}

func (v *view) super(f *daxfs.FS) {
	var st unix.Statfs_t
	sb := f.Super()
	if err := unix.Statfs(v.mnt, &st); err != nil || st.Blocks != uint64(sb.Blocks) || st.Files-st.Ffree != sb.Inodes {
		v.errorf("", "statfs: %d blocks and %d inodes, %v; our reader has %d and %d", st.Blocks, st.Files-st.Ffree, err,
			sb.Blocks, sb.Inodes)
	}
	root, err := os.Open(v.mnt)
	if err != nil {
		v.errorf("", "open: %v", err)
		return
	}
	defer root.Close()
	var label [256]byte
	var uuid [17]byte // starts with its length
	if ask(root, getLabel, unsafe.Pointer(&label)) && unix.ByteSliceToString(label[:]) != sb.Label {
		v.errorf("", "label %q, our reader has %q", label, sb.Label)
	}
	if ask(root, getUUID, unsafe.Pointer(&uuid)) && [16]byte(uuid[1:]) != sb.UUID {
		v.errorf("", "UUID %x, our reader has %x", uuid, sb.UUID)
	}
}

// Requests of ioctl(2) of new kernels: FS_IOC_GETFSLABEL and FS_IOC_GETFSUUID.
const (
	getLabel = 2<<30 | 256<<16 | 0x94<<8 | 49
	getUUID  = 2<<30 | 17<<16 | 0x15<<8
)

// ask returns false if the kernel does not know the request.
func ask(f *os.File, request uintptr, answer unsafe.Pointer) bool {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(answer))
	return errno == 0
}

// attributes are the fields of stat(2) except the device number.
type attributes struct {
	ino, rdev                 uint64
	mode, nlink, uid, gid     uint32
	size, blocks, blksize     int64
	access, modified, changed daxfs.Time
}

func (v *view) inode(path string, in *daxfs.Inode) error {
	if len(v.bad) >= maxDifferences {
		return nil
	}
	host := filepath.Join(v.mnt, path)
	var st unix.Stat_t
	if err := unix.Lstat(host, &st); err != nil {
		v.errorf(path, "stat: %v", err)
		return nil
	}
	at := func(t unix.Timespec) daxfs.Time { return daxfs.Time{Sec: int64(t.Sec), Nsec: uint32(t.Nsec)} }
	got := attributes{
		st.Ino, st.Rdev, st.Mode, uint32(st.Nlink), st.Uid, st.Gid, st.Size, st.Blocks, int64(st.Blksize),
		at(st.Atim), at(st.Mtim), at(st.Ctim),
	}
	want := attributes{
		in.Nid, in.Rdev, in.Mode, in.Nlink, in.UID, in.GID, in.Size, (in.Size + 4095) / 4096 * 8, daxfs.BlockSize,
		in.Mtime, in.Mtime, in.Mtime,
	}
	if got != want {
		v.errorf(path, "stat: %+v, our reader has %+v", got, want)
	}
	if v.seen[st.Ino] {
		return nil // another name
	}
	v.seen[st.Ino] = true
	v.xattrs(path, host, in)
	switch {
	case in.IsRegular():
		v.contents(path, host, in)
	case in.IsSymlink():
		n, err := unix.Readlink(host, v.buf)
		if target, terr := in.Target(); err != nil || terr != nil || target != string(v.buf[:n]) {
			v.errorf(path, "readlink: %q, %v; our reader has %q, %v", v.buf[:max(n, 0)], err, target, terr)
		}
	case in.IsDir():
		v.entries(path, host, in)
	}
	return nil
}

// xattrs also requests the size of the list and a missing attribute.
func (v *view) xattrs(path, host string, in *daxfs.Inode) {
	xs, err := in.Xattrs()
	if err != nil {
		v.errorf(path, "xattrs: our reader: %v", err)
		return
	}
	var want strings.Builder
	for _, x := range xs {
		want.WriteString(x.Name + "\x00")
	}
	size, serr := unix.Llistxattr(host, nil)
	n, err := unix.Llistxattr(host, v.buf)
	if err != nil || serr != nil || size != n || string(v.buf[:n]) != want.String() {
		v.errorf(path, "listxattr: %d bytes, %v, then %.300q, %v; our reader has %.300q", size, serr, v.buf[:max(n, 0)],
			err, want.String())
		return
	}
	for _, x := range xs {
		n, err := unix.Lgetxattr(host, x.Name, v.buf)
		if err != nil || !bytes.Equal(v.buf[:n], x.Value) {
			v.errorf(path, "getxattr %q: %.100x, %v; our reader has %.100x", x.Name, v.buf[:max(n, 0)], err, x.Value)
		}
	}
	const none = "trusted.none"
	if n, err := unix.Lgetxattr(host, none, v.buf); !errors.Is(err, unix.ENODATA) {
		v.errorf(path, "getxattr of an attribute that is not there: %d bytes, %v", n, err)
	}
}

func (v *view) contents(path, host string, in *daxfs.Inode) {
	got, err := os.ReadFile(host)
	if err != nil {
		v.errorf(path, "read: %v", err)
		return
	}
	want, err := in.View(0, int(in.Size))
	if err != nil || !bytes.Equal(got, want) {
		v.errorf(path, "read: %d bytes that are not the %d bytes of our reader (%v)", len(got), len(want), err)
	}
	if v.progs == nil {
		return
	}
	if msg := v.progs.compare(host, in); msg != "" {
		v.errorf(path, "execve: %s", msg)
	}
}

// entries compares a listing and looks up a missing name.
func (v *view) entries(path, host string, in *daxfs.Inode) {
	want := []string{fmt.Sprintf("%d %#o %q", in.Nid, unix.S_IFDIR, ".")}
	err := in.Entries(0, func(e daxfs.Dirent) bool {
		want = append(want, fmt.Sprintf("%d %#o %q", e.Nid, e.Type, e.Name))
		return true
	})
	got, gerr := v.list(host)
	slices.Sort(got) // dots are among the names
	slices.Sort(want)
	if err != nil || gerr != nil || !slices.Equal(got, want) {
		v.errorf(path, "getdents: %.300q, %v; our reader has %.300q, %v", got, gerr, want, err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(host, "\x02none"), &st); !errors.Is(err, unix.ENOENT) {
		v.errorf(path, "stat of a name that is not there: %v", err)
	}
}

// list reads a directory with getdents(2). It skips the inode of "..", which belongs to another directory.
func (v *view) list(host string) (list []string, err error) {
	fd, err := unix.Open(host, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Getdents(fd, v.buf)
		if n == 0 || err != nil {
			return list, err
		}
		for b := v.buf[:n]; len(b) > 0; {
			size := binary.NativeEndian.Uint16(b[16:])
			name, _, _ := bytes.Cut(b[19:size], []byte{0})
			if string(name) != ".." {
				typ := uint32(b[18]) << 12 // DT_REG and the others are the bits of the mode
				list = append(list, fmt.Sprintf("%d %#o %q", binary.NativeEndian.Uint64(b), typ, name))
			}
			b = b[size:]
		}
	}
}

// TestCompareView changes one thing at a time in the reader's image, but not in the mounted one: the
// comparison must find each difference.
func TestCompareView(t *testing.T) {
	sound := richImage(t, 1)
	mountNamespace(t)
	mnt, _ := mountImage(t, "loop", writeTemp(t, sound), 0, int64(len(sound)))
	progs := newPrograms(t)
	if bad := compareView(operate(t, sound).f, mnt, progs); bad != nil {
		t.Errorf("the sound image: %q", bad)
	}
	inode := func(path string, edit func(*disk.ErofsInode)) func(*surgeon) {
		return func(s *surgeon) { s.inode(path, edit) }
	}
	for name, edit := range map[string]func(*surgeon){
		"mode":     inode("files/page", func(i *disk.ErofsInode) { i.Mode ^= 1 }),
		"links":    inode("files/page", func(i *disk.ErofsInode) { i.Nlink++ }),
		"owner":    inode("files/page", func(i *disk.ErofsInode) { i.UID++ }),
		"group":    inode("files/page", func(i *disk.ErofsInode) { i.GID++ }),
		"size":     inode("files/page", func(i *disk.ErofsInode) { i.Size-- }),
		"contents": inode("files/page", func(i *disk.ErofsInode) { i.Union-- }),
		"device":   inode("special/null", func(i *disk.ErofsInode) { i.Union++ }),
		"target":   func(s *surgeon) { s.target("links/fast")[0]++ },
		"time":     func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.EpochNsec++ }) },
		"label":    func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.Label[0]++ }) },
		"UUID":     func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.UUID[0]++ }) },
		"inodes":   func(s *surgeon) { s.super(func(d *disk.ErofsSuper) { d.Inos++ }) },
		"name":     func(s *surgeon) { s.name("files", "page")[3]++ },
		"inode": func(s *surgeon) {
			s.dirent("files", "page", func(d *disk.ErofsDirent) { d.Nid = s.lookup("files/same").Nid })
		},
		"type": func(s *surgeon) {
			s.dirent("files", "page", func(d *disk.ErofsDirent) { d.Type = disk.ErofsFTFifo })
		},
		"xattr name":  func(s *surgeon) { s.xattrs("files/page")[16]++ },
		"xattr value": func(s *surgeon) { b := s.xattrs("files/across"); b[len(b)-9]++ },
		"xattr missing": inode("links/large",
			func(i *disk.ErofsInode) { i.Layout, i.XattrCount = disk.ErofsLayoutPlain, 0 }),
	} {
		s := operate(t, bytes.Clone(sound))
		edit(s)
		f, err := daxfs.OpenBytes(s.close())
		if err != nil {
			t.Fatal(err)
		}
		if compareView(f, mnt, progs) == nil {
			t.Errorf("%s: the comparison does not see it", name)
		}
	}

	s := operate(t, bytes.Clone(sound))
	x := s.xattrs("bin/v2")
	x[bytes.Index(x, []byte("capability"))+len("capability")+4]++
	in := s.lookup("bin/v2")
	if progs.compare(mnt+"/bin/v2", &in) == "" {
		t.Error("capabilities of a program: the comparison does not see them")
	}
}
