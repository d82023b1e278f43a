package pool

import "fmt"

// Usage says what is in a pool, in bytes. Extents count in whole pages, as they lie in memory.
type Usage struct {
	Size        int64 `json:"size"`        // of the region
	Head        int64 `json:"head"`        // header, slot table and slots
	Tree        int64 `json:"tree"`        // of the tree area: what runs have taken in this epoch
	Segments    int64 `json:"segments"`    // metadata of windows
	MetaFree    int64 `json:"metaFree"`    // kept for the tree area and segments, unused
	Extents     int64 `json:"extents"`     // file contents, each distinct file once
	Documents   int64 `json:"documents"`   // what the store wrote about images, in whole pages
	Dead        int64 `json:"dead"`        // contents that nothing holds, waiting until nobody can read them
	DeadCount   int   `json:"deadCount"`   // number of such extents
	Free        int64 `json:"free"`        // for extents
	LongestFree int64 `json:"longestFree"` // in one piece
	Gaps        int   `json:"gaps"`        // pieces of Free
	Layers      int   `json:"layers"`
	Images      int   `json:"images"`
	Slots       int   `json:"slots"`     // how many images can be added in one epoch
	SlotsUsed   int   `json:"slotsUsed"` // of them, those of removed images included
	ExtentCount int   `json:"extentCount"`
	// ImageExtents are the extents that images hold, each once.
	ImageExtents int64 `json:"imageExtents"`
	// Unshared is what the images' contents would take if each image had its own. Unshared - ImageExtents is saved.
	Unshared int64 `json:"unshared"`
	// Reclaimable are the extents that only layers hold: removing layers would free them.
	Reclaimable int64 `json:"reclaimable"`
}

// Usage returns what is in the pool now.
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

// ImageUsage says what one image takes, in bytes.
type ImageUsage struct {
	Tree    int64 `json:"tree"`    // what is the image's alone in the tree area
	Segment int64 `json:"segment"` // metadata of its window
	Extents int64 `json:"extents"` // its file contents in whole pages
	Shared  int64 `json:"shared"`  // those of Extents that other images hold as well
	Files   int   `json:"files"`   // number of its extents
}

// ImageUsage returns what an image takes now, without removing it. Errors: ErrNotFound.
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

// LayerUsage returns the bytes of contents that a layer holds, and those of them that only it holds: what removing it
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

// TreeRanges returns the ranges of the tree area that runs have taken in this epoch, each as its first byte and the byte
// behind its last.
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
