package shared

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/containerd/log"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// checkSource verifies the owner's bytes before this kernel parses them: for a pool, the superblock
// and the root directory. Images are verified one by one before they are bound.
func (m *member) checkSource(ctx context.Context, src mount.Source) error {
	if src.Key != "" { // a window
		return mount.CheckImage(ctx, src)
	}
	err := m.checkLive(m.view.cat, func(int) bool { return false })
	if err != nil {
		return fmt.Errorf("%w: pool %s: %w", mount.ErrCheck, src.Where(), err)
	}
	return nil
}

// checkImage verifies the metadata of an image, once.
func (m *member) checkImage(img pool.Image) error {
	id := idOf(img)
	if _, ok := m.checked[id]; ok {
		return nil
	}
	if err := m.checkLive(m.view.cat, func(slot int) bool { return slot == img.Slot }); err != nil {
		return fmt.Errorf("%w: image %q at slot %d: %w", mount.ErrCheck, img.Key, img.Slot, err)
	}
	tree, err := m.metadata(img)
	if err != nil {
		return fmt.Errorf("%w: image %q at slot %d: %w", mount.ErrCheck, img.Key, img.Slot, err)
	}
	m.checked[id] = tree
	return nil
}

func (m *member) checkLive(cat *pool.Catalogue, slots func(int) bool) error {
	o := daxfs.LiveCheckOptions{OneInode: cat.DAX, Slots: slots}
	return daxfs.CheckLive(io.NewSectionReader(m.mem, 0, cat.Size), cat.Size, o,
		func(daxfs.Finding) bool { return false })
}

// metadata returns the blocks with the metadata of an image: those read by a walk over all of it.
func (m *member) metadata(img pool.Image) ([]mount.Range, error) {
	size := m.view.cat.Size
	r := &recorder{r: daxfs.NewReadCache(io.NewSectionReader(m.mem, 0, size), size), blocks: map[int64]bool{}}
	live, err := daxfs.OpenLive(r, size)
	if err != nil {
		return nil, err
	}
	fs, err := live.Image(img.Slot)
	if err != nil {
		return nil, err
	}
	clear(r.blocks) // the superblock and the root directory never change
	err = fs.Walk(func(_ string, in daxfs.Inode) error {
		_, err := in.Xattrs()
		if err == nil && in.IsSymlink() {
			_, err = in.Target()
		}
		return err
	})
	return r.ranges(), err
}

// recorder records which blocks are read.
type recorder struct {
	r io.ReaderAt

	mu     sync.Mutex
	blocks map[int64]bool
}

func (r *recorder) ReadAt(p []byte, off int64) (int, error) {
	r.mu.Lock()
	for b := off / daxfs.BlockSize; b*daxfs.BlockSize < off+int64(len(p)); b++ {
		r.blocks[b] = true
	}
	r.mu.Unlock()
	return r.r.ReadAt(p, off)
}

// ranges returns the recorded blocks as ranges.
func (r *recorder) ranges() []mount.Range {
	var list []int64
	for b := range r.blocks {
		list = append(list, b)
	}
	slices.Sort(list)
	var out []mount.Range
	for _, b := range list {
		at := b * daxfs.BlockSize
		if n := len(out); n > 0 && out[n-1].End == at {
			out[n-1].End = at + daxfs.BlockSize
			continue
		}
		out = append(out, mount.Range{Off: at, End: at + daxfs.BlockSize})
	}
	return out
}

func (m *member) warn(ctx context.Context) mount.Warning {
	return func(format string, args ...any) { log.G(ctx).WithField("pool", m.src.Name).Warnf(format, args...) }
}
