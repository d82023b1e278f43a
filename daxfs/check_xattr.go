package daxfs

import (
	"encoding/binary"
	"errors"
	"slices"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// checkXattrs checks the attributes of one inode. It checks a shared one in full once, later only its name.
func (c *checker) checkXattrs(in *Inode, where func() string) {
	c.names = c.names[:0]
	b, err := c.s.view(in.xoff, int(in.xlen))
	if err != nil {
		c.fail(err)
		return
	}
	var h disk.ErofsXattrHeader
	h.Unmarshal(b)
	if !isZero(b[:4]) || !isZero(b[5:disk.ErofsXattrHdrSize]) {
		c.finding(RuleXattrBounds, in.xoff, in.Nid, where(), "xattr header is %x, expected a count and zeros",
			b[:disk.ErofsXattrHdrSize])
	}
	if len(b) == disk.ErofsXattrHdrSize {
		c.finding(RuleXattrBounds, in.xoff, in.Nid, where(), "xattr header without xattrs: Linux refuses to list them")
	}
	pos := disk.ErofsXattrHdrSize + disk.ErofsXattrIDSize*int(h.Shared)
	if pos > len(b) {
		c.finding(RuleXattrBounds, in.xoff, in.Nid, where(), "%d shared xattrs do not fit in %d bytes",
			h.Shared, len(b))
		return
	}
	for ids := b[disk.ErofsXattrHdrSize:pos]; len(ids) > 0 && c.err == nil; ids = ids[disk.ErofsXattrIDSize:] {
		c.checkShared(binary.LittleEndian.Uint32(ids), in, where)
	}
	for pos < len(b) {
		x, err := parseXattr(b[pos:], in.xoff+int64(pos), in.Nid)
		if err != nil {
			c.broken(err, where()) // the start of the next one is unknown
			return
		}
		c.checkXattr(&x, in.Nid, where)
		c.addName(x.index, x.fullName(), in, where)
		pos += int(x.size)
	}
	c.checkNames(in, where)
}

func (c *checker) checkNames(in *Inode, where func() string) {
	list := 0
	for _, name := range c.names {
		list += len(name) + 1
	}
	if list > xattrListMax {
		c.finding(RuleXattrList, in.xoff, in.Nid, where(),
			"xattr names of %d bytes with their NULs, expected at most %d",
			list, xattrListMax)
	}
	slices.Sort(c.names)
	for i := 1; i < len(c.names); i++ {
		if c.names[i] == c.names[i-1] {
			c.finding(RuleXattrTwice, in.xoff, in.Nid, where(), "xattr %q occurs twice", c.names[i])
			return
		}
	}
}

func (x *rawXattr) fullName() string { return disk.ErofsXattrPrefix(x.index) + string(x.name) }

func (c *checker) checkXattr(x *rawXattr, nid uint64, where func() string) {
	rule := RuleXattrACL
	if x.index == disk.ErofsXattrSecurity {
		rule = RuleXattrCaps
	}
	if err := checkXattrValue(x.index, Xattr{x.fullName(), x.value}); err != nil {
		c.finding(rule, x.off, nid, where(), "%v", err)
	}
}

func (c *checker) checkShared(id uint32, in *Inode, where func() string) {
	ok, seen := c.sharedSeen[id]
	if seen {
		if ok {
			c.sharedName(id, in, where)
		}
		return
	}
	c.sharedSeen[id] = false
	off, size, err := c.ero.sharedSize(id, in.Nid)
	if err != nil {
		c.broken(err, where())
		return
	}
	if !spend(&c.budget, size) {
		c.finding(RuleMetaOverlap, off, in.Nid, where(),
			"xattrs and directories take more bytes than the image has: they overlap")
		return
	}
	x, err := c.ero.sharedXattr(id, in.Nid)
	if err != nil {
		c.broken(err, where())
		return
	}
	c.use(x.off, x.size, useMeta, in.Nid)
	c.sharedSeen[id] = true
	c.addName(x.index, x.fullName(), in, where)
	c.checkXattr(&x, in.Nid, where)
}

// addName records the name of an attribute and checks whether an inode of that type may have it.
func (c *checker) addName(index uint8, name string, in *Inode, where func() string) {
	c.names = append(c.names, name)
	if err := checkXattrType(index, name, in.Mode); err != nil {
		c.finding(RuleXattrType, in.xoff, in.Nid, where(), "%v", err)
	}
}

// sharedName records the name of a shared attribute that was checked before. It does not read the value again.
func (c *checker) sharedName(id uint32, in *Inode, where func() string) {
	off := c.ero.sb.xattr + int64(id)*disk.ErofsXattrIDSize
	b, err := c.s.view(off, int(min(disk.ErofsXattrEntSize+MaxName, c.s.size-off)))
	if err != nil {
		c.fail(err)
		return
	}
	var e disk.ErofsXattrEntry
	e.Unmarshal(b)
	n := disk.ErofsXattrEntSize + int(e.NameLen)
	if n > len(b) {
		c.fail(errors.New("daxfs: the image changed while it was checked"))
		return
	}
	c.addName(e.Index, disk.ErofsXattrPrefix(e.Index)+string(b[disk.ErofsXattrEntSize:n]), in, where)
}
