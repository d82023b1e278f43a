package daxfs

import (
	"bytes"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// rawXattr is an attribute whose name and value still point into the image.
type rawXattr struct {
	index uint8
	name  []byte // without the prefix that index stands for
	value []byte
	off   int64 // of its entry in the image
	size  int64 // of its entry
}

// xattrs returns the attributes of an inode in the order of Linux: inline ones first.
func (f *FS) xattrs(in *Inode) ([]Xattr, error) {
	if in.xlen == 0 {
		return nil, nil
	}
	b, err := f.s.view(in.xoff, int(in.xlen))
	if err != nil {
		return nil, err
	}
	var h disk.ErofsXattrHeader
	h.Unmarshal(b)
	pos := disk.ErofsXattrHdrSize + disk.ErofsXattrIDSize*int(h.Shared)
	if pos > len(b) {
		return nil,
			corrupt(RuleXattrBounds, in.xoff, in.Nid, "%d shared xattrs do not fit in %d bytes", h.Shared, len(b))
	}
	var xs []Xattr
	add := func(x rawXattr) { xs = append(xs, Xattr{x.fullName(), bytes.Clone(x.value)}) }
	ids := b[disk.ErofsXattrHdrSize:pos]
	for pos < len(b) {
		x, err := parseXattr(b[pos:], in.xoff+int64(pos), in.Nid)
		if err != nil {
			return nil, err
		}
		add(x)
		pos += int(x.size)
	}
	for ; len(ids) > 0; ids = ids[disk.ErofsXattrIDSize:] {
		x, err := f.sharedXattr(disk.ErofsXattrID(ids), in.Nid)
		if err != nil {
			return nil, err
		}
		add(x)
	}
	return xs, nil
}

// sharedXattr reads the shared attribute id.
func (f *FS) sharedXattr(id uint32, nid uint64) (rawXattr, error) {
	off, size, err := f.sharedSize(id, nid)
	if err != nil {
		return rawXattr{}, err
	}
	b, err := f.s.view(off, int(size))
	if err != nil {
		return rawXattr{}, err
	}
	return parseXattr(b, off, nid)
}

// sharedSize returns offset and size of the shared attribute id, after checking that it lies in the image.
func (f *FS) sharedSize(id uint32, nid uint64) (off, size int64, err error) {
	off = f.sb.xattr + int64(id)*disk.ErofsXattrIDSize
	if !f.s.holds(off, disk.ErofsXattrEntSize) {
		return 0, 0,
			corrupt(RuleXattrBounds, off, nid, "shared xattr %d lies outside of the image of %d bytes", id, f.s.size)
	}
	b, err := f.s.view(off, disk.ErofsXattrEntSize)
	if err != nil {
		return 0, 0, err
	}
	var e disk.ErofsXattrEntry
	e.Unmarshal(b)
	size = int64(e.Size())
	if !f.s.holds(off, size) {
		return 0, 0,
			corrupt(RuleXattrBounds, off, nid, "shared xattr %d of %d bytes ends outside of the image of %d bytes",
				id, size, f.s.size)
	}
	return off, size, nil
}

// parseXattr decodes the entry at the beginning of b.
func parseXattr(b []byte, off int64, nid uint64) (rawXattr, error) {
	if len(b) < disk.ErofsXattrEntSize {
		return rawXattr{},
			corrupt(RuleXattrBounds, off, nid, "%d bytes left for an xattr, expected at least %d", len(b),
				disk.ErofsXattrEntSize)
	}
	var e disk.ErofsXattrEntry
	e.Unmarshal(b)
	if e.Size() > len(b) {
		return rawXattr{}, corrupt(RuleXattrBounds, off, nid, "xattr of %d bytes, %d are left", e.Size(), len(b))
	}
	prefix := disk.ErofsXattrPrefix(e.Index)
	if prefix == "" {
		return rawXattr{}, unsupported(RuleXattrName, off, nid, "xattr name index %d", e.Index)
	}
	name := b[disk.ErofsXattrEntSize : disk.ErofsXattrEntSize+int(e.NameLen)]
	acl := e.Index == disk.ErofsXattrACLAccess || e.Index == disk.ErofsXattrACLDefault
	switch {
	case acl != (len(name) == 0):
		return rawXattr{}, corrupt(RuleXattrName, off, nid, "xattr name %q after %q", name, prefix)
	case len(prefix)+len(name) > MaxName:
		return rawXattr{},
			corrupt(RuleXattrName, off, nid, "xattr name of %d bytes, expected at most %d",
				len(prefix)+len(name), MaxName)
	case bytes.IndexByte(name, 0) >= 0:
		return rawXattr{}, corrupt(RuleXattrName, off, nid, "xattr name %q holds a NUL", name)
	}
	value := b[disk.ErofsXattrEntSize+len(name):][:e.ValueLen]
	return rawXattr{e.Index, name, value, off, int64(e.Size())}, nil
}
