package pool

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// Finding is one thing that Check found wrong. Rules of images are those of daxfs.Check with "image." before them.
type Finding struct {
	Rule string `json:"rule"`          // such as "pool.overlap"
	Key  string `json:"key,omitempty"` // image or layer
	Off  int64  `json:"offset"`        // in the pool
	Msg  string `json:"message"`
}

// String is the finding in one line.
func (f Finding) String() string {
	if f.Key != "" {
		return fmt.Sprintf("%s: %q at %d: %s", f.Rule, f.Key, f.Off, f.Msg)
	}
	return fmt.Sprintf("%s: at %d: %s", f.Rule, f.Off, f.Msg)
}

// checker stops at the first report that returns false.
type checker struct {
	p      *Pool
	report func(Finding) bool
	stop   bool
}

func (c *checker) found(rule, key string, off int64, format string, args ...any) {
	if !c.stop {
		c.stop = !c.report(Finding{Rule: rule, Key: key, Off: off, Msg: fmt.Sprintf(format, args...)})
	}
}

// Check compares everything that is known in more than one place: the header copies and the catalogue with the index,
// the index with what is in memory, extents and segments with the allocator, the bytes of every extent with its sum, the
// rest of its last page with zero, and every image by daxfs.Check. It reads the whole pool. Nothing is changed; adding
// and removing waits until it has finished. report returns false to stop.
//
// Rules: pool.header, pool.catalogue, pool.index, pool.refs, pool.overlap, pool.leak, pool.sum, pool.tail, image.*.
// The error is that of a check that could not be made, not of one that found something.
func (p *Pool) Check(ctx context.Context, report func(Finding) bool) error {
	p.commit.Lock()
	defer p.commit.Unlock()
	if err := p.index.unknown(); err != nil {
		return fmt.Errorf("pool: check: index %q: %w", p.index.path, err)
	}
	c := &checker{p: p, report: report}
	steps := []func(context.Context) error{c.checkCatalogue, c.checkIndex, c.checkSpace, c.checkExtents, c.checkImages}
	for _, step := range steps {
		if c.stop {
			return nil
		}
		if err := step(ctx); err != nil {
			return fmt.Errorf("pool: check: %w", err)
		}
	}
	return nil
}

func (c *checker) checkCatalogue(context.Context) error {
	p := c.p
	hs, err := readHeaders(p.region)
	if err != nil {
		c.found("pool.header", "", 0, "no valid copy: %v", err)
		return nil
	}
	if p.stale {
		return nil // writing it failed, and the next change publishes: what is there may be of either generation
	}
	if hs[0].id != p.header.id || hs[0].generation != p.header.generation || hs[0].size != p.region.Size() {
		c.found("pool.header", "", headerOff(hs[0].generation), "pool %x generation %d of %d bytes, expected %x, %d, %d",
			hs[0].id, hs[0].generation, hs[0].size, p.header.id, p.header.generation, p.region.Size())
	}
	cat, err := ReadCatalogue(p.region)
	if err != nil {
		c.found("pool.catalogue", "", catalogueOff(hs[0].generation), "%v", err)
		return nil
	}
	if a, b := encodeCatalogue(cat.Images), encodeCatalogue(p.imageList()); !bytes.Equal(a, b) {
		c.found("pool.catalogue", "", catalogueOff(cat.Generation), "lists %d images that are not the %d of the owner", len(cat.Images), len(p.images))
	}
	return nil
}

// checkIndex compares the database with memory.
func (c *checker) checkIndex(context.Context) error {
	p := c.p
	have, err := p.index.load(p.region.Size())
	if err != nil {
		c.found("pool.index", "", 0, "%v", err)
		return nil
	}
	if have.id != p.header.id || have.gen < p.header.generation || have.gen > p.header.generation+1 {
		c.found("pool.index", "", 0, "pool %x generation %d, the header says %x, %d", have.id, have.gen, p.header.id, p.header.generation)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	refs := map[*extent]int{}
	images := map[*extent]int{}
	for key, m := range p.images {
		if encA, encB := encodeCatalogue([]Image{m.Image}), encodeCatalogue([]Image{have.images[key]}); !bytes.Equal(encA, encB) {
			c.found("pool.index", key, m.Off, "image is stored as %+v", have.images[key])
		}
		c.sameList(key, m.used, have.used[key])
		for _, e := range m.used {
			refs[e]++
			images[e]++
		}
	}
	for key, held := range p.layers {
		c.sameList(key, held, have.layers[key])
		for _, e := range held {
			refs[e]++
		}
	}
	if len(have.images) != len(p.images) || len(have.layers) != len(p.layers) {
		c.found("pool.index", "", 0, "%d images and %d layers are stored, %d and %d are known", len(have.images), len(have.layers), len(p.images), len(p.layers))
	}
	for _, e := range p.extents {
		// Batches and puts in progress hold extents too.
		if e.refs < refs[e] || e.refs == 0 || e.images != images[e] {
			c.found("pool.refs", "", e.off, "extent has %d references, %d of images; its holders are %d and %d", e.refs, e.images, refs[e], images[e])
		}
	}
	return nil
}

func (c *checker) sameList(key string, es []*extent, stored []extentID) {
	if !slices.Equal(ids(es), stored) {
		c.found("pool.index", key, 0, "holds %d extents, stored are %d others", len(es), len(stored))
		return
	}
	for _, e := range es {
		if c.p.extents[e.off] != e {
			c.found("pool.refs", key, e.off, "holds an extent that is free")
		}
	}
}

// checkSpace proves that segments, extents and gaps cover the pool, each byte once.
func (c *checker) checkSpace(context.Context) error {
	p := c.p
	p.mu.Lock()
	defer p.mu.Unlock()
	spans := p.space.Gaps()
	for _, e := range p.extents {
		spans = append(spans, e.span())
	}
	for _, s := range p.space.Segments() {
		spans = append(spans, s)
		known := slices.ContainsFunc(slices.Collect(maps.Values(p.images)), func(m *image) bool { return m.Off == s.Off && m.Seg == s.Len })
		if !known && len(p.adding) == 0 {
			c.found("pool.leak", "", s.Off, "segment of %d bytes of no image", s.Len)
		}
	}
	slices.SortFunc(spans, func(a, b alloc.Span) int { return int(min(1, max(-1, a.Off-b.Off))) })
	at := int64(headArea)
	for _, s := range spans {
		switch {
		case s.Off < at:
			c.found("pool.overlap", "", s.Off, "%d bytes overlap what ends at %d", s.Len, at)
		case s.Off > at && p.freeing == 0:
			c.found("pool.leak", "", at, "%d bytes are neither used nor free", s.Off-at)
		}
		at = max(at, s.End())
	}
	if at != p.region.Size() && p.freeing == 0 {
		c.found("pool.leak", "", at, "the pool ends at %d", p.region.Size())
	}
	return nil
}

// checkExtents reads the contents of all extents that layers and images hold.
func (c *checker) checkExtents(ctx context.Context) error {
	p := c.p
	var all []*extent
	p.mu.Lock()
	for _, e := range p.extents {
		if e.listed && e.ready == nil {
			e.refs++
			all = append(all, e)
		}
	}
	p.mu.Unlock()
	defer p.unref(all...)
	for _, e := range byOffset(all) {
		if err := ctx.Err(); err != nil || c.stop {
			return err
		}
		if err := c.checkExtent(e); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) checkExtent(e *extent) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	h := sha256.New()
	for at := int64(0); at < e.span().Len; at += chunk {
		part := (*buf)[:min(chunk, e.span().Len-at)]
		if n, err := c.p.region.ReadAt(part, e.off+at); n < len(part) {
			return fmt.Errorf("read %d bytes at %d: %w", len(part), e.off+at, err)
		}
		body := part[:min(int64(len(part)), e.size-at)]
		_, _ = h.Write(body) // never fails
		if !isZero(part[len(body):]) {
			c.found("pool.tail", "", e.off+e.size, "the rest of the last page is not zero")
		}
	}
	if sum := [32]byte(h.Sum(nil)); sum != e.sum {
		c.found("pool.sum", "", e.off, "%d bytes have sum %x, expected %x", e.size, sum, e.sum)
	}
	return nil
}

func (c *checker) checkImages(ctx context.Context) error {
	for _, m := range c.p.imageList() {
		if err := ctx.Err(); err != nil || c.stop {
			return err
		}
		window := io.NewSectionReader(c.p.region, m.Off, m.Size)
		err := daxfs.Check(window, m.Size, func(f daxfs.Finding) bool {
			c.found("image."+string(f.Rule), m.Key, m.Off+max(0, f.Off), "%v", f)
			return !c.stop
		})
		if err != nil && !errors.Is(err, daxfs.ErrCorrupt) {
			return fmt.Errorf("image %q: %w", m.Key, err)
		}
	}
	return nil
}
