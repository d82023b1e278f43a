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
	// Nids are all inodes that pointed to it in this epoch.
	Nids []uint64
	// Evicted demands that the kernel has dropped the inodes, not only that nobody has a file of it open.
	// Then nobody can open them again, even through a working directory or an O_PATH descriptor in a mount
	// that nothing shows any more. That lasts until the kernel needs the memory. With DAX and FUSE it
	// always applies.
	Evicted bool
}

// Unused tells which extents nobody can read, so that their space may be reused.
//
// Unused first calls erase, which erases the inodes on disk (nil if that was done). After that an
// inode opens only if it is in memory. For each one that does, the kernel is asked whether anybody has
// it open or mapped, in any mount, mount namespace or lazily unmounted overlay. The images of the
// extents must be unmounted before, and the overlays over them must be dead.
//
// The pool must be mounted by this table (else ErrNotFound) and by nobody else on this machine (else
// ErrBusy): the kernel can be asked about one mounted file system at a time.
func (t *Table) Unused(ctx context.Context, extents []Extent, erase func() error) ([]bool, error) {
	unlock, err := t.lockPool(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	l := t.getLive()
	if l == nil {
		return nil, fmt.Errorf("find the users of dead contents: %w", ErrNotFound)
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
	if err := t.handlesWork(h, l); err != nil {
		return nil, err
	}
	if erase != nil {
		if err := erase(); err != nil {
			return nil, err
		}
	}
	// A cached old block can make an erased inode look as if it were in memory, never the opposite.
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

// handlesWork opens a bound slot, surely in memory: without handles all inodes would look unused.
func (t *Table) handlesWork(h *sys.Handles, l *live) error {
	for _, m := range t.List() {
		if d := t.byName(m.Driver); d == nil || d.Windows() {
			continue
		}
		if bound, err := l.openSlot(h, m); bound || err != nil {
			return err
		}
	}
	return nil
}

// openSlot opens the slot of m by its handle if m is a bind of it. The table may list an image that is
// none: its mount is gone and a copy of it was busy, or it is unmounted right now.
func (l *live) openSlot(h *sys.Handles, m Mounted) (bound bool, err error) {
	f, root, err := sys.HoldMountRoot(m.Dir)
	if f == nil || err != nil {
		return false, err
	}
	defer f.Close()
	if root != l.slotRoot(m.Image) {
		return false, nil
	}
	fd, err := h.Open(m.Nid, unix.O_PATH)
	if err != nil {
		return false, fmt.Errorf("slot %q, which is mounted: %w", m.Name, err)
	}
	return true, unix.Close(fd)
}

// NodeBias is added to an inode number to get a node number of the FUSE server. It is here because the
// file handle of a FUSE file holds the node number.
const NodeBias = 2

// Generation is the generation of all nodes of a FUSE server but the root: a part of the UUID of the
// pool. FUSE tells the kernel no UUID, and file handles outlive a pool: overlayfs keeps those of
// copied-up files. A handle of another epoch must be stale, not lead to another file. The result must
// never change: a server outlives its daemon, and a wrong generation would make used files look
// unused.
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

// unusedInode opens an inode that was erased on disk; that works while it is in memory.
func unusedInode(h *sys.Handles, nid uint64, evicted bool) (bool, error) {
	fd, err := h.Open(nid, unix.O_RDONLY|unix.O_NONBLOCK)
	if notInMemory(err) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	only, err := sys.OnlyUser(fd)
	if err == nil && only {
		// Nobody will read these pages again, and an inode without pages is dropped sooner. Advisory.
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
	if notInMemory(err) {
		return true, nil
	}
	if err == nil {
		unix.Close(fd)
	}
	return false, err
}

// notInMemory tells whether an erased inode did not open because it is not in memory: on disk, a
// socket has its place (ENXIO), or nothing (ESTALE).
func notInMemory(err error) bool { return errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ESTALE) }

// mountedElsewhere returns ErrBusy if the pool is mounted a second time on this machine, through
// another name of the device or file.
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

// sourceID is fileID for the source of a mount.
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
			return "" // gone meanwhile
		}
		return inodeID(st)
	}
	return fileID(region.Info{Path: source})
}
