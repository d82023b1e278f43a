package mount

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Extent is a range of contents in the pool that no image refers to any more.
type Extent struct {
	// Nids are all inodes that ever pointed to it in this epoch.
	Nids []uint64
	// Evicted asks for more than that nobody has a file of it open: the kernel must have dropped the inodes, so that
	// nobody can open them again through a working directory or an O_PATH descriptor in a mount that nothing shows
	// any more. It takes until the kernel needs the memory. With DAX, and with FUSE, it is always so.
	Evicted bool
}

// Unused tells which extents nobody can read: their space may be given to other contents. What is not unused now may
// be later.
//
// erase is called first: it erases the inodes on disk (nil if that was done). Then an inode can no longer be opened
// unless it is in memory, and the kernel is asked for each that is, whether somebody has it open or mapped, in
// whatever mount, mount namespace or lazily unmounted overlay. The images of the extents must have been unmounted
// before, and the overlays over them must be dead.
//
// The pool must be mounted by this table (else ErrNotFound) and by nobody else on this machine (else ErrBusy): the
// kernel can be asked about one mounted file system at a time.
func (t *Table) Unused(ctx context.Context, extents []Extent, erase func() error) ([]bool, error) {
	unlock, err := t.lockPool(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	l := t.getLive()
	if l == nil {
		return nil, fmt.Errorf("who uses contents of the pool: %w", ErrNotFound)
	}
	if err := t.answers(ctx, l); err != nil {
		return nil, err
	}
	if err := t.mountedElsewhere(ctx, l); err != nil {
		return nil, err
	}
	fuse := l.driver.Name() == "fuse"
	var bias uint64
	var gen uint32
	if fuse {
		bias, gen = NodeBias, Generation(t.pool.UUID)
	}
	h, err := sys.OpenHandles(l.dir, bias, gen)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	if err := t.handlesWork(h); err != nil {
		return nil, err
	}
	if erase != nil {
		if err := erase(); err != nil {
			return nil, err
		}
	}
	// Where an old block stays in a cache all the same, an erased inode opens as if it were in memory: never the
	// other way round.
	if err := l.flush(false); err != nil {
		return nil, err
	}
	if fuse {
		// The kernel drops a FUSE inode with its last name.
		if err := sys.ShrinkDentries(l.dir); err != nil {
			return nil, err
		}
	}
	out := make([]bool, len(extents))
	for i, e := range extents {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if out[i], err = unused(h, e.Nids, e.Evicted || l.dax || fuse); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// handlesWork opens a slot that is bound, which is in memory for certain. If handles did not work, all would look
// unused.
func (t *Table) handlesWork(h *sys.Handles) error {
	for _, m := range t.List() {
		if d := t.byName(m.Driver); d == nil || d.Windows() {
			continue
		}
		fd, err := h.Open(m.Nid, unix.O_PATH)
		if err != nil {
			return fmt.Errorf("slot %q, which is mounted: %w", m.Name, err)
		}
		return unix.Close(fd)
	}
	return nil
}

// NodeBias is the difference between the node number of the FUSE server and the inode number. It is here because the
// file handle of a FUSE file holds the node number.
const NodeBias = 2

// Generation is the generation of all nodes but the root of a FUSE server: a part of the UUID of what it serves. FUSE
// tells the kernel no UUID, and file handles outlive a pool: overlayfs keeps one of what it copied up. One of another
// epoch has to be stale, not another file. A server outlives its daemon, and a wrong generation would make files look
// unused, so what this returns must never change.
func Generation(uuid [16]byte) uint32 { return binary.LittleEndian.Uint32(uuid[:]) | 1 }

func unused(h *sys.Handles, nids []uint64, evicted bool) (bool, error) {
	for _, nid := range nids {
		ok, err := unusedInode(h, nid, evicted)
		if err != nil || !ok {
			return false, err
		}
	}
	return true, nil
}

// unusedInode opens an inode that was erased on disk: that works as long as it is in memory.
func unusedInode(h *sys.Handles, nid uint64, evicted bool) (bool, error) {
	fd, err := h.Open(nid, unix.O_RDONLY|unix.O_NONBLOCK)
	if gone(err) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	only, err := sys.OnlyUser(fd)
	if err == nil && only {
		// Nobody will read these pages again. An inode without pages is dropped sooner. It is only advice.
		_ = unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
	}
	unix.Close(fd)
	if err != nil {
		return false, fmt.Errorf("inode %d: %w", nid, err)
	}
	if !only || !evicted {
		return only, nil
	}
	fd, err = h.Open(nid, unix.O_RDONLY|unix.O_NONBLOCK)
	if gone(err) {
		return true, nil
	}
	if err == nil {
		unix.Close(fd)
	}
	return false, err
}

// gone tells whether opening an inode failed because it is not in memory: what is on the disk is the socket that took
// its place, or nothing.
func gone(err error) bool { return errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ESTALE) }

// mountedElsewhere returns ErrBusy if the pool is mounted a second time on this machine, by another name of the
// device or file.
func (t *Table) mountedElsewhere(ctx context.Context, l *live) error {
	mounts, err := sys.AllMounts(ctx)
	if err != nil {
		return err
	}
	mine := fileID(t.pool.Region)
	for _, m := range mounts {
		if m.Major == int(l.root.Major) && m.Minor == int(l.root.Minor) {
			continue
		}
		if mine != "" && sourceID(m.FSType, m.Source) == mine {
			return fmt.Errorf("%s is mounted a second time, on %q in %v: nothing is freed until it is unmounted: %w",
				t.pool.source(), m.Mountpoint, m.Namespace, ErrBusy)
		}
	}
	return nil
}

// sourceID is fileID of what a mount shows as its source.
func sourceID(fstype, source string) string {
	switch fstype {
	case "erofs":
	case "fuse.daxfs": // path@offset+size
		at := strings.LastIndexByte(source, '@')
		if at < 0 {
			return ""
		}
		source = source[:at]
	default:
		return ""
	}
	if !filepath.IsAbs(source) {
		return ""
	}
	if strings.HasPrefix(source, "/dev/loop") {
		st, err := sys.LoopBacking(source)
		if err != nil {
			return "" // it has gone meanwhile
		}
		return inodeID(st)
	}
	return fileID(region.Info{Path: source})
}
