package pool

import (
	"cmp"
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// checkImages proves that every image shows the tree that was added: its UUID is made of all that a reader can see. The
// rules of the format leave times, owners and attributes free, so they cannot tell. Images with other findings are left
// out: their metadata is not safe to walk.
func (c *checker) checkImages(ctx context.Context) error {
	live, err := daxfs.OpenLive(c.p.region, c.p.header.size)
	if err != nil {
		return nil //nolint:nilerr // checkLive has found it
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

// shows compares what an image shows in the live tree, or in its window that begins at base, with what it is to show.
// err is that of opening it.
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

// treeUUID returns the UUID of what an image shows, with the digests that the index has for its contents.
func (p *Pool) treeUUID(img *daxfs.FS, base int64) ([16]byte, error) {
	t := shown{p: p, img: img, base: base, nodes: map[uint64]*daxfs.Node{}}
	root, err := t.node(img.Root())
	if err != nil {
		return [16]byte{}, err
	}
	plan, err := daxfs.NewLivePlan(root, daxfs.Options{}, false)
	if err != nil {
		return [16]byte{}, err
	}
	return plan.UUID(), nil
}

// shown is the tree of an image as a reader sees it.
type shown struct {
	p     *Pool
	img   *daxfs.FS
	base  int64 // of the image in the pool
	nodes map[uint64]*daxfs.Node
}

func (t *shown) node(nid uint64) (*daxfs.Node, error) {
	in, err := t.img.Inode(nid)
	if err != nil {
		return nil, err
	}
	n := &daxfs.Node{Mode: in.Mode, UID: in.UID, GID: in.GID, Rdev: in.Rdev, Mtime: in.Mtime}
	t.nodes[nid] = n
	if n.Xattrs, err = in.Xattrs(); err != nil {
		return nil, err
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return n, t.entries(n, in)
	case unix.S_IFLNK:
		n.Target, err = in.Target()
		return n, err
	case unix.S_IFREG:
		n.Data, err = t.data(in)
		return n, err
	}
	return n, nil
}

func (t *shown) entries(n *daxfs.Node, dir daxfs.Inode) error {
	n.Entries = map[string]*daxfs.Node{}
	var failed error
	err := dir.Entries(0, func(e daxfs.Dirent) bool {
		kid := t.nodes[e.Nid]
		if kid != nil && kid.Mode&unix.S_IFMT == unix.S_IFDIR {
			failed = fmt.Errorf("%q leads to directory %d, which has another name", e.Name, e.Nid)
			return false
		}
		if kid == nil {
			if kid, failed = t.node(e.Nid); failed != nil {
				return false
			}
		}
		n.Entries[e.Name] = kid
		return true
	})
	if err = cmp.Or(failed, err); err != nil {
		return err
	}
	if want := daxfs.DirSize(n); dir.Size != want {
		return fmt.Errorf("directory %d has %d bytes, expected %d", dir.Nid, dir.Size, want)
	}
	return nil
}

func (t *shown) data(in daxfs.Inode) (daxfs.Data, error) {
	off, size, ok := in.Data()
	if !ok || size == 0 {
		return daxfs.Data{}, nil
	}
	t.p.mu.Lock()
	defer t.p.mu.Unlock()
	off += t.base
	e := t.p.extents[off]
	if e == nil || e.size != size {
		return daxfs.Data{}, fmt.Errorf("inode %d has %d bytes at %d, where no contents of that size are", in.Nid, size, off)
	}
	return daxfs.Data{Off: off, Size: size, Sum: e.sum}, nil
}
