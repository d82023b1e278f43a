package daxfs

import "github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"

// writeV8 writes the DAXFS part of the core: inode table and directory entries. Symlink targets and
// file data are shared with the EROFS part.
func (p *Plan) writeV8(r *runWriter) {
	s := p.place
	toBase := s.core - s.base // from offsets in the core to offsets in the base region
	at := s.core + p.v8Table
	for i := range p.inodes.len() {
		in := p.inodes.at(i)
		if !in.inV8() {
			continue
		}
		e := disk.V8Inode{
			Ino: in.ino, Mode: in.mode, UID: in.uid, GID: in.gid, Size: uint64(in.size), Nlink: in.nlink,
		}
		switch {
		case in.isDir():
			e.Size = uint64(in.v8Entries) * disk.V8DirentUnit
			if in.v8Entries > 0 {
				e.DataOff = uint64(toBase + in.v8Off)
			}
		case in.isSymlink():
			e.DataOff = uint64(toBase + in.v8Off)
		case in.hasData():
			e.DataOff = uint64(in.addr - s.Image - s.base)
		}
		e.Marshal(r.at(at, disk.V8InodeSize))
		at += disk.V8InodeSize
	}
	for i := range p.inodes.len() {
		for _, k := range p.inodes.at(i).kids {
			c := p.inodes.at(k.child)
			if !c.inV8() {
				continue
			}
			b := r.at(at, disk.V8DirentSize)
			d := disk.V8Dirent{Ino: c.ino, Mode: c.mode, NameLen: uint16(len(k.name))}
			d.Marshal(b)
			copy(b[disk.V8DirentName:], k.name)
			at += disk.V8DirentSize
		}
	}
}

// writeOverlay writes the overlay pair, an empty hash overlay. Without one daxfs.ko refuses private
// writable mappings, which every program needs.
func (p *Plan) writeOverlay(r *runWriter) { p.encodeOverlay(r.at(p.place.overlay, disk.V8OverlaySize)) }

// encodeOverlay writes the overlay pair to b, which is zeroed.
func (p *Plan) encodeOverlay(b []byte) {
	const empty = ^uint64(0)
	o := disk.V8Overlay{
		Magic: disk.V8OverlayMagic, Version: disk.V8OverlayVersion,
		BucketOff: disk.V8OverlayHdrSize, PoolOff: disk.V8OverlaySize,
		NextIno: uint64(p.stats.V8Inodes) + 1, Free: [3]uint64{empty, empty, empty},
	}
	o.Marshal(b)
}
