package daxfs

import (
	"bytes"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// erofsState is the state of a check of the EROFS half.
type erofsState struct {
	nodes parts[node]
	byNid nidTable // of nodes
	dirs  []dirRef
	todo  []int32 // indexes in dirs still to be read
	full  bool    // there are more inodes than allowed: link counts are not checked

	sharedSeen map[uint32]bool // shared xattrs already checked; false if they were bad
	names      []string        // scratch: xattr names of one inode
}

type node struct {
	nid    uint64
	cursor int64  // cursor of its first name in dir
	dir    int32  // index in dirs; -1 for the root
	names  uint32 // entries that lead here; for a directory, its subdirectories
	nlink  uint32
	peer   uint32 // its inode in the DAXFS half, or 0
	mode   uint16
	ok     bool // the inode could be read
}

type dirRef struct {
	node   int32 // index in nodes
	parent int32 // index in dirs; the root is its own parent
	depth  int32 // bytes of its path
}

// checkErofs walks the EROFS half from the root, each directory once, in parallel with the DAXFS half.
func (c *checker) checkErofs() {
	if c.ero == nil {
		return
	}
	c.sharedSeen = make(map[uint32]bool)
	c.addNode(node{nid: c.ero.Root(), dir: -1})
	c.dirs = append(c.dirs, dirRef{})
	c.checkInode(0, "/")
	if c.v8 != nil {
		c.pair(0, disk.V8RootIno, "/")
	}
	for c.todo = append(c.todo, 0); len(c.todo) > 0 && c.err == nil; {
		d := c.todo[len(c.todo)-1]
		c.todo = c.todo[:len(c.todo)-1]
		c.checkDir(d)
	}
	if c.full {
		return
	}
	for i := range c.nodes.len() {
		if c.err != nil {
			return
		}
		n := c.nodes.at(i)
		want := n.names
		if n.mode&unix.S_IFMT == unix.S_IFDIR {
			want += 2
		}
		if n.ok && n.nlink != want {
			c.finding(RuleNlink, c.ero.inodeOff(n.nid), n.nid, c.nodePath(i),
				"link count is %d, expected %d", n.nlink, want)
		}
	}
	if !c.live.on && c.ero.sb.Inodes != uint64(c.nodes.len()) {
		c.finding(RuleInodes, disk.ErofsSuperOff+16, 0, "", "%d inodes, names lead to %d",
			c.ero.sb.Inodes, c.nodes.len())
	}
}

// node returns the index of an inode's node, if there is one.
func (c *checker) node(nid uint64) (int32, bool) {
	return c.byNid.find(nid, func(i int32) uint64 { return c.nodes.at(i).nid })
}

func (c *checker) addNode(n node) int32 {
	i := c.nodes.len()
	c.nodes.add(n)
	c.byNid.add(i, func(i int32) uint64 { return c.nodes.at(i).nid })
	return i
}

// maxParts bounds the names in the path of a finding: many findings in a deep tree would take too long.
const maxParts = 64

// nodePath returns the absolute path of a node by its first name. It reads the names from the image again,
// because keeping them takes too much memory. A very deep path is shortened to "..." and its last names.
func (c *checker) nodePath(i int32) string {
	var parts []string
	n := c.nodes.at(i)
	for ; n.dir >= 0 && len(parts) < maxParts; n = c.nodes.at(c.dirs[n.dir].node) {
		parts = append(parts, c.nodeName(n))
	}
	switch {
	case n.dir >= 0:
		parts = append(parts, "...")
	case len(parts) == 0:
		return "/"
	default:
		parts = append(parts, "")
	}
	slices.Reverse(parts)
	return strings.Join(parts, "/")
}

func (c *checker) nodeName(n *node) string {
	name := "?" // only if the bytes have changed meanwhile
	dir, err := c.ero.inode(c.nodes.at(c.dirs[n.dir].node).nid)
	if err == nil && dir.IsDir() {
		_ = c.ero.entries(&dir, n.cursor, func(e Dirent) bool {
			name = e.Name
			return false
		})
	}
	return name
}

func childPath(dir string, name []byte) string {
	if dir == "/" {
		return dir + string(name)
	}
	return dir + "/" + string(name)
}

// checkDir checks one directory and every inode that it is the first to name.
func (c *checker) checkDir(d int32) {
	ref := c.dirs[d]
	self := *c.nodes.at(ref.node)
	up := c.nodes.at(c.dirs[ref.parent].node).nid
	if c.live.on && d == 0 {
		up = liveRoot
	}
	dir, err := c.ero.inode(self.nid)
	if err != nil {
		c.broken(err, "") // the inode was valid when its name was read
		return
	}
	var pathMemo string
	path := func() string {
		if pathMemo == "" {
			pathMemo = c.nodePath(ref.node)
		}
		return pathMemo
	}
	at, n := int64(-1), dir.Size
	if n > 0 {
		at, _ = dir.piece(0)
	}
	if !spend(&c.budget, n) {
		c.finding(RuleMetaOverlap, at, dir.Nid, path(), "directories take more bytes than the image has: they overlap")
		return
	}
	other := c.peerEntries(&self)
	dots := [2]int{}
	var prev []byte
	for pos := int64(0); pos < dir.Size && c.err == nil; pos += BlockSize {
		b, err := c.ero.block(&dir, pos)
		if err != nil {
			c.broken(err, path())
			continue
		}
		for i := range b.count {
			e, err := b.entry(i)
			if err != nil {
				c.broken(err, path())
				continue
			}
			off := b.off + int64(i)*disk.ErofsDirentSize
			if prev != nil && bytes.Compare(prev, e.name) >= 0 {
				c.finding(RuleDirOrder, off, dir.Nid, path(),
					"entry %q follows %q, expected order and no name twice", e.name, prev)
			}
			prev = e.name
			if e.odd {
				c.finding(RuleDirBlock, off, dir.Nid, path(), "reserved byte of entry %q is not zero", e.name)
			}
			switch string(e.name) {
			case ".":
				dots[0]++
				c.checkDot(&dir, &e, self.nid, off, path)
			case "..":
				dots[1]++
				c.checkDot(&dir, &e, up, off, path)
			default:
				c.checkEntry(d, path, pos+int64(i)*disk.ErofsDirentSize, off, &e, other)
			}
		}
	}
	if dots != [2]int{1, 1} {
		c.finding(RuleDots, at, dir.Nid, path(), "%d entries %q and %d entries %q, expected one each", dots[0],
			".", dots[1], "..")
	}
	c.unmatched(other, path)
}

// checkDot checks that "." or ".." leads to the directory want.
func (c *checker) checkDot(dir *Inode, e *rawDirent, want uint64, off int64, path func() string) {
	if e.nid != want || e.typ != unix.S_IFDIR {
		c.finding(RuleDots, off, dir.Nid, path(), "entry %q leads to inode %d as type %#o, expected directory %d",
			e.name, e.nid, e.typ, want)
	}
}

// checkEntry checks one entry, and its inode if the entry is the first to name it.
func (c *checker) checkEntry(d int32, dirPath func() string, cursor, off int64, e *rawDirent, other *peerDir) {
	dirNid := c.nodes.at(c.dirs[d].node).nid
	i, seen := c.node(e.nid)
	if !seen {
		if uint64(c.nodes.len()) >= c.max {
			c.todo = nil
			if c.full {
				return
			}
			c.full = true
			c.emit(unsupported(RuleInodes, -1, 0, "more than %d inodes", c.max), "")
			return
		}
		i = c.addNode(node{nid: e.nid, dir: d, cursor: cursor})
		c.checkInode(i, "")
	}
	n := c.nodes.at(i)
	if !n.ok {
		if e.typ == unix.S_IFDIR {
			c.nodes.at(c.dirs[d].node).names++
		}
		c.skipPeer(other, e.name)
		return
	}
	if typ := uint32(n.mode) & unix.S_IFMT; typ != e.typ {
		c.finding(RuleDirType, off, dirNid, dirPath(), "entry %q has type %#o, its inode %#o", e.name, e.typ, typ)
	}
	if n.mode&unix.S_IFMT == unix.S_IFDIR {
		if seen {
			c.finding(RuleDirLoop, off, dirNid, dirPath(),
				"entry %q leads to directory %d, which has another name", e.name, e.nid)
			return
		}
		c.nodes.at(c.dirs[d].node).names++
		depth := c.dirs[d].depth + 1 + int32(len(e.name))
		if depth > maxPath {
			c.finding(RuleDirDepth, off, dirNid, "", "path of %d bytes, expected at most %d", depth, maxPath)
			n.ok = false // do not count its entries
			c.skipPeer(other, e.name)
			return
		}
		c.todo = append(c.todo, int32(len(c.dirs)))
		c.dirs = append(c.dirs, dirRef{node: i, parent: d, depth: depth})
	} else {
		n.names++
	}
	c.match(other, i, e.name, dirPath)
}

// checkInode reads and checks a node. path may be empty; it is then computed on demand.
func (c *checker) checkInode(i int32, path string) {
	n := c.nodes.at(i)
	where := func() string {
		if path == "" {
			path = c.nodePath(i)
		}
		return path
	}
	if c.live.on {
		if c.liveInode(n, where) {
			return
		}
		defer func() { c.liveSaw(c.nodes.at(i)) }()
	}
	in, raw, err := c.ero.readInode(n.nid)
	if err != nil {
		c.broken(err, where())
		return
	}
	n.ok, n.mode, n.nlink = true, raw.Mode, raw.Nlink
	off := c.ero.inodeOff(n.nid)
	c.checkFields(&in, &raw, off, where)
	head := int64(raw.HeaderSize())
	if !c.live.on || i != 0 { // a slot is part of the slot table
		c.use(off, head+in.xlen, useMeta, in.Nid)
	}
	c.checkContents(&in, &raw, off, where)
	if in.xlen == 0 {
		return
	}
	if !spend(&c.budget, in.xlen) {
		c.finding(RuleMetaOverlap, in.xoff, in.Nid, where(),
			"xattrs and directories take more bytes than the image has: they overlap")
		return
	}
	c.checkXattrs(&in, where)
}

// checkFields checks the fields that the reader ignores.
func (c *checker) checkFields(in *Inode, raw *disk.ErofsInode, off int64, where func() string) {
	b, err := c.s.view(off, raw.HeaderSize())
	if err != nil {
		c.fail(err)
		return
	}
	if off%BlockSize+int64(len(b)) > BlockSize || in.Nid == 0 {
		c.finding(RuleNid, off, in.Nid, where(),
			"inode of %d bytes, expected it in one block and not to be number 0", len(b))
	}
	reserved := isZero(b[12:16]) && isZero(b[28:32])
	if raw.Extended {
		reserved = isZero(b[6:8]) && isZero(b[48:64])
	}
	if !reserved {
		c.finding(RuleInodeFormat, off, in.Nid, where(), "reserved bytes of the inode hold data: %x, expected zeros", b)
	}
	if in.UID == noID || in.GID == noID {
		c.finding(RuleOwner, off, in.Nid, where(), "owner is %d:%d, id %d stands for none", in.UID,
			in.GID, uint32(noID))
	}
}

// checkContents checks symbolic links and the place of contents.
func (c *checker) checkContents(in *Inode, raw *disk.ErofsInode, off int64, where func() string) {
	kind := useMeta
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		kind = useData
		if raw.Layout != disk.ErofsLayoutPlain {
			c.finding(RuleLayout, off, in.Nid, where(),
				"data layout %d of a regular file, expected plain (0): no other can be mapped", raw.Layout)
		}
	case unix.S_IFLNK:
		kind = useTarget
		// Linux requires an inline target in the same block as the inode.
		if end := in.tail + in.Size; in.tail != 0 && off/BlockSize != (end-1)/BlockSize {
			c.finding(RuleInline, off, in.Nid, where(), "target ends at %d, expected it in the block of the inode", end)
		}
		if _, err := in.Target(); err != nil {
			c.broken(err, where())
		}
	case unix.S_IFDIR:
	default:
		// Linux would take the device number for a number of blocks, or refuse the inode.
		if raw.Layout != disk.ErofsLayoutPlain {
			c.finding(RuleLayout, off, in.Nid, where(),
				"data layout %d of a special file, expected plain (0)", raw.Layout)
		}
		return
	}
	for pos := int64(0); pos < in.Size; {
		at, n := in.piece(pos)
		if at+n > int64(c.ero.sb.Blocks)*BlockSize {
			c.finding(RuleDataBounds, off, in.Nid, where(), "%d bytes at %d, expected them in %d blocks", n, at,
				c.ero.sb.Blocks)
		}
		c.use(at, n, kind, in.Nid)
		pos += n
	}
}
