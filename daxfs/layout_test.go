package daxfs_test

import (
	"fmt"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
	"golang.org/x/sys/unix"
)

// inodesOf reads the headers of all inodes of an image, by offset.
func inodesOf(t testing.TB, img []byte) map[int64]disk.ErofsInode {
	t.Helper()
	f, err := daxfs.OpenBytes(img)
	if err != nil {
		t.Fatal(err)
	}
	var sb disk.ErofsSuper
	sb.Unmarshal(img[disk.ErofsSuperOff:])
	all := map[int64]disk.ErofsInode{}
	var walk func(nid uint64)
	walk = func(nid uint64) {
		off := int64(sb.MetaBlock)*daxfs.BlockSize + int64(nid)*disk.ErofsSlot
		if _, ok := all[off]; ok {
			return
		}
		var e disk.ErofsInode
		e.Unmarshal(img[off:])
		all[off] = e
		if uint32(e.Mode)&unix.S_IFMT != unix.S_IFDIR {
			return
		}
		in, err := f.Inode(nid)
		if err != nil {
			t.Fatal(err)
		}
		if err := in.Entries(0, func(d daxfs.Dirent) bool {
			if d.Name != "." && d.Name != ".." {
				walk(d.Nid)
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
	}
	walk(f.Root())
	return all
}

// TestLayoutOldKernels: kernels since 5.4 can read the images: inode headers within a block, inline tails in
// the block of their inode's end, symlinks with their inode in one block, no inline contents of regular files.
func TestLayoutOldKernels(t *testing.T) {
	for name, make := range kernelTrees() {
		if name == "large" || name == "links" {
			continue // slow and without additional coverage
		}
		t.Run(name, func(t *testing.T) {
			if testing.Short() && name == "huge directory" {
				t.Skip("slow: looks at 20000 inodes")
			}
			s := newStore(daxfs.BlockSize)
			_, img := s.fileImage(t, make(s), daxfs.Options{})
			compact, inline := 0, 0
			for off, e := range inodesOf(t, img) {
				head := int64(e.HeaderSize())
				end := off + head + int64(disk.ErofsXattrBytes(e.XattrCount))
				at := func(format string, args ...any) {
					t.Helper()
					t.Errorf("inode at %d, mode %o, size %d: %s", off, e.Mode, e.Size, fmt.Sprintf(format, args...))
				}
				if off/daxfs.BlockSize != (off+head-1)/daxfs.BlockSize {
					at("the header crosses a block")
				}
				if !e.Extended {
					compact++
				}
				typ := uint32(e.Mode) & unix.S_IFMT
				switch {
				case e.Layout == disk.ErofsLayoutPlain:
					if typ == unix.S_IFDIR && e.Size <= 3000 && end-off+int64(e.Size) <= daxfs.BlockSize {
						at("a small directory takes a block")
					}
					continue
				case e.Layout != disk.ErofsLayoutInline:
					at("layout %d", e.Layout)
					continue
				case typ != unix.S_IFDIR && typ != unix.S_IFLNK:
					at("is inline")
				}
				inline++
				tail := int64(e.Size) % daxfs.BlockSize
				if tail == 0 {
					at("inline without a tail")
				}
				if off/daxfs.BlockSize != (end+tail-1)/daxfs.BlockSize {
					at("inode and inline tail of %d bytes lie in two blocks", tail)
				}
				if typ == unix.S_IFLNK && (e.Size >= daxfs.BlockSize || img[end+tail] != 0) {
					at("no NUL after the target")
				}
			}
			t.Logf("%d compact, %d inline", compact, inline)
		})
	}
}

// TestLayoutCompact has inodes on both sides of each limit of the compact form.
func TestLayoutCompact(t *testing.T) {
	s := newStore(daxfs.BlockSize)
	root := dir(map[string]*daxfs.Node{})
	want := map[string]bool{}
	add := func(name string, compact bool, change func(*daxfs.Node)) {
		n := &daxfs.Node{Mode: unix.S_IFREG, Mtime: daxfs.Time{Sec: 77, Nsec: 1}}
		change(n)
		root.Entries[name], want[name] = n, compact
	}
	for i := range 5 {
		add(fmt.Sprint("plain", i), true, func(*daxfs.Node) {})
	}
	add("uid 65535", true, func(n *daxfs.Node) { n.UID = 65535 })
	add("uid 65536", false, func(n *daxfs.Node) { n.UID = 65536 })
	add("gid 65535", true, func(n *daxfs.Node) { n.GID = 65535 })
	add("gid 65536", false, func(n *daxfs.Node) { n.GID = 65536 })
	add("second", false, func(n *daxfs.Node) { n.Mtime.Sec++ })
	add("nanosecond", false, func(n *daxfs.Node) { n.Mtime.Nsec = 0 })
	add("xattr", true, func(n *daxfs.Node) { n.Xattrs = []daxfs.Xattr{{Name: "user.a"}} })
	add("4 GiB", false, func(n *daxfs.Node) { n.Data = daxfs.Data{Off: 1 << 33, Size: 1 << 32} })
	add("less", true, func(n *daxfs.Node) { n.Data = daxfs.Data{Off: daxfs.BlockSize, Size: 1<<32 - 1} })
	links := dir(map[string]*daxfs.Node{})
	root.Entries["links"], want["links"] = links, false
	linked := &daxfs.Node{Mode: unix.S_IFREG, Mtime: daxfs.Time{Sec: 77, Nsec: 1}}
	root.Entries["linked"], want["linked"] = linked, false
	for i := range 65535 {
		links.Entries[fmt.Sprint(i)] = linked
	}
	p, err := daxfs.NewPlan(root, daxfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	meta := int64(1<<33 + 1<<32)
	if err := p.Place(daxfs.Placement{Meta: meta, End: meta + p.MetaSize()}); err != nil {
		t.Fatal(err)
	}
	// Move the metadata down, so that the contents need not exist.
	if err := p.WriteTo(cut{&s.f, meta}); err != nil {
		t.Fatal(err)
	}
	var sb disk.ErofsSuper
	sb.Unmarshal(s.f.b[disk.ErofsSuperOff:])
	if sb.EpochSec != 77 || sb.EpochNsec != 1 {
		t.Errorf("epoch %d.%09d, expected the time that most files have", sb.EpochSec, sb.EpochNsec)
	}
	run := s.f.b[daxfs.BlockSize:]
	var e disk.ErofsInode
	e.Unmarshal(run[int(sb.RootNid)*disk.ErofsSlot:])
	b := run[int(sb.RootNid)*disk.ErofsSlot+e.HeaderSize():]
	for at := 0; ; at += disk.ErofsDirentSize {
		var d, first disk.ErofsDirent
		first.Unmarshal(b)
		if at == int(first.NameOff) {
			break
		}
		d.Unmarshal(b[at:])
		end := int(e.Size)
		if at+disk.ErofsDirentSize < int(first.NameOff) {
			var next disk.ErofsDirent
			next.Unmarshal(b[at+disk.ErofsDirentSize:])
			end = int(next.NameOff)
		}
		name := string(b[d.NameOff:end])
		compact, ok := want[name]
		if ok && disk.ErofsInodeExtended(run[d.Nid*disk.ErofsSlot:]) == compact {
			t.Errorf("%q is compact: %v, expected %v", name, !compact, compact)
		}
		delete(want, name)
	}
	if len(want) > 0 {
		t.Errorf("not found: %v", want)
	}
}

// cut moves writes at or above from down to the second block.
type cut struct {
	f    *memFile
	from int64
}

func (c cut) WriteAt(p []byte, off int64) (int, error) {
	if off >= c.from {
		off -= c.from - daxfs.BlockSize
	}
	return c.f.WriteAt(p, off)
}

// TestLayoutTargets: every symlink target is stored once, because both halves share it.
func TestLayoutTargets(t *testing.T) {
	s := newStore(daxfs.BlockSize)
	root := dir(map[string]*daxfs.Node{})
	for n := 1; n < 4096; n += 17 {
		root.Entries[fmt.Sprint(n)] = symlink(fmt.Sprintf("%0*d", n, 0))
	}
	_, img := s.fileImage(t, root, daxfs.Options{})
	var sb disk.V8Super
	sb.Unmarshal(img)
	inodes := inodesOf(t, img)
	for ino := range sb.InodeCount {
		var v disk.V8Inode
		v.Unmarshal(img[sb.BaseOff+sb.InodeOff+uint64(ino)*disk.V8InodeSize:])
		if v.Mode&unix.S_IFMT != unix.S_IFLNK {
			continue
		}
		at, found := int64(sb.BaseOff+v.DataOff), false
		for off, e := range inodes {
			start := off + int64(e.HeaderSize())
			if e.Layout == disk.ErofsLayoutPlain {
				start = int64(e.Union) * daxfs.BlockSize
			}
			found = found || uint32(e.Mode) == v.Mode && start == at && e.Size == v.Size && e.Ino == v.Ino
		}
		if !found || img[at+int64(v.Size)] != 0 {
			t.Errorf("target of %d bytes at %d is not that of the EROFS half, or has no NUL", v.Size, at)
		}
	}
}
