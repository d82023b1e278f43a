package daxfs

import (
	"bytes"
	"cmp"
	"slices"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// v8Entry is one entry of a directory of the DAXFS half while that directory is looked at.
type v8Entry struct {
	rawDirent
	off     int64
	matched bool // the EROFS half has it, too
}

// peerDir is the directory of the DAXFS half that is compared with one of the EROFS half, sorted by name.
type peerDir struct {
	ino     uint64
	entries []v8Entry
}

// listV8 reads the usable entries of a directory, sorted by name. Unusable ones go to bad, if it is not nil.
func (c *checker) listV8(dir *Inode, bad func(error) error) ([]v8Entry, error) {
	var list []v8Entry
	var stop error
	err := c.v8.eachEntry(dir, 0, func(_ int64, e rawDirent, off int64, err error) bool {
		switch {
		case err == nil:
			list = append(list, v8Entry{e, off, false})
		case bad != nil:
			stop = bad(err)
		}
		return stop == nil
	})
	byName := func(a, b v8Entry) int { return cmp.Or(bytes.Compare(a.name, b.name), cmp.Compare(a.off, b.off)) }
	if !slices.IsSortedFunc(list, byName) {
		slices.SortFunc(list, byName)
	}
	return list, cmp.Or(err, stop)
}

// peerEntries lists the directory of the DAXFS half that is the same as n, or nil if there is none.
func (c *checker) peerEntries(n *node) (*peerDir, error) {
	if n.peer == 0 {
		return nil, nil
	}
	dir, err := c.v8.inode(uint64(n.peer))
	if err != nil || !dir.IsDir() || !spend(&c.pairing, dir.Size) {
		return nil, nil // checkV8 says so
	}
	list, err := c.listV8(&dir, nil)
	return &peerDir{dir.Nid, list}, err
}

func (p *peerDir) find(name []byte) *v8Entry {
	if p == nil {
		return nil
	}
	i := sort.Search(len(p.entries), func(i int) bool { return bytes.Compare(p.entries[i].name, name) >= 0 })
	if i < len(p.entries) && bytes.Equal(p.entries[i].name, name) {
		return &p.entries[i]
	}
	return nil
}

// skipPeer notes that an entry of the EROFS half can not be compared.
func (c *checker) skipPeer(p *peerDir, name []byte) error {
	if e := p.find(name); e != nil {
		e.matched = true
	}
	return nil
}

// match compares node i with the entry of the same name in the DAXFS half.
func (c *checker) match(p *peerDir, i int32, name []byte, dirPath func() string) error {
	if p == nil {
		return nil
	}
	e := p.find(name)
	n := &c.nodes[i]
	switch {
	case e != nil:
		e.matched = true
		return c.pair(i, e.nid, "")
	case holdable(uint32(n.mode)):
		return c.finding(RuleHalvesNames, -1, n.nid, childPath(dirPath(), name), "the DAXFS half does not have this name")
	}
	return nil
}

// holdable reports whether the DAXFS half can hold an inode of that mode.
func holdable(mode uint32) bool {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
		return true
	}
	return false
}

// unmatched reports what only the DAXFS half has.
func (c *checker) unmatched(p *peerDir, dirPath func() string) error {
	if p == nil {
		return nil
	}
	for i := range p.entries {
		e := &p.entries[i]
		if e.matched || i > 0 && bytes.Equal(e.name, p.entries[i-1].name) {
			continue
		}
		if err := c.finding(RuleHalvesNames, e.off, 0, childPath(dirPath(), e.name), "only the DAXFS half has this name"); err != nil {
			return err
		}
	}
	return nil
}

// pair notes that node i is the same inode as ino of the DAXFS half, and compares them the first time.
func (c *checker) pair(i int32, ino uint64, path string) error {
	n := &c.nodes[i]
	where := func() string {
		if path == "" {
			path = c.nodePath(i)
		}
		return path
	}
	if c.peers == nil {
		c.peers = make([]int32, c.v8.Inodes()+1)
	}
	first := n.peer == 0 && c.peers[ino] == 0
	if !first {
		if uint64(n.peer) != ino || c.peers[ino] != i+1 {
			return c.finding(RuleHalvesIno, c.ero.inodeOff(n.nid), n.nid, where(), "inode is DAXFS inode %d by this name, expected the same by every name of either", ino)
		}
		return nil
	}
	n.peer, c.peers[ino] = uint32(ino), i+1
	if !n.ok {
		return nil
	}
	a, raw, err := c.ero.readInode(n.nid)
	if err != nil {
		return c.broken(err, where())
	}
	b, vraw, err := c.v8.readInode(ino)
	if err != nil {
		return nil // checkV8 says so
	}
	off := c.v8.inodeOff(ino)
	if raw.Ino != uint32(ino) {
		if err := c.finding(RuleHalvesIno, c.ero.inodeOff(n.nid), n.nid, where(), "inode stores number %d, its DAXFS inode is %d", raw.Ino, ino); err != nil {
			return err
		}
	}
	if a.Mode != b.Mode {
		if err := c.finding(RuleHalvesMode, off, n.nid, where(), "mode is %#o, in the DAXFS half %#o", a.Mode, b.Mode); err != nil {
			return err
		}
		if a.Mode&unix.S_IFMT != b.Mode&unix.S_IFMT {
			return nil
		}
	}
	return c.compare(&a, &b, &vraw, off, where)
}

// compare compares the attributes of an inode in both halves.
func (c *checker) compare(a, b *Inode, vraw *disk.V8Inode, off int64, where func() string) error {
	if a.UID != b.UID || a.GID != b.GID {
		if err := c.finding(RuleHalvesOwner, off, a.Nid, where(), "owner is %d:%d, in the DAXFS half %d:%d", a.UID, a.GID, b.UID, b.GID); err != nil {
			return err
		}
	}
	if a.Nlink != b.Nlink {
		if err := c.finding(RuleHalvesNlink, off, a.Nid, where(), "link count is %d, in the DAXFS half %d", a.Nlink, b.Nlink); err != nil {
			return err
		}
	}
	if a.IsDir() {
		return nil
	}
	if a.Size != b.Size {
		return c.finding(RuleHalvesSize, off, a.Nid, where(), "size is %d, in the DAXFS half %d", a.Size, b.Size)
	}
	if a.IsSymlink() {
		x, errA := a.Target()
		y, errB := b.Target()
		if errA == nil && errB == nil && x != y {
			return c.finding(RuleHalvesTarget, off, a.Nid, where(), "target is %q, in the DAXFS half %q", x, y)
		}
		return nil
	}
	if a.Size > 0 && a.Off != b.Off {
		return c.finding(RuleHalvesData, off, a.Nid, where(), "contents are at %d, in the DAXFS half at %d (%d from its base)", a.Off, b.Off, vraw.DataOff)
	}
	return nil
}
