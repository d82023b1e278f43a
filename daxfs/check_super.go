package daxfs

import (
	"bytes"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// checkErofsSuper checks the fields that Open ignores, but the format or a kernel requires.
func (c *checker) checkErofsSuper(block []byte) {
	const off = disk.ErofsSuperOff
	var d disk.ErofsSuper
	d.Unmarshal(block[off:])
	sb := &c.ero.sb
	if d.FeatureCompat&disk.ErofsCompatChecksum == 0 {
		c.finding(RuleChecksum, off+8, 0, "", "there is no checksum")
	}
	if bad := d.FeatureCompat &^ (disk.ErofsCompatChecksum | disk.ErofsCompatMtime); bad != 0 ||
		d.FeatureIncompat != 0 {
		c.finding(RuleFeature, off+8, 0, "",
			"compatible features %#x and incompatible features %#x, expected at most %#x and 0",
			d.FeatureCompat, d.FeatureIncompat, disk.ErofsCompatChecksum|disk.ErofsCompatMtime)
	}
	if d.ExtSlots != 0 || d.Compression != 0 || d.DevTableSlot != 0 || d.XattrPrefixes != 0 || d.XattrPrefixOff != 0 ||
		d.PackedNid != 0 || d.XattrFilter != 0 || !isZero(block[off+105:off+disk.ErofsSuperSize]) {
		c.finding(RuleReserved, off, 0, "", "fields of features that are not used are %+v, expected zeros", d)
	}
	if !isZero(block[off+disk.ErofsSuperSize:]) || !isZero(block[disk.V8SuperSize:off]) {
		c.finding(RuleReserved, disk.V8SuperSize, 0, "", "block 0 holds more than two superblocks, expected zeros")
	}
	if sb.UUID[6]>>4 != 8 || sb.UUID[8]>>6 != 2 {
		c.finding(RuleUUID, off+48, 0, "", "UUID is %x, expected version 8 of RFC 9562", sb.UUID)
	}
	if _, rest, ended := bytes.Cut(d.Label[:], []byte{0}); !ended || !isZero(rest) {
		c.finding(RuleLabel, off+64, 0, "", "label is %q, expected at most %d bytes and then NULs", d.Label, MaxLabel)
	}
	if n := c.s.size / BlockSize; int64(sb.Blocks) < n {
		// Open refuses a larger number.
		c.finding(RuleBlocks, off+36, 0, "", "%d blocks, the image has %d", sb.Blocks, n)
	}
	if max := uint64(c.s.size-sb.meta) / disk.ErofsSlot; sb.Inodes > max {
		c.finding(RuleInodes, off+16, 0, "", "%d inodes, the image has room for %d", sb.Inodes, max)
	}
}

// checkV8Super checks the rest of the superblock and the overlay pair.
func (c *checker) checkV8Super(block []byte) {
	var sb disk.V8Super
	sb.Unmarshal(block)
	base, end := c.v8.base(), c.v8.end()
	if sb.Reserved != 0 {
		c.finding(RuleV8Reserved, 12, 0, "", "reserved field is %#x, expected 0", sb.Reserved)
	}
	if sb.RootIno != disk.V8RootIno {
		c.finding(RuleV8Root, 52, 0, "", "root inode is %d, expected 1: the kernel takes 1 anyway", sb.RootIno)
	}
	if sb.TotalSize != uint64(c.s.size) {
		c.finding(RuleV8Size, 16, 0, "", "size is %d, the image has %d bytes", sb.TotalSize, c.s.size)
	}
	if base%BlockSize != 0 || end%BlockSize != 0 || sb.DataOff > sb.BaseSize {
		c.finding(RuleV8Base, 24, 0, "",
			"base region from %d to %d, data from %d on, expected whole blocks and data inside", base, end, sb.DataOff)
	}
	if sb.PCacheOff != 0 || sb.PCacheSize != 0 || sb.PCacheSlots != 0 || sb.PCacheHashSft != 0 {
		c.finding(RuleV8PageCache, 88, 0, "", "page cache of %d bytes at %d, expected none",
			sb.PCacheSize, sb.PCacheOff)
	}
	c.use(c.v8.inodeOff(1), int64(sb.InodeCount)*disk.V8InodeSize, useMeta, 0)
	c.checkOverlay(&sb)
}

// checkOverlay requires an empty overlay pair, the only form that was tested with the kernel module.
func (c *checker) checkOverlay(sb *disk.V8Super) {
	size := uint64(c.s.size)
	if sb.OverlaySize != disk.V8OverlaySize || sb.OverlayOff < BlockSize || sb.OverlayOff%BlockSize != 0 ||
		sb.OverlayOff > size || disk.V8OverlaySize > size-sb.OverlayOff || sb.OverlayBkts != 1 || sb.OverlayShift != 0 {
		c.finding(RuleV8Overlay, 64, 0, "",
			"overlay of %d bytes at %d with %d buckets (shift %d), expected %d bytes in the image "+
				"and 1 bucket (shift 0)",
			sb.OverlaySize, sb.OverlayOff, sb.OverlayBkts, sb.OverlayShift, disk.V8OverlaySize)
		return
	}
	off := int64(sb.OverlayOff)
	c.use(off, disk.V8OverlaySize, useMeta, 0)
	if off < c.v8.end() && c.v8.base() < off+disk.V8OverlaySize {
		c.finding(RuleV8Overlay, 64, 0, "", "overlay at %d lies in the base region from %d to %d", off,
			c.v8.base(), c.v8.end())
	}
	b, err := c.s.view(off, disk.V8OverlaySize)
	if err != nil {
		c.fail(err)
		return
	}
	var got disk.V8Overlay
	got.Unmarshal(b)
	const empty = ^uint64(0)
	want := disk.V8Overlay{
		Magic: disk.V8OverlayMagic, Version: disk.V8OverlayVersion, BucketOff: disk.V8OverlayHdrSize,
		PoolOff: disk.V8OverlaySize,
		NextIno: got.NextIno, Free: [3]uint64{empty, empty, empty},
	}
	switch {
	case got != want:
		c.finding(RuleV8Overlay, off, 0, "", "overlay header is %+v, expected %+v", got, want)
	case got.NextIno <= uint64(sb.InodeCount):
		c.finding(RuleV8Overlay, off+40, 0, "", "next inode is %d, expected more than %d", got.NextIno, sb.InodeCount)
	case !isZero(b[disk.V8OverlayUsed:]):
		c.finding(RuleV8Overlay, off+disk.V8OverlayUsed, 0, "", "rest of the overlay pair holds data, expected zeros")
	}
}
