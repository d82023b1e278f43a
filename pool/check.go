package pool

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// Finding is one defect that Check found. Rules of the live tree are those of daxfs.CheckLive with the
// prefix "live.", rules of windows those of daxfs.Check with "window.".
type Finding struct {
	Rule string `json:"rule"`          // such as "pool.overlap"
	Key  string `json:"key,omitempty"` // image or layer
	Off  int64  `json:"offset"`        // in the pool
	Msg  string `json:"message"`
	// Known says that Scrub found it before: nobody gets these contents any more.
	Known bool `json:"known,omitempty"`
}

// String returns the finding in one line.
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
	bad    map[string]bool // images with damaged metadata; "" stands for all
}

func (c *checker) found(rule, key string, off int64, format string, args ...any) {
	c.finding(Finding{Rule: rule, Key: key, Off: off, Msg: fmt.Sprintf(format, args...)})
}

func (c *checker) finding(f Finding) {
	if !c.stop {
		c.stop = !c.report(f)
	}
}

// Check compares everything that is stored twice: the header copies; slot table and slots with the
// index; the index with memory; extents, runs and segments with the allocator; the bytes of every
// extent with its digest, and the rest of its last page with zero; the live tree by daxfs.CheckLive;
// every window by daxfs.Check. It reads the whole pool and changes nothing; adding and removing wait
// for it. report returns false to stop.
//
// Rules: pool.header, pool.slot, pool.catalogue, pool.index, pool.refs, pool.overlap, pool.leak,
// pool.sum, pool.tail, pool.inode (an inode differs from the index), pool.image (an image does not
// show the tree that was added), pool.document (a document differs from the one that was set), live.*
// and window.*. The error is that of a check that could not be made.
func (p *Pool) Check(ctx context.Context, report func(Finding) bool) error {
	p.commit.Lock()
	defer p.commit.Unlock()
	if err := p.index.unknown(); err != nil {
		return fmt.Errorf("pool: check: index %q: %w", p.index.path, err)
	}
	c := &checker{p: p, report: report, bad: map[string]bool{}}
	steps := []func(context.Context) error{
		c.checkCatalogue, c.checkIndex, c.checkDocuments, c.checkSpace, c.checkExtents, c.checkLive,
		c.checkInodes, c.checkImages,
		c.checkWindows,
	}
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
	if got, want := hs[0].encode(), p.header.encode(); !bytes.Equal(got, want) {
		c.found("pool.header", "", headerOff(hs[0].generation), "%+v, expected %+v", *hs[0], p.header)
	}
	if g := p.header.generation; g > 1 && (len(hs) < 2 || hs[1].generation != g-1) {
		c.found("pool.header", "", headerOff(g-1), "the copy of generation %d is not valid", g-1)
	}
	slot := make([]byte, daxfs.SlotSize)
	for _, m := range p.images {
		at := p.header.geo.SlotOff(m.Slot)
		if n, err := p.region.ReadAt(slot, at); n < len(slot) {
			return fmt.Errorf("read slot %d: %w", m.Slot, err)
		}
		if p.stale[m.Slot] == nil && !bytes.Equal(slot, m.slot) {
			c.found("pool.slot", m.Key, at, "slot %d holds %x, expected %x", m.Slot, slot, m.slot)
		}
	}
	want := make([]byte, int64(p.header.geo.Slots)*entrySize)
	for _, m := range p.images {
		if p.stale[m.Slot] == nil { // otherwise writing it failed, and the next change publishes it
			copy(want[m.Slot*entrySize:], p.entry(m))
		}
	}
	got := make([]byte, len(want))
	if n, err := p.region.ReadAt(got, tableOff); n < len(got) {
		return fmt.Errorf("read the slot table: %w", err)
	}
	for i := range p.header.geo.Slots {
		a, b := got[i*entrySize:][:entrySize], want[i*entrySize:][:entrySize]
		_, waits := p.erase[i]
		if !bytes.Equal(a, b) && p.stale[i] == nil && !waits {
			c.found("pool.catalogue", "", entryOff(i), "entry of slot %d is %x, expected %x", i, a[:64], b[:64])
		}
	}
	return nil
}

func (c *checker) checkIndex(context.Context) error {
	p := c.p
	have, err := p.index.load(p.region.Size())
	if err != nil {
		c.found("pool.index", "", 0, "%v", err)
		return nil
	}
	if have.id != p.header.id || have.gen+1 < p.header.generation || have.gen > p.header.generation+1 ||
		have.uuid != p.header.geo.UUID {
		c.found("pool.index", "", 0, "pool %x generation %d epoch %x, the header says %x, %d, %x", have.id,
			have.gen, have.uuid,
			p.header.id, p.header.generation, p.header.geo.UUID)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	refs, images := map[*extent]int32{}, map[*extent]int32{}
	for key, m := range p.images {
		if stored := have.images[key]; stored == nil || !bytes.Equal(stored.encode(), m.encode()) {
			c.found("pool.index", key, 0, "image is stored as %+v", stored)
		}
		c.sameList(key, m.used, have.used[key])
		for _, e := range m.used {
			refs[e]++
			images[e]++
		}
		if m.doc != nil {
			refs[m.doc]++
		}
	}
	for key, held := range p.layers {
		c.sameList(key, held, have.layers[key])
		for _, e := range held {
			refs[e]++
		}
	}
	if len(have.images) != len(p.images) || len(have.layers) != len(p.layers) {
		c.found("pool.index", "", 0, "%d images and %d layers are stored, %d and %d are known", len(have.images),
			len(have.layers), len(p.images), len(p.layers))
	}
	inodes := 0
	for _, list := range have.runs {
		inodes += len(list)
	}
	known := p.empty.inodeCount()
	for _, e := range p.extents {
		known += e.inodeCount()
		// Batches and puts in progress hold extents too.
		if e.refs < refs[e] || (e.refs == 0) != (e.died != 0) || e.images != images[e] || e.died != 0 &&
			!e.hasInodes() {
			c.found("pool.refs", "", e.off,
				"extent has %d references, %d of images, %d inodes and died at %d; its holders are %d and %d",
				e.refs, e.images, e.inodeCount(), e.died, refs[e], images[e])
		}
	}
	if inodes != known {
		c.found("pool.index", "", 0, "%d inodes are stored, %d are known", inodes, known)
	}
	return nil
}

func (c *checker) sameList(key string, es []*extent, stored []extentID) {
	if !slices.EqualFunc(es, stored, func(e *extent, id extentID) bool { return e.extentID == id }) {
		c.found("pool.index", key, 0, "holds %d extents, stored are %d others", len(es), len(stored))
		return
	}
	for _, e := range es {
		if c.p.extents[e.off] != e {
			c.found("pool.refs", key, e.off, "holds an extent that is free")
		}
	}
}

// checkSpace proves that tree area, segments, extents and gaps cover each byte of the pool once.
func (c *checker) checkSpace(context.Context) error {
	p := c.p
	p.mu.Lock()
	defer p.mu.Unlock()
	low := p.header.lowStart()
	spans := p.space.Gaps()
	for _, e := range p.extents {
		spans = append(spans, e.span())
	}
	for _, t := range p.tree.chunks {
		if at := max(t.Off, low); at < t.End() {
			spans = append(spans, alloc.Span{Off: at, Len: t.End() - at})
		}
	}
	for _, m := range p.images {
		if m.Segment > 0 {
			spans = append(spans, alloc.Span{Off: m.Window, Len: m.Segment})
		}
	}
	slices.SortFunc(spans, func(a, b alloc.Span) int { return cmp.Compare(a.Off, b.Off) })
	at := low
	for _, s := range spans {
		switch {
		case s.Off < at:
			c.found("pool.overlap", "", s.Off, "%d bytes overlap what ends at %d", s.Len, at)
		case s.Off > at && p.freeing == 0 && len(p.erase) == 0:
			c.found("pool.leak", "", at, "%d bytes are neither used nor free", s.Off-at)
		}
		at = max(at, s.End())
	}
	if at != p.region.Size() && p.freeing == 0 {
		c.found("pool.leak", "", at, "the pool ends at %d", p.region.Size())
	}
	return nil
}

// checkExtents reads all extents that readers may hold or get.
func (c *checker) checkExtents(ctx context.Context) error {
	for _, e := range c.p.readable() {
		if err := ctx.Err(); err != nil || c.stop {
			return err
		}
		got, err := c.p.read(ctx, e)
		if err != nil {
			return err
		}
		c.p.mu.Lock()
		freed, known := c.p.extents[e.off] != e, e.damaged
		c.p.mu.Unlock()
		if freed {
			continue
		}
		if got.tail {
			c.finding(Finding{
				Rule: "pool.tail", Off: e.off + e.size, Known: known, Msg: "the rest of the last page is not zero",
			})
		}
		if got.sum != e.sum {
			rule := "pool.sum"
			if e.document {
				rule = "pool.document"
			}
			c.finding(Finding{
				Rule: rule, Off: e.off, Known: known,
				Msg: fmt.Sprintf("%d bytes have sum %x, expected %x", e.size, got.sum, e.sum),
			})
		}
	}
	return nil
}

// ofFormat tells whether an error is about the bytes, not about reading them. Unsupported bytes are
// damage, too: the pool wrote them.
func ofFormat(err error) bool {
	return errors.Is(err, daxfs.ErrCorrupt) || errors.Is(err, daxfs.ErrUnsupported)
}

// checkLive checks the live tree without slots that wait to be published or erased.
func (c *checker) checkLive(ctx context.Context) error {
	p := c.p
	names := map[string]string{}
	for _, m := range p.images {
		names["/"+m.Name()] = m.Key
	}
	opts := daxfs.LiveCheckOptions{OneInode: p.header.dax, Slots: func(i int) bool {
		_, waits := p.erase[i]
		return ctx.Err() == nil && p.stale[i] == nil && !waits
	}}
	opts.SkipTails = true // checkExtents has read all tails
	err := daxfs.CheckLive(p.region, p.header.size, opts, func(f daxfs.Finding) bool {
		slot, _, _ := strings.Cut(strings.TrimPrefix(f.Path, "/"), "/")
		c.bad[names["/"+slot]] = true
		c.found("live."+string(f.Rule), names["/"+slot], max(0, f.Off), "%v", f)
		return !c.stop
	})
	switch {
	case err == nil:
	case !ofFormat(err):
		return fmt.Errorf("live tree: %w", err)
	case len(c.bad) == 0:
		c.bad[""] = true
		c.found("live."+string(daxfs.RuleLiveSuper), "", 0, "%v", err)
	}
	return ctx.Err()
}

// checkInodes compares the inodes in the index with the live tree. It finds two files at one address,
// and a file with the contents of another.
func (c *checker) checkInodes(ctx context.Context) error {
	p := c.p
	live, err := daxfs.OpenLive(p.region, p.header.size)
	if err != nil {
		c.found("pool.inode", "", 0, "%v", err)
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := map[uint64]int64{}
	for _, e := range p.extents {
		for in := range e.inodes() {
			if other, ok := seen[in.nid]; ok {
				c.found("pool.inode", "", e.off, "inode %d is that of contents at %d, too", in.nid, other)
			}
			seen[in.nid] = e.off
			if e.erased {
				continue
			}
			have, err := live.FS().Inode(in.nid)
			if err != nil {
				c.found("pool.inode", "", p.header.geo.NidOff(in.nid), "%v", err)
			} else if off, n, ok := have.Data(); !ok || off != e.off || n != e.size {
				c.found("pool.inode", "", p.header.geo.NidOff(in.nid), "inode %d has %d bytes at %d, expected %d at %d",
					in.nid, n, off, e.size, e.off)
			}
		}
	}
	return ctx.Err()
}

func (c *checker) checkWindows(ctx context.Context) error {
	for _, m := range c.p.Images() {
		if err := ctx.Err(); err != nil || c.stop {
			return err
		}
		if m.Segment == 0 {
			continue
		}
		section := io.NewSectionReader(c.p.region, m.Window, m.WindowSize)
		sound := true
		err := daxfs.Check(section, m.WindowSize, func(f daxfs.Finding) bool {
			sound = false
			c.found("window."+string(f.Rule), m.Key, m.Window+max(0, f.Off), "%v", f)
			return !c.stop
		})
		if err != nil && !ofFormat(err) {
			return fmt.Errorf("window of image %q: %w", m.Key, err)
		}
		if sound {
			img, err := daxfs.Open(section, m.WindowSize)
			c.shows(m, m.Window, img, err)
		}
	}
	return nil
}
