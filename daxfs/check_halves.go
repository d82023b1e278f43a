package daxfs

import (
	"bytes"
	"cmp"
	"slices"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// v8Entry is one entry of the DAXFS directory under comparison.
type v8Entry struct {
	rawDirent
	off     int64
	matched bool // the EROFS half has it, too
}

// peerDir is the DAXFS counterpart of an EROFS directory, sorted by name.
type peerDir struct {
	ino     uint64
	entries []v8Entry
}

// listV8 returns the valid entries of a directory by name. Errors of the others go to bad, if not nil.
func (c *checker) listV8(dir *Inode, bad func(error)) []v8Entry {
	var list []v8Entry
	err := c.v8.eachEntry(dir, 0, func(_ int64, e rawDirent, off int64, err error) bool {
		switch {
		case err == nil:
			list = append(list, v8Entry{e, off, false})
		case bad != nil:
			bad(err)
		}
		return c.err == nil
	})
	if err != nil {
		c.fail(err)
	}
	byName := func(a, b v8Entry) int { return cmp.Or(bytes.Compare(a.name, b.name), cmp.Compare(a.off, b.off)) }
	if !slices.IsSortedFunc(list, byName) {
		slices.SortFunc(list, byName)
	}
	return list
}

// peerEntries lists the DAXFS counterpart of n, or returns nil if there is none.
func (c *checker) peerEntries(n *node) *peerDir {
	if n.peer == 0 {
		return nil
	}
	dir, err := c.v8.inode(uint64(n.peer))
	if err != nil || !dir.IsDir() || !spend(&c.pairing, dir.Size) {
		return nil // checkV8 reports it
	}
	return &peerDir{dir.Nid, c.listV8(&dir, nil)}
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

// skipPeer excludes an entry whose EROFS inode cannot be compared.
func (c *checker) skipPeer(p *peerDir, name []byte) {
	if e := p.find(name); e != nil {
		e.matched = true
	}
}

// match compares node i with the entry of the same name in the DAXFS half.
func (c *checker) match(p *peerDir, i int32, name []byte, dirPath func() string) {
	if p == nil {
		return
	}
	e := p.find(name)
	n := c.nodes.at(i)
	switch {
	case e != nil:
		e.matched = true
		c.pair(i, e.nid, "")
	case holdable(uint32(n.mode)):
		c.finding(RuleHalvesNames, -1, n.nid, childPath(dirPath(), name), "the DAXFS half does not have this name")
	}
}

// holdable reports whether the DAXFS half can hold an inode of that mode.
func holdable(mode uint32) bool {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
		return true
	}
	return false
}

// unmatched reports entries that only the DAXFS half has.
func (c *checker) unmatched(p *peerDir, dirPath func() string) {
	if p == nil {
		return
	}
	for i := range p.entries {
		if c.err != nil {
			return
		}
		e := &p.entries[i]
		if e.matched || i > 0 && bytes.Equal(e.name, p.entries[i-1].name) {
			continue
		}
		c.finding(RuleHalvesNames, e.off, 0, childPath(dirPath(), e.name), "only the DAXFS half has this name")
	}
}

// pair records that node i and DAXFS inode ino are the same inode. It compares them the first time.
func (c *checker) pair(i int32, ino uint64, path string) {
	n := c.nodes.at(i)
	where := func() string {
		if path == "" {
			path = c.nodePath(i)
		}
		return path
	}
	if c.peers == nil {
		c.peers = make([]int32, c.v8.Inodes()+1)
		c.sameData = make([]bool, c.v8.Inodes()+1)
	}
	first := n.peer == 0 && c.peers[ino] == 0
	if !first {
		if uint64(n.peer) != ino || c.peers[ino] != i+1 {
			c.finding(RuleHalvesIno, c.ero.inodeOff(n.nid), n.nid, where(),
				"inode is DAXFS inode %d by this name, expected the same by every name of either", ino)
		}
		return
	}
	n.peer, c.peers[ino] = uint32(ino), i+1
	a, raw, err := c.ero.readInode(n.nid)
	if err != nil {
		c.broken(err, where())
		return
	}
	b, vraw, err := c.v8.readInode(ino)
	if err != nil {
		return // checkV8 reports it
	}
	off := c.v8.inodeOff(ino)
	if raw.Ino != uint32(ino) {
		c.finding(RuleHalvesIno, c.ero.inodeOff(n.nid), n.nid, where(),
			"inode stores number %d, its DAXFS inode is %d", raw.Ino, ino)
	}
	if a.Mode != b.Mode {
		c.finding(RuleHalvesMode, off, n.nid, where(), "mode is %#o, in the DAXFS half %#o", a.Mode, b.Mode)
		if a.Mode&unix.S_IFMT != b.Mode&unix.S_IFMT {
			return
		}
	}
	c.compare(&a, &b, &vraw, off, where)
}

func (c *checker) compare(a, b *Inode, vraw *disk.V8Inode, off int64, where func() string) {
	if a.UID != b.UID || a.GID != b.GID {
		c.finding(RuleHalvesOwner, off, a.Nid, where(), "owner is %d:%d, in the DAXFS half %d:%d", a.UID,
			a.GID, b.UID, b.GID)
	}
	if a.Nlink != b.Nlink {
		c.finding(RuleHalvesNlink, off, a.Nid, where(), "link count is %d, in the DAXFS half %d", a.Nlink, b.Nlink)
	}
	if a.IsDir() {
		return
	}
	if a.Size != b.Size {
		c.finding(RuleHalvesSize, off, a.Nid, where(), "size is %d, in the DAXFS half %d", a.Size, b.Size)
		return
	}
	if a.IsSymlink() {
		x, errA := a.Target()
		y, errB := b.Target()
		if errA == nil && errB == nil && x != y {
			c.finding(RuleHalvesTarget, off, a.Nid, where(), "target is %q, in the DAXFS half %q", x, y)
		}
		return
	}
	c.sameData[b.Nid] = a.Size > 0 && a.Off == b.Off
	if a.Size > 0 && a.Off != b.Off {
		c.finding(RuleHalvesData, off, a.Nid, where(), "contents are at %d, in the DAXFS half at %d (%d from its base)",
			a.Off, b.Off, vraw.DataOff)
	}
}
