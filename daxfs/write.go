package daxfs

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// ErrNotPlaced reports a write before a successful Place.
var ErrNotPlaced = errors.New("the plan has no place yet")

// WriteTo writes block 0 and the metadata run, and nothing else. Offsets in w count from block 0; for a window
// of a pool, w is the window. It writes the superblocks last: an interrupted write leaves nothing mountable,
// provided that block 0 held no image before. The writes before that are large and in ascending order.
func (p *Plan) WriteTo(w io.WriterAt) error {
	s := p.place
	if s == nil {
		return ErrNotPlaced
	}
	r := runWriter{w: w, pos: s.meta, buf: make([]byte, 0, min(writeBuffer, p.MetaSize()))}
	if s.overlay < s.core {
		p.writeOverlay(&r)
	}
	var meta hash.Hash
	if p.digestSize > 0 {
		meta = sha256.New()
		meta.Write(p.block0())
		r.sum = meta
	}
	p.writeErofs(&r)
	p.writeV8(&r)
	if meta != nil {
		r.at(s.core+p.coreSize, 0)
		r.flush()
		r.sum = nil
		p.writeDigests(&r, meta)
	}
	if s.overlay > s.core {
		p.writeOverlay(&r)
	}
	r.at(s.meta+p.MetaSize(), 0)
	r.flush()
	if r.err != nil {
		return r.err
	}
	block0 := p.block0()
	if _, err := w.WriteAt(block0, 0); err != nil {
		return fmt.Errorf("write the superblocks: %w", err)
	}
	return nil
}

// block0 returns the first block of the image, with both superblocks.
func (p *Plan) block0() []byte {
	s := p.place
	b := make([]byte, BlockSize)
	v8 := disk.V8Super{
		Magic: disk.V8Magic, Version: disk.V8Version, BlockSize: BlockSize,
		TotalSize: uint64(s.End - s.Image),
		BaseOff:   uint64(s.base), BaseSize: uint64(s.baseEnd - s.base),
		InodeOff: uint64(s.core + p.v8Table - s.base), InodeCount: uint32(p.stats.V8Inodes), RootIno: disk.V8RootIno,
		DataOff:    uint64(s.core + p.v8Names - s.base),
		OverlayOff: uint64(s.overlay), OverlaySize: disk.V8OverlaySize, OverlayBkts: 1,
	}
	v8.Marshal(b)
	block := uint32(s.core / BlockSize)
	ero := disk.ErofsSuper{
		Magic:         disk.ErofsMagic,
		FeatureCompat: disk.ErofsCompatChecksum | disk.ErofsCompatMtime,
		BlockBits:     disk.ErofsBlockBits,
		RootNid:       uint16(p.inodes.at(0).nid()),
		Inos:          uint64(p.inodes.len()),
		EpochSec:      p.epoch.Sec, EpochNsec: p.epoch.Nsec,
		Blocks:    uint32((s.End - s.Image) / BlockSize),
		MetaBlock: block, XattrBlock: block,
		UUID: p.uuid,
	}
	copy(ero.Label[:], p.label)
	ero.Marshal(b[disk.ErofsSuperOff:])
	ero.Checksum = disk.ErofsChecksum(b)
	ero.Marshal(b[disk.ErofsSuperOff:])
	return b
}

// writeBuffer is the buffer size of runWriter. It exceeds the largest piece: an inode with 256 KiB of
// xattrs, and a block.
const writeBuffer = 1 << 20

// runWriter writes a run of bytes in ascending order through one buffer. Gaps become zeros.
type runWriter struct {
	w   io.WriterAt
	pos int64 // offset of buf in w
	buf []byte
	sum hash.Hash // digest of the written bytes, if wanted
	err error     // of the first failed write
}

// at returns n zeroed bytes at off, valid until the next call. off must not be below the end of the last call.
func (r *runWriter) at(off int64, n int) []byte {
	for gap := off - r.pos - int64(len(r.buf)); gap > 0; {
		if len(r.buf) == cap(r.buf) {
			r.flush()
		}
		k := int(min(gap, int64(cap(r.buf)-len(r.buf))))
		clear(r.buf[len(r.buf) : len(r.buf)+k])
		r.buf = r.buf[:len(r.buf)+k]
		gap -= int64(k)
	}
	if len(r.buf)+n > cap(r.buf) {
		r.flush()
	}
	at := len(r.buf)
	r.buf = r.buf[:at+n]
	clear(r.buf[at:])
	return r.buf[at:]
}

func (r *runWriter) flush() {
	if r.sum != nil {
		r.sum.Write(r.buf)
	}
	if r.err == nil && len(r.buf) > 0 {
		if _, err := r.w.WriteAt(r.buf, r.pos); err != nil {
			r.err = fmt.Errorf("write %d bytes of metadata at %d: %w", len(r.buf), r.pos, err)
		}
	}
	r.pos += int64(len(r.buf))
	r.buf = r.buf[:0]
}
