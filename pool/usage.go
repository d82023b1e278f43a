package pool

import "fmt"

// Usage says what a pool contains, in bytes. Extents count in whole pages, as in memory.
type Usage struct {
	Size        int64 `json:"size"`        // of the region
	Head        int64 `json:"head"`        // header, slot table and slots
	Tree        int64 `json:"tree"`        // taken by runs of the tree area in this epoch
	Segments    int64 `json:"segments"`    // metadata of windows
	MetaFree    int64 `json:"metaFree"`    // reserved for the tree area and segments, unused
	Extents     int64 `json:"extents"`     // file contents, each distinct file once
	Documents   int64 `json:"documents"`   // documents of images, in whole pages
	Dead        int64 `json:"dead"`        // contents without holders that somebody may still read
	DeadCount   int   `json:"deadCount"`   // number of such extents
	Free        int64 `json:"free"`        // for extents
	LongestFree int64 `json:"longestFree"` // in one piece
	Gaps        int   `json:"gaps"`        // pieces of Free
	Layers      int   `json:"layers"`
	Images      int   `json:"images"`
	Slots       int   `json:"slots"`     // limit of images that can be added in one epoch
	SlotsUsed   int   `json:"slotsUsed"` // used slots, including those of removed images
	ExtentCount int   `json:"extentCount"`
	// ImageExtents is the size of the extents that images hold, each counted once.
	ImageExtents int64 `json:"imageExtents"`
	// Unshared is the size of the images' contents without sharing; Unshared - ImageExtents is saved.
	Unshared int64 `json:"unshared"`
	// Reclaimable is the size of the extents that only layers hold: removing layers would free them.
	Reclaimable int64 `json:"reclaimable"`
}

// Usage returns the current use of the pool.
func (p *Pool) Usage() Usage {
	p.commit.Lock()
	defer p.commit.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	u := Usage{
		Size: p.header.size, Head: p.header.geo.TreeStart(), Tree: p.tree.used(), Gaps: p.space.GapCount(),
		Layers: len(p.layers), Images: len(p.images), Slots: p.header.geo.Slots, SlotsUsed: p.header.used,
		MetaFree: p.space.SegmentFree() + p.tree.room(),
	}
	u.Free, u.LongestFree = p.space.Free()
	for _, e := range p.extents {
		n := e.span().Len
		switch {
		case e.document:
			u.Documents += n
			continue
		case e.died != 0:
			u.Dead += n
			u.DeadCount++
			continue
		case e.images > 0:
			u.ImageExtents += n
			u.Unshared += n * int64(e.images)
		default:
			u.Reclaimable += n
		}
		u.Extents += n
		u.ExtentCount++
	}
	for _, m := range p.images {
		u.Segments += m.Segment
	}
	return u
}

// ImageUsage says how much one image takes, in bytes.
type ImageUsage struct {
	Tree    int64 `json:"tree"`    // used by this image only, in the tree area
	Segment int64 `json:"segment"` // metadata of its window
	Extents int64 `json:"extents"` // its file contents in whole pages
	Shared  int64 `json:"shared"`  // part of Extents that other images hold, too
	Files   int   `json:"files"`   // number of its extents
}

// ImageUsage returns how much an image takes now. Errors: ErrNotFound.
func (p *Pool) ImageUsage(key string) (ImageUsage, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.images[key]
	if m == nil {
		return ImageUsage{}, fmt.Errorf("pool: image %q: %w", key, ErrNotFound)
	}
	u := ImageUsage{Tree: m.own.Len, Segment: m.Segment, Files: len(m.used)}
	for _, e := range m.used {
		u.Extents += e.span().Len
		if e.images > 1 {
			u.Shared += e.span().Len
		}
	}
	return u, nil
}

// LayerUsage returns how many bytes of contents a layer holds, and how many of them only it holds and
// would free. Errors: ErrNotFound.
func (p *Pool) LayerUsage(key string) (held, alone int64, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	es, ok := p.layers[key]
	if !ok {
		return 0, 0, fmt.Errorf("pool: layer %q: %w", key, ErrNotFound)
	}
	for _, e := range es {
		held += e.span().Len
		if e.refs == 1 {
			alone += e.span().Len
		}
	}
	return held, alone, nil
}

// TreeRanges returns the ranges that runs took in this epoch, as first offset and end.
func (p *Pool) TreeRanges() [][2]int64 {
	p.commit.Lock()
	defer p.commit.Unlock()
	var out [][2]int64
	for i, c := range p.tree.chunks {
		end := c.End()
		if i == len(p.tree.chunks)-1 {
			end = p.tree.next
		}
		out = append(out, [2]int64{c.Off, end})
	}
	return out
}
