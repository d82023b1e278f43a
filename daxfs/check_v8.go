package daxfs

import (
	"bytes"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// v8State is the state of a check of the DAXFS half.
type v8State struct {
	v8nodes []v8node
	peers   []int32 // by inode number: 1 + index in nodes, or 0
	// sameData is true for an inode number whose contents are the range already recorded for its EROFS inode.
	sameData []bool
}

// v8node is one inode, by its number less 1.
type v8node struct {
	names  uint32 // entries that lead here; for a directory, its subdirectories
	nlink  uint32
	parent uint32 // of a directory; 0 if no name leads to it
	mode   uint16
	ok     bool
	mark   uint8 // state of the search for loops
}

// v8Path returns the path of a DAXFS inode, if the EROFS half has it, too.
func (c *checker) v8Path(ino uint64) string {
	if ino < uint64(len(c.peers)) && c.peers[ino] != 0 {
		return c.nodePath(c.peers[ino] - 1)
	}
	return ""
}

// checkV8 checks the DAXFS half on its own, in the order of its table. It accepts inodes without a name.
func (c *checker) checkV8() {
	if c.v8 == nil {
		return
	}
	count := c.v8.Inodes()
	if count > c.max {
		c.emit(unsupported(RuleV8Table, 48, 0, "%d inodes, more than %d", count, c.max), "")
		return
	}
	c.v8nodes = make([]v8node, count)
	for ino := uint64(1); ino <= count && c.err == nil; ino++ {
		c.checkV8Inode(ino)
	}
	for i := range c.v8nodes {
		if n := &c.v8nodes[i]; c.err == nil && n.ok && n.mode&unix.S_IFMT == unix.S_IFDIR {
			c.checkV8Dir(uint64(i) + 1)
		}
	}
	for i := range c.v8nodes {
		n := &c.v8nodes[i]
		isDir := n.mode&unix.S_IFMT == unix.S_IFDIR
		want := n.names
		if isDir {
			want += 2
		}
		orphan := !isDir && n.names == 0
		if n.ok && !orphan && n.nlink != want {
			ino := uint64(i) + 1
			c.finding(RuleV8Nlink, c.v8.inodeOff(ino), ino, c.v8Path(ino),
				"link count is %d, expected %d", n.nlink, want)
		}
	}
	c.checkV8Loops()
}

func (c *checker) checkV8Inode(ino uint64) {
	in, raw, err := c.v8.readInode(ino)
	if err != nil {
		c.broken(err, c.v8Path(ino))
		return
	}
	off := c.v8.inodeOff(ino)
	c.v8nodes[ino-1] = v8node{nlink: raw.Nlink, mode: uint16(raw.Mode), ok: true}
	if raw.Mode>>16 != 0 {
		c.finding(RuleV8Mode, off, ino, c.v8Path(ino), "mode is %#o, expected 16 bits", raw.Mode)
	}
	b, err := c.s.view(off, disk.V8InodeSize)
	if err != nil {
		c.fail(err)
		return
	}
	if !isZero(b[36:]) {
		c.finding(RuleV8Reserved, off+36, ino, c.v8Path(ino),
			"reserved bytes of the inode hold %x, expected zeros", b[36:])
	}
	if in.Size == 0 {
		return
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if ino >= uint64(len(c.sameData)) || !c.sameData[ino] {
			c.use(in.base, in.Size, useData|useV8, ino)
		}
		if in.base%BlockSize != 0 {
			c.finding(RuleV8Align, off, ino, c.v8Path(ino), "contents at %d, expected a multiple of %d",
				in.base, BlockSize)
		}
	case unix.S_IFLNK:
		c.use(in.base, in.Size, useTarget|useV8, ino)
		b, err := c.s.view(in.base, int(in.Size)+1)
		if err != nil {
			c.fail(err)
			return
		}
		if z := bytes.IndexByte(b, 0); int64(z) != in.Size {
			c.finding(RuleV8Symlink, in.base, ino, c.v8Path(ino),
				"target of %d bytes has its first NUL at %d, expected it to follow the target", in.Size, z)
		}
	case unix.S_IFDIR:
		n := in.Size / disk.V8DirentUnit * disk.V8DirentSize
		c.use(in.base, n, useMeta|useV8, ino)
		if c.s.size-(in.base+n) < disk.V8DirentSize {
			c.finding(RuleV8DirSlack, off, ino, c.v8Path(ino),
				"entries end at %d, expected at least %d bytes before the end of the image at %d",
				in.base+n, disk.V8DirentSize, c.s.size)
		}
	}
}

func (c *checker) checkV8Dir(ino uint64) {
	dir, err := c.v8.inode(ino)
	if err != nil {
		c.broken(err, c.v8Path(ino))
		return
	}
	if !spend(&c.budget, dir.Size) {
		c.v8nodes[ino-1].ok = false
		c.finding(RuleMetaOverlap, dir.base, 0, c.v8Path(ino),
			"directories of the DAXFS half take more bytes than the image has: they overlap")
		return
	}
	list := c.listV8(&dir, func(err error) { c.broken(err, c.v8Path(ino)) })
	for i := range list {
		if c.err != nil {
			return
		}
		e := &list[i]
		if i > 0 && bytes.Equal(e.name, list[i-1].name) {
			c.finding(RuleV8DirTwice, e.off, ino, c.v8Path(ino), "name %q occurs twice", e.name)
		}
		if e.odd {
			c.finding(RuleV8Reserved, e.off, ino, c.v8Path(ino), "reserved bytes of entry %q are not zero", e.name)
		}
		n := &c.v8nodes[e.nid-1]
		if !n.ok {
			if e.typ == unix.S_IFDIR {
				c.v8nodes[ino-1].names++
			}
			continue
		}
		if typ := uint32(n.mode) & unix.S_IFMT; typ != e.typ {
			c.finding(RuleV8DirType, e.off, ino, c.v8Path(ino), "entry %q has type %#o, its inode %#o",
				e.name, e.typ, typ)
		}
		if n.mode&unix.S_IFMT != unix.S_IFDIR {
			n.names++
			continue
		}
		c.v8nodes[ino-1].names++
		if n.parent != 0 || e.nid == disk.V8RootIno {
			c.finding(RuleV8DirLoop, e.off, ino, c.v8Path(ino),
				"entry %q leads to directory %d, which has another name or is the root", e.name, e.nid)
			continue
		}
		n.parent = uint32(ino)
	}
}

// checkV8Loops finds directories that are their own ancestors. Every directory has at most one parent by now.
func (c *checker) checkV8Loops() {
	const onPath, done = 1, 2
	for i := range c.v8nodes {
		at := uint32(i) + 1
		for at != 0 && c.v8nodes[at-1].mark == 0 {
			c.v8nodes[at-1].mark = onPath
			at = c.v8nodes[at-1].parent
		}
		if at != 0 && c.v8nodes[at-1].mark == onPath {
			ino := uint64(at)
			c.finding(RuleV8DirLoop, c.v8.inodeOff(ino), ino, c.v8Path(ino), "directory is its own ancestor")
		}
		for at = uint32(i) + 1; at != 0 && c.v8nodes[at-1].mark == onPath; at = c.v8nodes[at-1].parent {
			c.v8nodes[at-1].mark = done
		}
	}
}
