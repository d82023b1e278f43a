package daxfs

import (
	"cmp"
	"crypto/sha256"
	"hash"
	"slices"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// layoutDigests plans the digest table, with one entry for each distinct contents.
func (p *Plan) layoutDigests() error {
	p.digests = make([]int32, 0, p.stats.Files)
	for i := range p.inodes.len() {
		if p.inodes.at(i).hasData() {
			p.digests = append(p.digests, int32(i))
		}
	}
	data := func(i int32) Data { return p.data(p.inodes.at(i)) }
	slices.SortStableFunc(p.digests, func(a, b int32) int { return cmp.Compare(data(a).Off, data(b).Off) })
	for k, i := range p.digests {
		if d := data(i); d.Sum == [32]byte{} {
			return &TreeError{p.path(i), invalid("contents of %d bytes at %d have no digest", d.Size, d.Off)}
		} else if k > 0 && data(p.digests[k-1]) != d && data(p.digests[k-1]).Off == d.Off {
			return &TreeError{p.path(i), invalid("contents of %d bytes at %d have digest %x, and %x as those of %q",
				d.Size, d.Off, d.Sum, data(p.digests[k-1]).Sum, p.path(p.digests[k-1]))}
		}
	}
	p.digests = slices.CompactFunc(p.digests, func(a, b int32) bool { return data(a).Off == data(b).Off })
	p.digestSize = roundUp(int64(len(p.digests))*disk.DigestEntrySize+disk.DigestFooterSize, BlockSize)
	return nil
}

// writeDigests writes the digest table and its footer. meta already covers block 0 and the core.
func (p *Plan) writeDigests(r *runWriter, meta hash.Hash) {
	s := p.place
	at := s.core + p.coreSize
	f := disk.DigestFooter{
		Version: disk.DigestVersion, Algorithm: disk.DigestSHA256,
		TableOff: uint64(at), Count: uint64(len(p.digests)), MetaOff: uint64(s.core),
		ImageSize: uint64(s.End - s.Image),
	}
	copy(f.Magic[:], disk.DigestMagic)
	table := sha256.New()
	for _, i := range p.digests {
		d := p.data(p.inodes.at(i))
		e := disk.DigestEntry{Off: uint64(d.Off - s.Image), Size: uint64(d.Size), Sum: d.Sum}
		b := r.at(at, disk.DigestEntrySize)
		e.Marshal(b)
		table.Write(b)
		at += disk.DigestEntrySize
	}
	table.Sum(f.Table[:0])
	overlay := make([]byte, disk.V8OverlaySize)
	p.encodeOverlay(overlay)
	meta.Write(overlay)
	meta.Sum(f.Meta[:0])
	b := r.at(s.overlay-disk.DigestFooterSize, disk.DigestFooterSize)
	f.Marshal(b)
	f.Root = sha256.Sum256(b[:disk.DigestRootOff])
	f.Marshal(b)
}
