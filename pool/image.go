package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// image is an image and what it holds. pins is guarded by Pool.mu.
type image struct {
	Image
	used    []*extent
	pins    int
	leaving bool // being removed
}

// AddImage makes the image key of a tree whose files' contents are in this pool: every Data is one that Put returned and
// that a layer, an image or an open batch holds. When it returns, the image is durable and in the catalogue, and holds
// the contents by itself. If there is such an image already it is returned as it is, whatever the tree.
//
// Errors: ErrFull, with nothing added; ErrNotFound if contents are not in the pool; ErrInvalid; those of daxfs.NewPlan.
func (p *Pool) AddImage(ctx context.Context, key string, root *daxfs.Node, opt daxfs.Options) (Image, error) {
	if err := checkKey(key); err != nil {
		return Image{}, fmt.Errorf("pool: image: %w", err)
	}
	m, done, err := p.startAdding(ctx, key)
	if err != nil || done == nil {
		return m, err
	}
	defer done()
	m, err = p.addImage(ctx, key, root, opt)
	if err != nil {
		return Image{}, fmt.Errorf("pool: image %q: %w", key, err)
	}
	return m, nil
}

// startAdding returns the image if there is one, waiting for another call that adds it. Else the caller adds it, and
// calls done.
func (p *Pool) startAdding(ctx context.Context, key string) (m Image, done func(), err error) {
	for {
		p.mu.Lock()
		if have := p.images[key]; have != nil {
			leaving := have.leaving
			p.mu.Unlock()
			if err := p.republish(); err != nil || !leaving {
				return have.Image, nil, err
			}
			continue // republish has waited until it had left, or stayed
		}
		other, busy := p.adding[key]
		if !busy {
			mine := make(chan struct{})
			p.adding[key] = mine
			p.mu.Unlock()
			return Image{}, func() {
				p.mu.Lock()
				delete(p.adding, key)
				p.mu.Unlock()
				close(mine)
			}, nil
		}
		p.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return Image{}, nil, ctx.Err()
		}
	}
}

func (p *Pool) addImage(ctx context.Context, key string, root *daxfs.Node, opt daxfs.Options) (Image, error) {
	plan, err := daxfs.NewPlan(root, opt)
	if err != nil {
		return Image{}, err
	}
	used, err := p.hold(root)
	if err != nil {
		return Image{}, err
	}
	m := Image{Key: key, Seg: roundUp(daxfs.BlockSize + plan.MetaSize()), UUID: plan.UUID(), Created: time.Now().UTC()}
	if m.Off, err = p.newSegment(m.Seg); err != nil {
		p.unref(used...)
		return Image{}, err
	}
	m.Size = windowSize(m, used)
	added := false
	if err = p.writeSegment(ctx, plan, m); err == nil {
		added, err = p.commitImage(ctx, m, used)
	}
	if !added {
		p.freeSegment(m)
		p.unref(used...)
	}
	return m, err
}

// windowSize ends a window at the first multiple of 2 MiB after its metadata and its highest extent. The pool's size is
// such a multiple, so there always is one.
func windowSize(m Image, used []*extent) int64 {
	end := m.Off + m.Seg
	for _, e := range used {
		end = max(end, e.span().End())
	}
	return roundUp(end) - m.Off
}

func roundUp(n int64) int64 { return (n + alloc.Align - 1) &^ (alloc.Align - 1) }

// hold references the extents of all files of a tree.
func (p *Pool) hold(root *daxfs.Node) ([]*extent, error) {
	seen := map[*extent]bool{}
	p.mu.Lock()
	err := p.holdTree(root, seen)
	p.mu.Unlock()
	used := make([]*extent, 0, len(seen))
	for e := range seen {
		used = append(used, e)
	}
	if err != nil {
		p.unref(used...)
		return nil, err
	}
	return byOffset(used), nil
}

// holdTree adds the extents below n to seen. Preconditions: mu is held; n has no loops, as daxfs.NewPlan has checked.
func (p *Pool) holdTree(n *daxfs.Node, seen map[*extent]bool) error {
	if n.Mode&unix.S_IFMT == unix.S_IFREG && n.Data.Size > 0 {
		d := n.Data
		e := p.extents[d.Off]
		if e == nil || e.size != d.Size || e.sum != d.Sum || !e.listed {
			return fmt.Errorf("contents of %d bytes at %d, sum %x: %w", d.Size, d.Off, d.Sum, ErrNotFound)
		}
		if !seen[e] {
			seen[e] = true
			e.refs++
		}
	}
	for name, kid := range n.Entries {
		if err := p.holdTree(kid, seen); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
	}
	return nil
}

func (p *Pool) newSegment(n int64) (int64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0, fmt.Errorf("pool: %w", ErrClosed)
	}
	off, ok := p.space.Segment(n)
	if !ok {
		free, _ := p.space.Free()
		return 0, &FullError{What: "metadata segment", Need: n, Have: p.space.SegmentRoom(), Free: free + p.space.SegmentFree()}
	}
	return off, nil
}

// freeSegment frees what newSegment took, unless the index may list it.
func (p *Pool) freeSegment(m Image) {
	if p.index.unknown() != nil {
		return
	}
	p.punch(alloc.Span{Off: m.Off, Len: m.Seg})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.space.FreeSegment(m.Off, m.Seg)
}

// writeSegment writes the metadata of an image into its segment, durably. What the plan does not write is zero.
func (p *Pool) writeSegment(ctx context.Context, plan *daxfs.Plan, m Image) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := plan.Place(daxfs.Placement{Image: m.Off, Meta: m.Off + daxfs.BlockSize, End: m.Off + m.Size}); err != nil {
		return err
	}
	if err := p.region.Punch(m.Off, m.Seg); err != nil {
		return fmt.Errorf("clear the segment: %w", err)
	}
	if err := plan.WriteTo(segment{p, m}); err != nil {
		return err
	}
	if err := p.region.Sync(m.Off, m.Seg); err != nil {
		return fmt.Errorf("sync the segment: %w", err)
	}
	return nil
}

// segment writes into one segment, at offsets relative to it, and nowhere else.
type segment struct {
	p *Pool
	m Image
}

func (s segment) WriteAt(b []byte, off int64) (int, error) {
	if off < 0 || int64(len(b)) > s.m.Seg || off > s.m.Seg-int64(len(b)) {
		return 0, fmt.Errorf("write of %d bytes at %d of a segment of %d: %w", len(b), off, s.m.Seg, io.ErrShortWrite)
	}
	if err := s.p.write(b, s.m.Off+off); err != nil {
		return 0, err
	}
	return len(b), nil
}

// commitImage records an image whose bytes are durable, then publishes it: a reader never sees one that the index does
// not hold. added tells whether it is an image now, which it may be in spite of an error.
func (p *Pool) commitImage(ctx context.Context, m Image, used []*extent) (added bool, err error) {
	p.commit.Lock()
	defer p.commit.Unlock()
	if err := ctx.Err(); err != nil {
		return false, err
	}
	images := p.imageList()
	if len(images) >= maxImages {
		return false, &FullError{What: "catalogue entry", Need: entrySize}
	}
	if err := p.sync(used); err != nil {
		return false, err
	}
	gen := p.header.generation + 1
	if err := p.index.putImage(&m, ids(used), gen); err != nil {
		return false, err
	}
	if err = p.publish(gen, append(images, m)); err != nil {
		rerr := p.retract(gen, images, m.Key)
		if rerr == nil {
			return false, err
		}
		// It may be visible to readers and can not be hidden again: then it is an image, and its bytes must stay.
		err = errors.Join(err, rerr)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.images[m.Key] = &image{Image: m, used: used}
	for _, e := range used {
		e.images++
	}
	return true, err
}

// retract undoes a publication that failed halfway: readers may see it or not. Preconditions: commit is held.
func (p *Pool) retract(gen uint64, images []Image, key string) error {
	if err := p.publish(gen, images); err != nil {
		return err
	}
	return p.index.removeImage(key)
}

// republish writes the catalogue again if it is behind the index.
func (p *Pool) republish() error {
	p.commit.Lock()
	defer p.commit.Unlock()
	if !p.stale {
		return nil
	}
	gen := p.header.generation + 1
	if err := p.index.setGeneration(gen); err != nil {
		return err
	}
	return p.publish(gen, p.imageList())
}

// publish is writeCatalogue that remembers whether it failed. Preconditions: commit is held.
func (p *Pool) publish(gen uint64, images []Image) error {
	err := p.writeCatalogue(gen, images)
	p.stale = err != nil
	return err
}

// Image returns an image. Errors: ErrNotFound.
func (p *Pool) Image(key string) (Image, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m := p.images[key]; m != nil {
		return m.Image, nil
	}
	return Image{}, fmt.Errorf("pool: image %q: %w", key, ErrNotFound)
}

// Images returns all images, by offset.
func (p *Pool) Images() []Image { return p.imageList() }

func (p *Pool) imageList() []Image {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]Image, 0, len(p.images))
	for _, m := range p.images {
		out = append(out, m.Image)
	}
	slices.SortFunc(out, func(a, b Image) int { return cmp.Compare(a.Off, b.Off) })
	return out
}

// Pin keeps an image from being removed until unpin is called, by this process: RemoveImage returns ErrBusy. What is
// mounted should be pinned, also when a mount of an earlier process is adopted. Errors: ErrNotFound.
func (p *Pool) Pin(key string) (m Image, unpin func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := p.images[key]
	if i == nil || i.leaving {
		return Image{}, nil, fmt.Errorf("pool: image %q: %w", key, ErrNotFound)
	}
	i.pins++
	once := false
	return i.Image, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if !once {
			once = true
			i.pins--
		}
	}, nil
}

// RemoveImage removes an image and frees its segment and the extents that nothing else holds. Preconditions: it is not
// mounted, here or elsewhere; its bytes are gone when RemoveImage returns. Errors: ErrNotFound, ErrBusy if it is pinned;
// after any other error the image is as it was.
func (p *Pool) RemoveImage(ctx context.Context, key string) error {
	p.commit.Lock()
	defer p.commit.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	m, err := p.takeImage(key)
	if err == nil {
		err = p.forgetImage(key)
	}
	p.mu.Lock()
	switch {
	case err == nil:
		delete(p.images, key)
		for _, e := range m.used {
			e.images--
		}
	case m != nil:
		m.leaving = false
	}
	p.mu.Unlock()
	if err != nil {
		return fmt.Errorf("pool: image %q: %w", key, err)
	}
	p.freeSegment(m.Image)
	p.unref(m.used...)
	return nil
}

// takeImage marks an image as leaving: it can not be pinned any more.
func (p *Pool) takeImage(key string) (*image, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.images[key]
	switch {
	case p.closed:
		return nil, fmt.Errorf("pool: %w", ErrClosed)
	case m == nil:
		return nil, ErrNotFound
	case m.pins > 0:
		return nil, fmt.Errorf("pinned %d times: %w", m.pins, ErrBusy)
	}
	m.leaving = true
	return m, nil
}

// forgetImage takes an image out of the catalogue and then out of the index: a reader never sees one that the index
// does not hold. Preconditions: commit is held.
func (p *Pool) forgetImage(key string) error {
	gen := p.header.generation + 1
	if err := p.index.setGeneration(gen); err != nil {
		return err
	}
	rest := slices.DeleteFunc(p.imageList(), func(m Image) bool { return m.Key == key })
	if err := p.publish(gen, rest); err != nil {
		return err
	}
	if err := p.index.removeImage(key); err != nil {
		p.stale = true // the catalogue lacks an image that there is
		return err
	}
	return nil
}
