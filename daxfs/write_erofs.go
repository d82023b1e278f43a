package daxfs

import "github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"

func (p *Plan) writeErofs(r *runWriter) {
	var names []dirent
	for _, pc := range p.pieces {
		at := p.place.core + pc.off
		if pc.kind == pieceShared {
			for _, x := range p.shared {
				copy(r.at(p.place.core+p.xattrs[x].off, len(p.xattrs[x].enc)), p.xattrs[x].enc)
			}
			continue
		}
		in := p.inodes.at(pc.ino)
		if in.isDir() {
			names = p.dirents(names[:0], pc.ino)
		}
		if pc.kind == pieceInode {
			p.encodeInode(r, at, pc.ino, names)
			continue
		}
		if in.isSymlink() {
			copy(r.at(at, BlockSize), in.target)
			continue
		}
		for rest := names; in.wholeBlocks() > (at-p.place.core-pc.off)/BlockSize; at += BlockSize {
			n, _ := dirFill(rest)
			p.encodeDir(r.at(at, BlockSize), rest[:n], p.dualNid)
			rest = rest[n:]
		}
	}
}

// encodeInode writes one inode with its xattrs and its inline tail. names are the entries of a directory.
func (p *Plan) encodeInode(r *runWriter, at int64, idx int32, names []dirent) {
	in := p.inodes.at(idx)
	head := in.headerSize()
	tail := 0
	if in.inline {
		tail = int(in.size % BlockSize)
	}
	b := r.at(at, head+in.xbytes+tail)
	e := disk.ErofsInode{
		Extended: in.extended, Layout: disk.ErofsLayoutPlain, Mode: uint16(in.mode), Nlink: in.nlink,
		Size: uint64(in.size), Union: in.rdev, Ino: in.ino, UID: in.uid, GID: in.gid,
	}
	if in.extended {
		e.MtimeSec, e.MtimeNsec = in.sec, in.nsec
	}
	if in.inline {
		e.Layout = disk.ErofsLayoutInline
	}
	if in.xbytes > 0 {
		e.XattrCount = uint16(1 + (in.xbytes-disk.ErofsXattrHdrSize)/disk.ErofsXattrIDSize)
		p.encodeXattrs(b[head:head+in.xbytes], in)
	}
	switch {
	case in.hasData():
		e.Union = uint32((in.addr - p.place.Image) / BlockSize)
	case in.blocks > 0:
		e.Union = uint32((p.place.core + in.blocks) / BlockSize)
	}
	e.Marshal(b)
	if tail == 0 {
		return
	}
	if in.isSymlink() {
		copy(b[head+in.xbytes:], in.target)
		return
	}
	for range in.wholeBlocks() {
		n, _ := dirFill(names)
		names = names[n:]
	}
	p.encodeDir(b[head+in.xbytes:], names, p.dualNid)
}

// encodeXattrs writes the header, the references and the inline entries of in to b, which is zeroed.
func (p *Plan) encodeXattrs(b []byte, in *inode) {
	h := disk.ErofsXattrHeader{Shared: uint8(in.nshared)}
	h.Marshal(b)
	b = b[disk.ErofsXattrHdrSize:]
	for i, x := range in.xattrs {
		if i < in.nshared {
			disk.PutErofsXattrID(b, uint32(p.xattrs[x].off/disk.ErofsXattrIDSize))
			b = b[disk.ErofsXattrIDSize:]
			continue
		}
		b = b[copy(b, p.xattrs[x].enc):]
	}
}
