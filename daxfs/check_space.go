package daxfs

import (
	"cmp"
	"fmt"
	"slices"
)

// extent is a range of the image used by one structure. There may be millions.
type extent struct {
	off, size int64
	by        uint64 // inode number, and a useKind in the lowest bits
}

// kindBits is the width of a useKind in bits. Inode numbers can spare these bits: an inode takes 32 bytes.
const kindBits = 3

func (e *extent) kind() useKind { return useKind(e.by & (1<<kindBits - 1)) }
func (e *extent) ino() uint64   { return e.by >> kindBits }

type useKind uint8

const (
	useMeta   useKind = iota // nothing else may overlap it
	useTarget                // target of a symbolic link, which both halves and several links may share as a whole
	useData                  // contents of a regular file, which may be shared as a whole
	useV8     = 0x04         // flag: ino belongs to the DAXFS half
)

// use records a range used by a structure.
func (c *checker) use(off, size int64, kind useKind, ino uint64) {
	if size > 0 {
		c.extents.add(extent{off, size, ino<<kindBits | uint64(kind)})
	}
}

// end returns the end of the range. Contents take whole pages, because a direct mapping shows whole pages.
func (e *extent) end() int64 {
	if e.kind()&^useV8 == useData {
		return roundUp(e.off+e.size, BlockSize)
	}
	return e.off + e.size
}

// checkSpace checks that structures overlap only if they share everything, and that contents end with zeros.
func (c *checker) checkSpace() {
	extents := c.extents.take()
	slices.SortFunc(extents, func(a, b extent) int {
		return cmp.Or(cmp.Compare(a.off, b.off), cmp.Compare(a.size, b.size), cmp.Compare(a.kind(), b.kind()),
			cmp.Compare(a.ino(), b.ino()))
	})
	var last, high extent // the previous extent, and the one with the highest end
	reported := false     // an overlap with high was reported: one wrong size gives one finding
	for _, e := range extents {
		if c.err != nil {
			return
		}
		kind := e.kind() &^ useV8
		same := kind != useMeta && kind == last.kind()&^useV8 && e.off == last.off && e.size == last.size
		if !same {
			if e.off < high.end() && !reported {
				reported = true
				c.overlap(&e, &high)
			}
			c.checkTail(&e)
		} else if c.live.one && kind == useData && e.ino() != last.ino() {
			c.finding(RuleLiveDAX, e.off, e.ino(), "", "contents of %d bytes belong to inodes %d and %d", e.size,
				last.ino(), e.ino())
		}
		last = e
		if e.end() > high.end() {
			high, reported = e, false
		}
	}
}

// overlap reports that e begins before the end of high.
func (c *checker) overlap(e, high *extent) {
	rule := RuleMetaOverlap
	if e.kind()&^useV8 == useData && high.kind()&^useV8 == useData {
		rule = RuleDataOverlap
	}
	c.finding(rule, e.off, e.nid(), c.extentPath(e), "%s of %d bytes overlaps %s of %d bytes at %d", e.what(), e.size,
		high.what(), high.size, high.off)
}

// checkTail checks that the last page of contents ends with zeros, because a direct mapping shows it.
func (c *checker) checkTail(e *extent) {
	if e.kind()&^useV8 != useData || !c.tails {
		return
	}
	tail := e.off + e.size
	n := min(e.end(), c.data.size) - tail
	b := c.page[:n]
	if c.data.b != nil {
		b = c.data.b[tail : tail+n] // without copying
	} else if err := c.data.readFull(b, tail); err != nil {
		c.fail(err)
		return
	}
	if !isZero(b) {
		c.finding(RuleDataTail, tail, e.nid(), c.extentPath(e),
			"the last page holds something behind the contents, expected zeros")
	}
}

// nid returns the inode for findings about the EROFS half.
func (e *extent) nid() uint64 {
	if e.kind()&useV8 != 0 {
		return 0
	}
	return e.ino()
}

// what describes the structure.
func (e *extent) what() string {
	name := [...]string{"metadata", "target", "contents"}[e.kind()&^useV8]
	switch {
	case e.ino() == 0:
		return name
	case e.kind()&useV8 != 0:
		return fmt.Sprintf("%s of DAXFS inode %d", name, e.ino())
	}
	return fmt.Sprintf("%s of inode %d", name, e.ino())
}

// extentPath returns the path of the range's inode, if it is known.
func (c *checker) extentPath(e *extent) string {
	if e.kind()&useV8 != 0 {
		return c.v8Path(e.ino())
	}
	if i, ok := c.node(e.ino()); ok && e.ino() != 0 {
		return c.nodePath(i)
	}
	return ""
}
