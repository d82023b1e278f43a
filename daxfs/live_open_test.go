package daxfs_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"golang.org/x/sys/unix"
)

// newSmallLive is newLivePool with room for a few small images.
func newSmallLive(t testing.TB, slots, perBlock int) *livePool {
	t.Helper()
	p := &livePool{have: map[daxfs.InodeKey][]uint64{}}
	p.g = daxfs.Geometry{UUID: [16]byte{1, 2, 3}, Slots: slots, PerBlock: perBlock, Head: 3 * daxfs.BlockSize}
	p.next = p.g.TreeStart()
	p.s = newStore(p.next + 64*daxfs.BlockSize)
	p.g.Blocks = uint32(p.s.next/daxfs.BlockSize + 16)
	if err := daxfs.FormatLive(&p.s.f, p.g); err != nil {
		t.Fatal(err)
	}
	return p
}

// openLive opens the tree after the superblock's checksum was made right again.
func (p *livePool) openLive() (*daxfs.Live, error) {
	p.s.f.Truncate(int64(p.g.Blocks) * daxfs.BlockSize)
	setChecksum(p.s.f.b)
	return daxfs.OpenLive(daxfs.Mem(p.s.f.b), int64(len(p.s.f.b)))
}

// setDirent gives the entry of a name in the first block of the root directory another inode.
func (p *livePool) setDirent(name string, nid uint64) {
	b := p.s.f.b[p.g.Head+daxfs.BlockSize:][:daxfs.BlockSize]
	for at := 0; ; at += 12 {
		off := binary.LittleEndian.Uint16(b[at+8:])
		if string(b[off:][:len(name)]) == name {
			binary.LittleEndian.PutUint64(b[at:], nid)
			return
		}
	}
}

// TestOpenLiveRefuses: each change makes a file system that readers of live trees must not take for one.
func TestOpenLiveRefuses(t *testing.T) {
	const super = 1024
	le := binary.LittleEndian
	setLinks := func(p *livePool, n uint32) { le.PutUint32(p.s.f.b[p.g.NidOff(1)+44:], n) }
	for name, spoil := range map[string]func(p *livePool){
		"root at another inode": func(p *livePool) {
			copy(p.s.f.b[p.g.NidOff(3):][:64], p.s.f.b[p.g.NidOff(1):])
			le.PutUint16(p.s.f.b[super+14:], 3)
		},
		"label":               func(p *livePool) { p.s.f.b[super+64]++ },
		"one slot":            func(p *livePool) { setLinks(p, 2+1) },
		"no links":            func(p *livePool) { setLinks(p, 0) },
		"too many slots":      func(p *livePool) { setLinks(p, 2+daxfs.MaxSlots+1) },
		"slots for one block": func(p *livePool) { setLinks(p, 2+100) },
		"slots behind the end": func(p *livePool) {
			le.PutUint32(p.s.f.b[super+36:], uint32(p.g.Head/daxfs.BlockSize)+3)
		},
		"first slot":    func(p *livePool) { p.setDirent("00000", p.g.SlotNid(0)+7) },
		"second slot":   func(p *livePool) { p.setDirent("00001", p.g.SlotNid(1)+7) },
		"no first slot": func(p *livePool) { p.s.f.b[p.g.Head+daxfs.BlockSize+2*12+8]++ },
		"regular root":  func(p *livePool) { le.PutUint16(p.s.f.b[p.g.NidOff(1)+4:], unix.S_IFREG|0o600) },
	} {
		for _, perBlock := range []int{1, daxfs.SlotsPerBlock} {
			t.Run(fmt.Sprint(name, perBlock), func(t *testing.T) {
				p := newSmallLive(t, 300, perBlock)
				p.publish(t, dir(nil))
				if _, err := p.openLive(); err != nil {
					t.Fatal(err)
				}
				spoil(p)
				_, err := p.openLive()
				var fe *daxfs.FormatError
				if err == nil || !errors.Is(err, daxfs.ErrUnsupported) && !errors.As(err, &fe) {
					t.Errorf("error %v, expected ErrUnsupported or a FormatError", err)
				}
			})
		}
	}
}

// A root directory without permissions is an image like any other: half of its mode is zero.
func TestLiveRootMode(t *testing.T) {
	for _, mode := range []uint32{0, 0o400, 0o1000, 0o7777} {
		p := newSmallLive(t, 4, daxfs.SlotsPerBlock)
		root := dir(nil)
		root.Mode = unix.S_IFDIR | mode
		slot := p.publish(t, root)
		p.check(t)
		l, err := p.openLive()
		if err != nil {
			t.Fatal(err)
		}
		img, err := l.Image(slot)
		if err != nil {
			t.Errorf("mode %#o: %v", mode, err)
			continue
		}
		if in, err := img.Inode(img.Root()); err != nil || in.Mode != root.Mode {
			t.Errorf("mode %#o: read %#o, %v", mode, in.Mode, err)
		}
	}
}

// TestLiveImageRefuses: what is no directory is no image, and neither is a slot outside of the tree.
func TestLiveImageRefuses(t *testing.T) {
	p := newSmallLive(t, 4, daxfs.SlotsPerBlock)
	for range p.g.Slots {
		p.publish(t, dir(nil))
	}
	binary.LittleEndian.PutUint16(p.s.f.b[p.g.SlotOff(2)+4:], unix.S_IFIFO|0o600)
	clear(p.s.f.b[p.g.SlotOff(2)+8:][:8]) // the size
	copy(p.s.f.b[p.g.SlotOff(3)+daxfs.SlotSize:], p.s.f.b[p.g.SlotOff(3):][:daxfs.SlotSize])
	l, err := p.openLive()
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range map[int]error{
		-1: fs.ErrNotExist, 0: nil, 2: daxfs.ErrCorrupt, 3: nil, 4: fs.ErrNotExist,
	} {
		if _, err := l.Image(i); !errors.Is(err, want) {
			t.Errorf("slot %d: %v, expected %v", i, err, want)
		}
	}
}

// Files that differ in anything a reader sees have no inode in common.
func TestLiveKeys(t *testing.T) {
	body := []byte("x")
	for name, change := range map[string]func(n *daxfs.Node){
		"nothing":     func(*daxfs.Node) {},
		"permissions": func(n *daxfs.Node) { n.Mode |= 0o111 },
		"setuid":      func(n *daxfs.Node) { n.Mode |= unix.S_ISUID },
		"uid":         func(n *daxfs.Node) { n.UID++ },
		"gid":         func(n *daxfs.Node) { n.GID++ },
		"seconds":     func(n *daxfs.Node) { n.Mtime.Sec-- },
		"nanoseconds": func(n *daxfs.Node) { n.Mtime.Nsec++ },
		"xattr value": func(n *daxfs.Node) { n.Xattrs = []daxfs.Xattr{{Name: "user.a", Value: []byte("2")}} },
		"xattr name":  func(n *daxfs.Node) { n.Xattrs = []daxfs.Xattr{{Name: "user.b", Value: []byte("1")}} },
		"no xattr":    func(n *daxfs.Node) { n.Xattrs = nil },
		"more xattrs": func(n *daxfs.Node) { n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: "user.z"}) },
	} {
		p := newSmallLive(t, 4, daxfs.SlotsPerBlock)
		make := func() *daxfs.Node {
			return &daxfs.Node{
				Mode: unix.S_IFREG | 0o600, UID: 7, GID: 7, Mtime: daxfs.Time{Sec: 9, Nsec: 9}, Data: p.s.put(body),
				Xattrs: []daxfs.Xattr{{Name: "user.a", Value: []byte("1")}},
			}
		}
		other := make()
		change(other)
		p.publish(t, dir(map[string]*daxfs.Node{"f": make()}))
		p.publish(t, dir(map[string]*daxfs.Node{"f": other}))
		p.check(t)
		l, err := p.openLive()
		if err != nil {
			t.Fatal(err)
		}
		a, err := l.FS().Lookup("00000/f", false)
		if err != nil {
			t.Fatal(err)
		}
		b, err := l.FS().Lookup("00001/f", false)
		if err != nil {
			t.Fatal(err)
		}
		if (a.Nid == b.Nid) != (name == "nothing") {
			t.Errorf("%s: inodes %d and %d", name, a.Nid, b.Nid)
		}
	}
}

// TestPlaceLiveRefuses: a run, and the contents that it refers to, lie in the file system and behind the slots.
func TestPlaceLiveRefuses(t *testing.T) {
	const block = daxfs.BlockSize
	g := daxfs.Geometry{Slots: 2, PerBlock: 1, Head: block, Blocks: 64}
	end := int64(g.Blocks) * block
	last := func(plan *daxfs.LivePlan) int64 { return end - plan.Size() }
	at := func(off int64) func(*daxfs.LivePlan) int64 { return func(*daxfs.LivePlan) int64 { return off } }
	first := at(g.TreeStart())
	place := func(d daxfs.Data, off func(*daxfs.LivePlan) int64, slot int) error {
		plan, err := daxfs.NewLivePlan(dir(map[string]*daxfs.Node{"f": file(daxfs.Data{Off: 0, Size: d.Size})}),
			daxfs.Options{}, false)
		if err != nil {
			t.Fatal(err)
		}
		err = plan.Resolve(func(daxfs.LiveFile) (uint64, daxfs.Data, error) { return 0, d, nil })
		if err != nil {
			t.Fatal(err)
		}
		return plan.PlaceLive(g, off(plan), slot)
	}
	ok := daxfs.Data{Off: 32 * block, Size: 1}
	for name, c := range map[string]struct {
		data daxfs.Data
		off  func(*daxfs.LivePlan) int64
		slot int
		good bool
	}{
		"first place":         {ok, first, 0, true},
		"last slot":           {ok, first, 1, true},
		"last place":          {ok, last, 0, true},
		"contents at the end": {daxfs.Data{Off: end - 2*block, Size: block + 1}, first, 0, true},
		"empty contents":      {daxfs.Data{Off: end}, first, 0, true},
		"negative slot":       {ok, first, -1, false},
		"slot too high":       {ok, first, 2, false},
		"in the slots":        {ok, at(g.TreeStart() - block), 0, false},
		"misaligned":          {ok, at(g.TreeStart() + 1), 0, false},
		"over the end":        {ok, func(plan *daxfs.LivePlan) int64 { return last(plan) + block }, 0, false},
		"contents before":     {daxfs.Data{Off: -block, Size: 1}, first, 0, false},
		"contents behind":     {daxfs.Data{Off: end, Size: 1}, first, 0, false},
		"contents over":       {daxfs.Data{Off: end - block, Size: block + 1}, first, 0, false},
	} {
		err := place(c.data, c.off, c.slot)
		if c.good && err != nil || !c.good && !errors.Is(err, daxfs.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
