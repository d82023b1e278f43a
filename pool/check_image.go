package pool

import (
	"context"
	"fmt"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// checkImages proves that every image shows the tree that was added: its UUID depends on everything
// that a reader can see. The format rules alone cannot prove it, because they leave times, owners and
// attributes free. Images with other findings are skipped: walking their metadata is not safe.
func (c *checker) checkImages(ctx context.Context) error {
	live, err := daxfs.OpenLive(c.p.region, c.p.header.size)
	if err != nil {
		return nil //nolint:nilerr // checkLive reports it
	}
	for _, m := range c.p.Images() {
		if err := ctx.Err(); err != nil || c.stop {
			return err
		}
		if c.bad[""] || c.bad[m.Key] || c.p.stale[m.Slot] != nil {
			continue
		}
		img, err := live.Image(m.Slot)
		c.shows(m, 0, img, err)
	}
	return nil
}

// shows compares an image, in the live tree or in its window at base, with the tree that was added.
// err is the error of opening the image.
func (c *checker) shows(m Image, base int64, img *daxfs.FS, err error) {
	uuid := [16]byte{}
	if err == nil {
		uuid, err = c.p.treeUUID(img, base)
	}
	if err == nil && uuid != m.UUID {
		err = fmt.Errorf("it shows a tree with UUID %x, expected %x", uuid, m.UUID)
	}
	if err != nil {
		c.found("pool.image", m.Key, max(base, c.p.header.geo.SlotOff(m.Slot)), "%v", err)
	}
}

// treeUUID computes the UUID of the tree that an image at base shows, with the digests from the index.
func (p *Pool) treeUUID(img *daxfs.FS, base int64) ([16]byte, error) {
	return daxfs.TreeUUID(img, func(in daxfs.Inode) (daxfs.Data, error) {
		off, size, ok := in.Data()
		if !ok {
			return daxfs.Data{}, nil
		}
		off += base
		p.mu.Lock()
		defer p.mu.Unlock()
		e := p.extents[off]
		if e == nil || e.size != size {
			return daxfs.Data{},
				fmt.Errorf("inode %d has %d bytes at %d, where no contents of that size are", in.Nid, size, off)
		}
		return daxfs.Data{Off: off, Size: size, Sum: e.sum}, nil
	})
}
