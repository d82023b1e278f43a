package daxfs

import (
	"encoding/binary"
	"errors"
	"slices"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// checkXattrs checks the attributes of one inode: each shared one completely the first time, after that only its name.
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
		c.finding(RuleXattrBounds, in.xoff, in.Nid, where(), "xattr header is %x, expected a count and zeros", b[:disk.ErofsXattrHdrSize])
	}
	pos := disk.ErofsXattrHdrSize + disk.ErofsXattrIDSize*int(h.Shared)
	if pos > len(b) {
		c.finding(RuleXattrBounds, in.xoff, in.Nid, where(), "%d shared xattrs do not fit in %d bytes", h.Shared, len(b))
		return
	}
	for ids := b[disk.ErofsXattrHdrSize:pos]; len(ids) > 0 && c.err == nil; ids = ids[disk.ErofsXattrIDSize:] {
		c.checkShared(binary.LittleEndian.Uint32(ids), in, where)
	}
	for pos < len(b) {
		x, err := parseXattr(b[pos:], in.xoff+int64(pos), in.Nid)
		if err != nil {
			c.broken(err, where()) // where the next begins is not known
			return
		}
		c.checkXattr(&x, in.Nid, where)
		c.names = append(c.names, x.fullName())
		pos += int(x.size)
	}
	slices.Sort(c.names)
	for i := 1; i < len(c.names); i++ {
		if c.names[i] == c.names[i-1] {
			c.finding(RuleXattrTwice, in.xoff, in.Nid, where(), "xattr %q is there twice", c.names[i])
			return
		}
	}
}

func (x *rawXattr) fullName() string { return disk.ErofsXattrPrefix(x.index) + string(x.name) }

// checkXattr checks the value of an attribute.
func (c *checker) checkXattr(x *rawXattr, nid uint64, where func() string) {
	if x.index != disk.ErofsXattrACLAccess && x.index != disk.ErofsXattrACLDefault {
		return
	}
	if err := checkACL(Xattr{x.fullName(), x.value}); err != nil {
		c.finding(RuleXattrACL, x.off, nid, where(), "%v", err)
	}
}

// checkShared checks one reference to a shared attribute.
func (c *checker) checkShared(id uint32, in *Inode, where func() string) {
	ok, seen := c.sharedSeen[id]
	if seen {
		if ok {
			c.sharedName(id)
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
		c.finding(RuleMetaOverlap, off, in.Nid, where(), "xattrs and directories take more bytes than the image has: they overlap")
		return
	}
	x, err := c.ero.sharedXattr(id, in.Nid)
	if err != nil {
		c.broken(err, where())
		return
	}
	c.use(x.off, x.size, useMeta, in.Nid)
	c.sharedSeen[id] = true
	c.names = append(c.names, x.fullName())
	c.checkXattr(&x, in.Nid, where)
}

// sharedName notes the name of a shared attribute that was checked before, without reading its value again.
func (c *checker) sharedName(id uint32) {
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
	c.names = append(c.names, disk.ErofsXattrPrefix(e.Index)+string(b[disk.ErofsXattrEntSize:n]))
}
