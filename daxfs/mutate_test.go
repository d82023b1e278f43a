package daxfs_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// richImage is an image of about 100 inodes with every feature of the format. Equal seeds give equal images.
func richImage(t testing.TB, seed uint64) []byte {
	t.Helper()
	s := newStore(daxfs.BlockSize)
	prog := s.put(program(t))
	reg := func(size int, xs ...daxfs.Xattr) *daxfs.Node {
		data := s.put(bytes.Repeat([]byte{byte(size), byte(seed), 'x'}, size/3+1)[:size])
		return &daxfs.Node{Mode: unix.S_IFREG | 0o644, UID: 5, GID: 6, Data: data, Xattrs: xs}
	}
	runs := func(sets ...uint32) *daxfs.Node {
		x := daxfs.Xattr{Name: "security.capability", Value: []byte(le32(sets...))}
		return &daxfs.Node{Mode: unix.S_IFREG | 0o755, Data: prog, Xattrs: []daxfs.Xattr{x}}
	}
	x := func(name string, size int) daxfs.Xattr {
		return daxfs.Xattr{Name: name, Value: bytes.Repeat([]byte("v"), size)}
	}
	access := daxfs.Xattr{Name: "system.posix_acl_access", Value: acl(7)}
	byDir := daxfs.Xattr{Name: "system.posix_acl_default", Value: acl(8)}
	shared := []daxfs.Xattr{x("user.shared", 40), x("security.selinux", 30), access, x("trusted.shared", 0)}
	linked, fifo := reg(4097, shared...),
		&daxfs.Node{Mode: unix.S_IFIFO | 0o600, Xattrs: []daxfs.Xattr{x("trusted.f", 3)}}
	many := dir(map[string]*daxfs.Node{})
	for i := range 40 { // blocks of names, few inodes
		many.Entries[fmt.Sprintf("%0*d", 190+i, i)] = linked
	}
	links := dir(map[string]*daxfs.Node{"fast": symlink("../files/linked"), "long": symlink(strings.Repeat("l", 4095))})
	for name, list := range map[string][]daxfs.Xattr{
		"trusted": {x("trusted.a", 5)}, "secure": {x("security.ima", 50)},
		"large": {x("trusted.v", 4000), x("security.w", 9)},
	} {
		link := symlink("target of " + name)
		link.Xattrs = list
		links.Entries[name] = link
	}
	top := dir(map[string]*daxfs.Node{
		"many": many, "links": links,
		"bin": dir(map[string]*daxfs.Node{
			"v2": runs(2<<24, 1<<10, 0, 0, 0), "effective": runs(2<<24|1, 1<<10, 0, 1, 0),
			"v3": runs(3<<24|1, 1<<10, 0, 0, 0, 1000),
		}),
		"files": dir(map[string]*daxfs.Node{
			"linked": linked, "empty": reg(0, access), "block": reg(4096),
			"page": reg(12000, x("user.a", 1), x("user.b", 0)),
			"same": reg(12000, shared...), "across": reg(10, x("user.long", 5000), x("user.longer", 9000)),
			"names": reg(20, x("user."+strings.Repeat("n", 250), 1), x("trusted."+strings.Repeat("n", 247), 2)),
		}),
		"special": dir(map[string]*daxfs.Node{
			"null": {
				Mode: unix.S_IFCHR | 0o666, Rdev: unix.Mkdev(1, 3),
				Xattrs: []daxfs.Xattr{x("security.selinux", 8)},
			},
			"disk":  {Mode: unix.S_IFBLK | 0o660, Rdev: unix.Mkdev(8, 300), Xattrs: []daxfs.Xattr{access}},
			"white": {Mode: unix.S_IFCHR}, "fifo": fifo, "again": fifo, "sock": {Mode: unix.S_IFSOCK | 0o755},
		}),
		"random": randomTree(seed, 40, s),
	})
	top.Xattrs = []daxfs.Xattr{byDir, x("user.top", 10)}
	top.Entries["files"].Xattrs = []daxfs.Xattr{byDir, access, x("trusted.overlay.opaque", 1)}
	_, b := s.fileImage(t, top, daxfs.Options{Label: "rich"})
	return b
}

// site is one structure of an image.
type site struct{ off, size int }

// mutator changes the metadata of an image at random.
type mutator struct {
	sound []byte
	meta  int
	sites [][]site  // by kind
	pairs [][2]site // one inode in both halves
	xs    []site    // entries of xattrs
	r     *rand.Rand
}

func newMutator(t testing.TB, sound []byte) *mutator {
	t.Helper()
	o := operate(t, sound)
	m := &mutator{sound: sound, meta: int(o.meta())}
	var inodes, names, v8, v8names []site
	err := o.f.Walk(func(path string, in daxfs.Inode) error {
		off := m.meta + int(in.Nid)*disk.ErofsSlot
		var raw disk.ErofsInode
		raw.Unmarshal(sound[off:])
		it := site{off, raw.HeaderSize()}
		inodes = append(inodes, it)
		area := site{off + it.size, disk.ErofsXattrBytes(raw.XattrCount)}
		if area.size > 0 {
			m.addXattrs(area)
		}
		if in.IsDir() {
			names = append(names, direntSites(sound, &raw, area.off+area.size)...)
		}
		if d, err := o.d.Lookup(path, false); err == nil {
			slot := site{int(o.base()) + int(slotOf(sound, d.Nid)), disk.V8InodeSize}
			v8 = append(v8, slot)
			m.pairs = append(m.pairs, [2]site{it, slot})
			if d.IsDir() {
				for i := range int(d.Size / disk.V8DirentUnit) {
					v8names = append(v8names, site{int(d.Off) + i*disk.V8DirentSize, disk.V8DirentSize})
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	supers := []site{{0, disk.V8SuperSize}, {disk.ErofsSuperOff, disk.ErofsSuperSize}}
	m.sites = append(m.sites, inodes, inodes, names, names, m.xs, m.xs, m.xs, v8, v8names) // weighted by importance
	m.sites = append(append(m.sites, m.sites...), supers)
	return m
}

// slotOf returns the offset in the base region of an inode of the DAXFS half.
func slotOf(b []byte, ino uint64) uint64 {
	var sb disk.V8Super
	sb.Unmarshal(b)
	return sb.InodeOff + (ino-1)*disk.V8InodeSize
}

// addXattrs adds the header of the xattrs of an inode, their ids and entries, and the shared entries.
func (m *mutator) addXattrs(area site) {
	shared := int(m.sound[area.off+4])
	m.xs = append(m.xs, site{area.off, disk.ErofsXattrHdrSize + shared*disk.ErofsXattrIDSize})
	var sb disk.ErofsSuper
	sb.Unmarshal(m.sound[disk.ErofsSuperOff:])
	for i := range shared {
		id := binary.LittleEndian.Uint32(m.sound[area.off+disk.ErofsXattrHdrSize+i*disk.ErofsXattrIDSize:])
		m.xs = append(m.xs, m.entry(int(sb.XattrBlock)*daxfs.BlockSize+int(id)*disk.ErofsXattrIDSize))
	}
	for pos := area.off + disk.ErofsXattrHdrSize + shared*disk.ErofsXattrIDSize; pos < area.off+area.size; {
		e := m.entry(pos)
		m.xs = append(m.xs, e)
		pos += e.size
	}
}

func (m *mutator) entry(off int) site {
	var e disk.ErofsXattrEntry
	e.Unmarshal(m.sound[off:])
	return site{off, e.Size()}
}

// direntSites returns the entries and names of a directory whose inline tail is at tail.
func direntSites(b []byte, raw *disk.ErofsInode, tail int) (list []site) {
	for pos := 0; pos < int(raw.Size); pos += daxfs.BlockSize {
		off, size := int(raw.Union)*daxfs.BlockSize+pos, min(int(raw.Size)-pos, daxfs.BlockSize)
		if raw.Layout == disk.ErofsLayoutInline && int(raw.Size)-pos < daxfs.BlockSize {
			off = tail
		}
		first := int(binary.LittleEndian.Uint16(b[off+8:]))
		for at := 0; at < first; at += disk.ErofsDirentSize {
			list = append(list, site{off + at, disk.ErofsDirentSize})
		}
		list = append(list, site{off + first, size - first})
	}
	return list
}

// mutate returns a changed image, valid until the next call, and a description of the change. Equal
// seeds and numbers give equal changes.
func (m *mutator) mutate(b []byte, seed, number uint64) (mutated []byte, what string) {
	m.r = rand.New(rand.NewPCG(seed, number))
	copy(b, m.sound)
	var did []string
	for range 1 + m.r.IntN(2)*m.r.IntN(3) {
		did = append(did, m.once(b))
	}
	if m.r.IntN(8) > 0 {
		binary.LittleEndian.PutUint32(b[disk.ErofsSuperOff+4:], disk.ErofsChecksum(b))
	}
	if m.r.IntN(500) == 0 {
		cut := 1 + m.r.IntN(3*daxfs.BlockSize)
		return b[:len(b)-cut], fmt.Sprint(did, " cut ", cut)
	}
	return b, fmt.Sprint(did)
}

func pick[T any](m *mutator, list []T) T { return list[m.r.IntN(len(list))] }

// place returns the offset of a structure or of any metadata, with at least n bytes from there on.
func (m *mutator) place(n int) int {
	if m.r.IntN(6) == 0 {
		return m.meta + m.r.IntN(len(m.sound)-m.meta-n)
	}
	s := pick(m, pick(m, m.sites))
	return min(s.off+m.r.IntN(s.size), len(m.sound)-n)
}

// edges are interesting numbers.
var edges = []uint64{
	0, 1, 2, 3, 4, 7, 8, 11, 12, 13, 16, 31, 32, 33, 63, 64, 127, 128, 254, 255, 256, 257, 271, 272, 1000, 4095, 4096,
	4097, 1<<15 - 1, 1 << 15, 1<<16 - 2, 1<<16 - 1, 1 << 16, 1<<24 | 1, 2 << 24, 3 << 24, 1<<31 - 1, 1 << 31, 1<<32 - 2,
	1<<32 - 1, 1 << 32, 1<<63 - 1, 1 << 63, 1<<64 - 1, 0o040755, 0o100644, 0o104755, 0o120777, 0o020666,
}

// number reads n bytes as a number, put writes one.
func number(b []byte, n int) uint64 {
	var v [8]byte
	copy(v[:], b[:n])
	return binary.LittleEndian.Uint64(v[:])
}

func put(b []byte, n int, v uint64) {
	var all [8]byte
	binary.LittleEndian.PutUint64(all[:], v)
	copy(b[:n], all[:n])
}

// once makes one change.
func (m *mutator) once(b []byte) string {
	width := 1 << m.r.IntN(4)
	off := m.place(64)
	at := off &^ (width - 1) // structures start at multiples of 4
	switch m.r.IntN(12) {
	case 0, 1:
		b[off] ^= 1 << m.r.IntN(8)
		return fmt.Sprintf("flip %d to %#x", off, b[off])
	case 2:
		b[off] = byte(m.r.Uint32())
		return fmt.Sprintf("byte %d to %#x", off, b[off])
	case 3:
		put(b[at:], width, pick(m, edges))
		return fmt.Sprintf("edge %d to %x", at, b[at:at+width])
	case 4, 5:
		put(b[at:], width, number(b[at:], width)+pick(m, []uint64{1, 2, 4, 32})*pick(m, []uint64{1, 1<<64 - 1}))
		return fmt.Sprintf("near %d to %x", at, b[at:at+width])
	case 6:
		to := m.place(64) &^ (width - 1)
		x, y := number(b[at:], width), number(b[to:], width)
		put(b[at:], width, y)
		put(b[to:], width, x)
		return fmt.Sprintf("swap %d and %d of %d bytes", at, to, width)
	case 7:
		kind := pick(m, m.sites)
		from, to := pick(m, kind), pick(m, kind)
		n := copy(b[to.off:to.off+to.size], m.sound[from.off:from.off+from.size])
		return fmt.Sprintf("copy %d over %d of %d bytes", from.off, to.off, n)
	case 8:
		n := 1 + m.r.IntN(64)
		from := m.place(64)
		copy(b[off:off+n], m.sound[from:])
		return fmt.Sprintf("run %d over %d of %d bytes", from, off, n)
	case 9:
		return m.entryOnce(b)
	case 10:
		return m.pairOnce(b)
	default:
		return m.everywhere(b)
	}
}

// entryOnce changes an xattr entry without changing its size.
func (m *mutator) entryOnce(b []byte) string {
	s := pick(m, m.xs)
	x := b[s.off:]
	var e disk.ErofsXattrEntry
	e.Unmarshal(x)
	if e.Size() != s.size { // a header
		x[4] += byte(m.r.IntN(5)) - 2
		return fmt.Sprintf("shared ids at %d: %d", s.off, x[4])
	}
	switch m.r.IntN(4) {
	case 0:
		e.Index = uint8(m.r.IntN(8))
	case 1:
		n := uint8(m.r.IntN(5)) - 2
		e.NameLen, e.ValueLen = e.NameLen+n, e.ValueLen-uint16(int8(n))
	case 2:
		room := s.size - disk.ErofsXattrEntSize
		e.NameLen = uint8(m.r.IntN(min(room, 255) + 1))
		e.ValueLen = uint16(room - int(e.NameLen) - m.r.IntN(4))
	default:
		value := pick(m,
			[]string{aclOf([3]uint32{1, 6, 1<<32 - 1}), string(capability), le32(3<<24, 1, 0, 0, 0, 0), "\x02"})
		name := pick(m, []string{"", "capability", "capability", "ima"})
		if disk.ErofsXattrEntSize+len(name)+len(value) > s.size {
			break
		}
		copy(x[disk.ErofsXattrEntSize:], name+value)
		e = disk.ErofsXattrEntry{NameLen: uint8(len(name)), Index: uint8(2 + m.r.IntN(5)), ValueLen: uint16(len(value))}
		if m.r.IntN(2) == 0 {
			e.ValueLen = uint16(s.size - disk.ErofsXattrEntSize - len(name))
		}
	}
	e.Marshal(x)
	return fmt.Sprintf("entry %d: %+v", s.off, e)
}

// pairOnce makes the same change to an inode in both halves: Check compares them.
func (m *mutator) pairOnce(b []byte) string {
	p := pick(m, m.pairs)
	var i disk.ErofsInode
	var d disk.V8Inode
	i.Unmarshal(b[p[0].off:])
	d.Unmarshal(b[p[1].off:])
	v := pick(m, edges)
	switch m.r.IntN(6) {
	case 0:
		i.Mode ^= uint16(m.r.IntN(0o10000))
		d.Mode = uint32(i.Mode)
	case 1:
		i.UID = uint32(v)
		d.UID = i.UID
	case 2:
		i.GID = uint32(v)
		d.GID = i.GID
	case 3:
		i.Size += uint64(m.r.IntN(9)) - 4
		d.Size = i.Size
	case 4:
		i.Nlink = uint32(v)
		d.Nlink = i.Nlink
	default:
		i.Union += uint32(m.r.IntN(5)) - 2
		d.DataOff = uint64(i.Union-1) * daxfs.BlockSize
	}
	i.Marshal(b[p[0].off:])
	d.Marshal(b[p[1].off:])
	return fmt.Sprintf("inode %d: %+v", p[0].off, i)
}

// everywhere changes a few bytes at all their occurrences, because names are in both halves.
func (m *mutator) everywhere(b []byte) string {
	s := pick(m, pick(m, m.sites[2:9]))
	n := min(2+m.r.IntN(5), s.size)
	off := s.off + m.r.IntN(s.size-n+1)
	old := bytes.Clone(b[off : off+n])
	if bytes.Count(b[m.meta:], old) > 12 {
		b[off]++
		return fmt.Sprintf("more %d to %#x", off, b[off])
	}
	to := bytes.Clone(old)
	i := m.r.IntN(n)
	to[i] = []byte{0, 1, '/', '.', 0xff, byte(m.r.Uint32()), to[i] + 1, to[i] - 1}[m.r.IntN(8)]
	copy(b[m.meta:], bytes.ReplaceAll(b[m.meta:], old, to))
	return fmt.Sprintf("all %x to %x", old, to)
}
