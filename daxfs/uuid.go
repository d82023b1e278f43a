package daxfs

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// uuidHash derives the UUID of an image from everything that a reader can see, and nothing else: the
// place of contents does not count. It visits and numbers inodes depth first, names sorted. Every
// field has a fixed width or is preceded by its length, so no two trees have the same description.
type uuidHash struct {
	h hash.Hash
	b []byte
}

func newUUIDHash(label string) *uuidHash {
	u := &uuidHash{sha256.New(), make([]byte, 0, 64<<10)}
	u.text("daxfs dual image 2")
	u.text(label)
	return u
}

func (u *uuidHash) number(v uint32) { u.b = binary.LittleEndian.AppendUint32(u.b, v) }

func (u *uuidHash) text(s string) {
	u.number(uint32(len(s)))
	u.b = append(u.b, s...)
}

// inode starts an inode. The caller then adds the xattrs as stored on disk and the entries, each list
// as its length and its items. rdev is in the encoding of EROFS.
func (u *uuidHash) inode(mode, uid, gid, rdev uint32, mtime Time, d Data, target string) {
	if len(u.b) > 60<<10 {
		u.h.Write(u.b)
		u.b = u.b[:0]
	}
	for _, v := range [...]uint32{mode, uid, gid, rdev, mtime.Nsec} {
		u.number(v)
	}
	u.b = binary.LittleEndian.AppendUint64(u.b, uint64(mtime.Sec))
	u.b = binary.LittleEndian.AppendUint64(u.b, uint64(d.Size))
	u.b = append(u.b, d.Sum[:]...)
	u.text(target)
}

func (u *uuidHash) uuid() (id [16]byte) {
	u.h.Write(u.b)
	copy(id[:], u.h.Sum(nil))
	id[6] = id[6]&0x0f | 0x80 // version 8: custom derivation
	id[8] = id[8]&0x3f | 0x80 // the RFC 9562 variant
	return id
}

func (p *Plan) hash() {
	u := newUUIDHash(p.label)
	for idx := range p.inodes.len() {
		i := p.inodes.at(idx)
		u.inode(i.mode, i.uid, i.gid, i.rdev, i.mtime(), p.data(i), i.target)
		u.number(uint32(len(i.xattrs)))
		for _, x := range i.xattrs {
			u.text(p.xattrs[x].enc)
		}
		u.number(uint32(len(i.kids)))
		for _, k := range i.kids {
			u.text(k.name)
			u.number(uint32(k.child))
		}
	}
	p.uuid = u.uuid()
}

// TreeUUID returns the UUID that a plan without a label has for the tree of an image. data returns the
// contents of a regular file as its Node has them; it is not called for empty files. Errors come from
// reading the image and from data; they wrap ErrCorrupt if the image shows no tree.
//
// It reads the image twice to save memory, which is about 10 bytes for each name.
func TreeUUID(f *FS, data func(Inode) (Data, error)) ([16]byte, error) {
	t := treeHasher{fs: f, data: data, dirs: map[uint64]bool{}, linked: map[uint64]uint32{}}
	if err := t.number(f.Root(), 0); err != nil {
		return [16]byte{}, err
	}
	t.next = 0
	t.hash = newUUIDHash("")
	if err := t.add(f.Root()); err != nil {
		return [16]byte{}, err
	}
	return t.hash.uuid(), nil
}

// treeHasher is one run of TreeUUID. The hash of a directory contains the numbers of its entries,
// which are assigned on first visit. So the first pass numbers the inodes and the second hashes.
type treeHasher struct {
	fs     *FS
	data   func(Inode) (Data, error)
	next   uint32
	dirs   map[uint64]bool   // directories already visited
	linked map[uint64]uint32 // numbers of inodes with several names
	kids   []uint32          // numbers of the entries of all directories, in order of visit
	hash   *uuidHash
}

// entries returns the entries of a directory, sorted by name.
func (t *treeHasher) entries(dir *Inode) ([]Dirent, error) {
	var all []Dirent
	err := dir.Entries(0, func(e Dirent) bool {
		all = append(all, e)
		return true
	})
	slices.SortFunc(all, func(a, b Dirent) int { return strings.Compare(a.Name, b.Name) })
	return all, err
}

// number numbers an unvisited inode and everything below it.
func (t *treeHasher) number(nid uint64, depth int) error {
	in, err := t.fs.Inode(nid)
	if err != nil {
		return err
	}
	self := t.next
	t.next++
	if !in.IsDir() {
		if in.Nlink > 1 {
			t.linked[nid] = self
		}
		return nil
	}
	if t.dirs[nid] || depth > maxPath {
		return corrupt(RuleDirLoop, t.fs.inodeOff(nid), nid, "directory has several names")
	}
	t.dirs[nid] = true
	list, err := t.entries(&in)
	if err != nil {
		return err
	}
	first := len(t.kids)
	t.kids = append(t.kids, make([]uint32, len(list))...)
	for i, e := range list {
		n, numbered := t.linked[e.Nid]
		if !numbered {
			n = t.next
			if err := t.number(e.Nid, depth+1); err != nil {
				return err
			}
		}
		t.kids[first+i] = n
	}
	return nil
}

// add hashes an inode and everything below it.
func (t *treeHasher) add(nid uint64) error {
	t.next++
	in, err := t.fs.Inode(nid)
	if err != nil {
		return err
	}
	var d Data
	target, rdev := "", uint32(0)
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if in.Size > 0 {
			d, err = t.data(in)
		}
	case unix.S_IFLNK:
		target, err = in.Target()
	case unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK:
		rdev = disk.ErofsEncodeDev(unix.Major(in.Rdev), unix.Minor(in.Rdev))
	}
	if err != nil {
		return err
	}
	t.hash.inode(in.Mode, in.UID, in.GID, rdev, in.Mtime, d, target)
	if err := t.xattrs(&in); err != nil {
		return err
	}
	if !in.IsDir() {
		t.hash.number(0)
		return nil
	}
	list, err := t.entries(&in)
	if err != nil {
		return err
	}
	if want := listSize(list); in.Size != want {
		return corrupt(RuleDirBlock, t.fs.inodeOff(nid), nid, "directory has %d bytes, expected %d", in.Size, want)
	}
	if len(list) > len(t.kids) {
		return corrupt(RuleDirBlock, t.fs.inodeOff(nid), nid, "directory changed while it was read")
	}
	numbers := t.kids[:len(list)]
	t.kids = t.kids[len(list):]
	t.hash.number(uint32(len(list)))
	for i, e := range list {
		t.hash.text(e.Name)
		t.hash.number(numbers[i])
	}
	for i, e := range list {
		if numbers[i] == t.next {
			if err := t.add(e.Nid); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *treeHasher) xattrs(in *Inode) error {
	xs, err := in.Xattrs()
	if err != nil {
		return err
	}
	slices.SortFunc(xs, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	t.hash.number(uint32(len(xs)))
	var b []byte
	for _, x := range xs {
		b = appendXattr(b[:0], x)
		t.hash.text(string(b))
	}
	return nil
}

// listSize returns the size that the writer gives to a directory with these entries, sorted by name.
func listSize(list []Dirent) int64 {
	names := append(make([]dirent, 0, len(list)+2), dirent{name: "."}, dirent{name: ".."})
	for _, e := range list {
		names = append(names, dirent{name: e.Name})
	}
	slices.SortFunc(names, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
	return dirSize(names)
}
