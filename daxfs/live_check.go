package daxfs

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// LiveCheckOptions are the options of CheckLive. The zero value checks the rules of every live tree.
type LiveCheckOptions struct {
	CheckOptions
	// OneInode refuses contents shared by several inodes: with DAX the kernel must not map a page for two inodes.
	OneInode bool
	// Slots limits the check to the slots for which it returns true; nil checks all.
	Slots func(slot int) bool
}

// liveState is the state that a check of a live tree keeps from image to image.
type liveState struct {
	on   bool
	slot int
	seen parts[liveSeen]
	by   nidTable // of seen
	one  bool     // see LiveCheckOptions.OneInode
}

// liveSeen is an inode that was found in an image.
type liveSeen struct {
	nid   uint64
	nlink uint32
	slot  uint16 // below MaxSlots
	mode  uint16 // 0 if the inode could not be read
}

// CheckLive verifies a live tree of size bytes: its superblock, its slots, and every published image.
// A tree that passes is safe to mount. The paths of findings begin with the name of the slot.
//
// The caller must ensure that nobody publishes or removes an image meanwhile. Time, memory and errors
// are those of Check; an inode counts once, however many images share it.
func CheckLive(r io.ReaderAt, size int64, o LiveCheckOptions, report func(Finding) bool) error {
	c := checker{tails: !o.SkipTails, max: o.MaxInodes}
	if c.max == 0 {
		c.max = defaultMaxInodes
	}
	c.live = liveState{on: true, one: o.OneInode}
	if report != nil {
		c.report = func(f Finding) bool { return report(c.live.prefix(f)) }
	}
	c.runLive(r, size, o)
	if c.err != nil && !errors.Is(c.err, errStop) {
		return c.err
	}
	return c.first
}

// prefix puts the name of the slot in front of the finding's path.
func (s *liveState) prefix(f Finding) Finding {
	if f.Path != "" && s.slot >= 0 {
		f.Path = "/" + Geometry{}.SlotName(s.slot) + f.Path
	}
	return f
}

func (c *checker) runLive(r io.ReaderAt, size int64, o LiveCheckOptions) {
	var err error
	c.live.slot = -1
	if c.data, err = newSource(r, size); err != nil {
		c.broken(err, "")
		return
	}
	c.s = c.data
	if c.s.b == nil {
		c.s.r = NewReadCache(r, size)
	}
	l, err := OpenLive(c.s.reader(), size)
	if err != nil {
		c.broken(err, "")
		return
	}
	c.checkLiveSuper(l)
	c.use(0, l.g.TreeStart(), useMeta, 0)
	for i := range l.g.Slots {
		if c.err != nil {
			return
		}
		if o.Slots == nil || o.Slots(i) {
			c.checkSlot(l, i)
		}
	}
	c.live.slot = -1
	c.erofsState = erofsState{} // paths are relative to one image
	c.live.seen, c.live.by = parts[liveSeen]{}, nidTable{}
	c.checkSpace()
}

// checkLiveSuper checks the superblock and that the root directory lists exactly the slots.
func (c *checker) checkLiveSuper(l *Live) {
	got, err := c.s.view(disk.ErofsSuperOff, disk.ErofsSuperSize)
	if err != nil {
		c.fail(err)
		return
	}
	want := l.g.block0()[disk.ErofsSuperOff:][:disk.ErofsSuperSize]
	if string(got) != string(want) {
		c.finding(RuleLiveSuper, disk.ErofsSuperOff, 0, "", "superblock is %x, expected %x", got, want)
	}
	root, err := l.fs.inode(liveRoot)
	if err != nil {
		c.broken(err, "")
		return
	}
	n := 0
	err = root.Entries(0, func(e Dirent) bool {
		if n >= l.g.Slots || e.Name != l.g.SlotName(n) || e.Nid != l.g.SlotNid(n) || e.Type != unix.S_IFDIR {
			c.finding(RuleLiveSlots, l.g.NidOff(liveRoot), liveRoot, "/",
				"entry %d is %q, inode %d, type %#o, expected a slot",
				n, e.Name, e.Nid, e.Type)
			return false
		}
		n++
		return true
	})
	if err != nil {
		c.broken(err, "/")
		return
	}
	if n != l.g.Slots {
		c.finding(RuleLiveSlots, l.g.NidOff(liveRoot), liveRoot, "/", "%d slots, expected %d", n, l.g.Slots)
	}
}

func (c *checker) checkSlot(l *Live, i int) {
	c.live.slot = i
	slot, err := c.s.view(l.g.SlotOff(i), slotSize)
	if err != nil {
		c.fail(err)
		return
	}
	if slot[modeOff] == 0 && slot[modeOff+1] == 0 {
		if string(slot) != string(emptySlot()) {
			c.finding(RuleLiveSlots, l.g.SlotOff(i), l.g.SlotNid(i), "/",
				"slot holds %x, expected a published image or %x",
				slot, emptySlot())
		}
		return
	}
	if c.ero, err = l.fs.at(l.g.SlotNid(i)); err != nil {
		c.ero = nil
		c.broken(err, "/")
		return
	}
	c.erofsState = erofsState{}
	c.budget = c.s.size
	c.checkErofs()
}

// liveInode takes over the state of an inode that another image has, too, and reports if there is one.
func (c *checker) liveInode(n *node, path func() string) (seen bool) {
	i, ok := c.live.by.find(n.nid, c.live.nid)
	if !ok {
		return false
	}
	s := c.live.seen.at(i)
	n.ok, n.mode, n.nlink = s.mode != 0, s.mode, s.nlink
	if n.ok && s.mode&unix.S_IFMT != unix.S_IFREG {
		c.finding(RuleLiveShared, c.ero.inodeOff(n.nid), n.nid, path(),
			"inode of mode %#o belongs to the image at slot %d, too", s.mode, s.slot)
		n.ok = false // its entries were checked with the other image
	}
	return true
}

// liveSaw records that the current image has the inode.
func (c *checker) liveSaw(n *node) {
	s := liveSeen{nid: n.nid, nlink: n.nlink, slot: uint16(c.live.slot)}
	if n.ok {
		s.mode = n.mode
	}
	c.live.seen.add(s)
	c.live.by.add(c.live.seen.len()-1, c.live.nid)
}

func (s *liveState) nid(i int32) uint64 { return s.seen.at(i).nid }
