package daxfs

import (
	"math"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// Placement positions an image in the space of Data.Off. All three fields are multiples of BlockSize.
//
// A file image has Image 0, its data from BlockSize on, Meta at the end of the data and End = Meta +
// MetaSize. A window of a pool has its segment at Image, Meta = Image + BlockSize, all data behind the
// metadata, and End at the highest extent.
type Placement struct {
	Image int64 // of block 0, which holds both superblocks
	Meta  int64 // of the metadata run: above block 0, and on one side of all data
	End   int64 // of the image: above all data and metadata
}

// spot is a Placement with offsets relative to block 0.
type spot struct {
	Placement
	meta    int64 // metadata run
	core    int64 // core in the run
	overlay int64 // overlay pair in the run
	base    int64 // start of the base region of the DAXFS half
	baseEnd int64
}

// Place positions the metadata. It returns a *TreeError that names the file, or an error that wraps
// ErrInvalid, if metadata and data overlap or one of the halves cannot reach its data. After an error
// the plan keeps its old place.
//
// daxfs.ko requires that the base region, which covers all data and metadata, does not overlap the
// overlay pair. So the pair comes first in the metadata run if data lies behind the run, else last.
func (p *Plan) Place(pl Placement) error {
	s := &spot{Placement: pl, meta: pl.Meta - pl.Image}
	end := pl.End - pl.Image
	switch {
	case pl.Image < 0 || pl.Image%BlockSize != 0 || pl.Meta%BlockSize != 0 || pl.End%BlockSize != 0:
		return invalid("placement %+v: expected multiples of %d", pl, BlockSize)
	case pl.Meta <= pl.Image || pl.End < pl.Meta || pl.End-pl.Meta < p.MetaSize():
		return invalid("placement %+v: expected block 0, then %d bytes of metadata before the end", pl, p.MetaSize())
	case p.digestSize > 0 && pl.End-pl.Meta != p.MetaSize():
		return invalid("placement %+v: expected the end behind %d bytes of metadata: "+
			"a digest table is found from there", pl, p.MetaSize())
	case end/BlockSize > math.MaxUint32:
		return invalid("an image of %d bytes: expected at most %d, block numbers have 32 bits",
			end, int64(math.MaxUint32)*BlockSize)
	}
	below, above := int32(-1), int32(-1) // a file on that side of the metadata
	for i := range p.inodes.len() {
		in := p.inodes.at(i)
		if !in.hasData() {
			continue
		}
		dataEnd := roundUp(in.addr+in.size, BlockSize)
		switch {
		case in.addr <= pl.Image || dataEnd > pl.End:
			return p.misplaced(int32(i), pl, "expected between block 0 and the end")
		case dataEnd <= pl.Meta:
			below = int32(i)
		case in.addr >= pl.Meta+p.MetaSize():
			above = int32(i)
		default:
			return p.misplaced(int32(i), pl, "they overlap the metadata")
		}
	}
	if below >= 0 && above >= 0 {
		return p.misplaced(above, pl, "they are behind the metadata while those of "+p.path(below)+" are before it")
	}
	if above >= 0 && p.digestSize > 0 {
		return p.misplaced(above, pl,
			"they are behind the metadata, expected them before it: the image has a digest table")
	}
	if above >= 0 {
		s.overlay, s.core = s.meta, s.meta+disk.V8OverlaySize
		s.base, s.baseEnd = s.core, end
	} else {
		s.core, s.overlay = s.meta, s.meta+p.coreSize+p.digestSize
		s.base, s.baseEnd = BlockSize, s.overlay
	}
	p.place = s
	return nil
}

func (p *Plan) misplaced(idx int32, pl Placement, why string) error {
	d := p.data(p.inodes.at(idx))
	return &TreeError{p.path(idx), invalid("contents of %d bytes at %d, image placed at %+v, metadata of %d bytes: %s",
		d.Size, d.Off, pl, p.MetaSize(), why)}
}
