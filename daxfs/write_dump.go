package daxfs

import (
	"bufio"
	"fmt"
	"io"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// Dump writes the plan as text: one line for each inode, in the order of the tree, with every offset
// in both halves. Offsets of metadata count from the core, those of contents are addresses as in
// Data.Off. The form is stable: plans with equal dumps and equal contents make equal images.
func (p *Plan) Dump(w io.Writer) error {
	b := bufio.NewWriter(w)
	s := p.stats
	fmt.Fprintf(b, "image uuid=%x label=%q epoch=%d.%09d\n", p.uuid, p.label, p.epoch.Sec, p.epoch.Nsec)
	fmt.Fprintf(b, "erofs inodes=%d names=%d root=%d end=%d\n", s.Inodes, s.Names, p.inodes.at(0).nid(), p.v8Table)
	fmt.Fprintf(b, "daxfs inodes=%d names=%d table=%d entries=%d\n", s.V8Inodes, s.V8Names, p.v8Table, p.v8Names)
	fmt.Fprintf(b, "core size=%d overlay=%d\n", p.coreSize, disk.V8OverlaySize)
	if p.digestSize > 0 {
		fmt.Fprintf(b, "digests contents=%d size=%d\n", len(p.digests), p.digestSize)
	}
	if pl := p.place; pl != nil {
		fmt.Fprintf(b, "place image=%d meta=%d end=%d core=+%d overlay=+%d base=+%d..+%d\n",
			pl.Image, pl.Meta, pl.End, pl.core, pl.overlay, pl.base, pl.baseEnd)
	}
	for _, x := range p.shared {
		fmt.Fprintf(b, "xattr off=%d %q uses=%d bytes=%x\n", p.xattrs[x].off, p.xattrs[x].name, p.xattrs[x].uses,
			p.xattrs[x].enc)
	}
	for idx := range p.inodes.len() {
		p.dumpInode(b, int32(idx))
	}
	for _, l := range p.left {
		fmt.Fprintf(b, "left out %q %s\n", l.Path, l.Reason)
	}
	return b.Flush()
}

func (p *Plan) dumpInode(b *bufio.Writer, idx int32) {
	in := p.inodes.at(idx)
	form, layout := "compact", "plain"
	if in.extended {
		form = "extended"
	}
	if in.inline {
		layout = "inline"
	}
	fmt.Fprintf(b, "inode %d %q mode=%06o owner=%d:%d nlink=%d size=%d mtime=%d.%09d %s %s nid=%d", in.ino, p.path(idx),
		in.mode, in.uid, in.gid, in.nlink, in.size, in.sec, in.nsec, form, layout, in.nid())
	if in.rdev != 0 {
		major, minor := disk.ErofsDecodeDev(in.rdev)
		fmt.Fprintf(b, " rdev=%d:%d", major, minor)
	}
	if in.blocks > 0 {
		fmt.Fprintf(b, " blocks=%d", in.blocks)
	}
	if in.hasData() {
		fmt.Fprintf(b, " data=%d sum=%x", in.addr, *p.sums.at(in.sum))
	}
	if in.v8Off > 0 {
		fmt.Fprintf(b, " daxfs=%d", in.v8Off)
	}
	if in.isSymlink() {
		fmt.Fprintf(b, " target=%q", in.target)
	}
	b.WriteByte('\n')
	for i, x := range in.xattrs {
		how := "inline"
		if i < in.nshared {
			how = "shared"
		}
		fmt.Fprintf(b, "\txattr %s %q bytes=%x\n", how, p.xattrs[x].name, p.xattrs[x].enc)
	}
	for _, k := range in.kids {
		fmt.Fprintf(b, "\tentry %q %d\n", k.name, p.inodes.at(k.child).ino)
	}
}
