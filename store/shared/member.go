package shared

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/lease"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// member is one pool of another owner.
type member struct {
	cfg     *Config
	src     Source
	readers *readers

	// mu guards all fields below. It is held while the pool is read, checked and mounted.
	mu     sync.Mutex
	mem    region.Region // nil if it is not open
	opened int           // number of times it was opened
	// fileSize is the size of the file or device when it was opened.
	fileSize int64
	view     *view        // the newest generation; nil if the pool cannot be read now
	table    *mount.Table // table of mounted; nil if there is none
	mounted  tableID
	lease    *lease.Lease // nil without a lease region
	claims   map[digest.Digest]claim
	earlier  []*earlier // former pools of this name
	// checked are the images whose metadata was verified, with the ranges of the metadata.
	checked     map[imageID][]mount.Range
	loggedError string // last complaint in the log
	loggedLost  string // last message in the log about lost images
	err         error  // result of the last refresh
}

// tableID identifies what a mount table belongs to. A reopened pool is another file, or one of another
// size: the kernel keeps using the old one.
type tableID struct {
	pool, epoch [16]byte
	opened      int
}

// imageID tells apart successive images of a slot.
type imageID struct {
	slot    int
	uuid    [16]byte
	created int64
}

func idOf(m pool.Image) imageID { return imageID{m.Slot, m.UUID, m.Created.UnixNano()} }

// refresh updates view. Preconditions: mu is held.
func (m *member) refresh(ctx context.Context) error {
	m.err = m.tryRefresh(ctx)
	if m.err != nil {
		m.view = nil
		return m.err
	}
	m.loggedError = ""
	m.logLost(ctx)
	return nil
}

func (m *member) tryRefresh(ctx context.Context) error {
	if err := m.open(); err != nil {
		return err
	}
	v, err := m.read(ctx)
	if err != nil || v == m.view {
		return err
	}
	if v.cat.PoolID == m.cfg.Own {
		return errors.Join(fmt.Errorf("it is the pool that this daemon owns: %w", ErrOwn), m.closeMemory())
	}
	if err := m.readers.take(v.cat.PoolID, m); err != nil {
		return errors.Join(err, m.closeMemory())
	}
	if err := m.openTable(ctx, v); err != nil {
		return err
	}
	if err := m.openLease(v.cat.Size); err != nil {
		return err
	}
	m.view = v
	return nil
}

// open opens the memory, or reopens it if its name now leads to another file.
func (m *member) open() error {
	if m.mem != nil && m.mem.Info().FD >= 0 && m.mem.Info().Path != "" {
		now, err := os.Stat(m.mem.Info().Path)
		if err != nil {
			return err
		}
		have, err := os.Stat(fmt.Sprintf("/proc/self/fd/%d", m.mem.Info().FD))
		if err != nil {
			return err
		}
		if !os.SameFile(now, have) || now.Size() != m.fileSize {
			if err := m.closeMemory(); err != nil {
				return err
			}
		}
	}
	if m.mem != nil {
		return nil
	}
	rc, err := region.Named(m.src.Name)
	if err != nil {
		return err
	}
	// The owner took the range, with force if the kernel does not reserve it.
	rc.ReadOnly, rc.Force = true, rc.Kind == region.KindPhys
	if m.mem, err = region.Open(rc); err != nil {
		return err
	}
	m.opened++
	if fd := m.mem.Info().FD; fd >= 0 {
		st, err := os.Stat(fmt.Sprintf("/proc/self/fd/%d", fd))
		if err != nil {
			return errors.Join(err, m.closeMemory())
		}
		m.fileSize = st.Size()
	}
	return nil
}

// openTable opens the table of the pool's epoch. It first unmounts mounts of an earlier epoch: the
// kernel would keep the old superblock and show changed bytes.
func (m *member) openTable(ctx context.Context, v *view) error {
	id := tableID{v.cat.PoolID, v.cat.Geometry.UUID, m.opened}
	if m.table != nil && m.mounted == id {
		return nil
	}
	if m.table != nil {
		if err := m.retire(ctx); err != nil {
			if id.pool == m.mounted.pool && id.epoch == m.mounted.epoch {
				return fmt.Errorf("its file is another one, or of another size: %w", err)
			}
			return fmt.Errorf("expected pool %x of epoch %x, found pool %x of epoch %x: %w", m.mounted.pool,
				m.mounted.epoch,
				id.pool, id.epoch, err)
		}
	}
	root := m.dir(v.cat.PoolID)
	if err := os.MkdirAll(root, 0o700); err != nil {
		return err
	}
	if err := m.findEarlier(); err != nil {
		return err
	}
	p := mount.Pool{Region: m.mem.Info(), Size: v.cat.Size, UUID: v.cat.Geometry.UUID}
	if err := m.replaced(ctx, p); err != nil {
		return fmt.Errorf("found pool %x of epoch %x: %w", id.pool, id.epoch, err)
	}
	t, err := mount.Open(ctx, root, m.cfg.Drivers, p, mount.Options{
		Check: m.checkSource, Adopt: m.cfg.Adopt, Warn: m.warn(ctx),
	})
	if err != nil {
		return err
	}
	if err := unmountStale(ctx, t); err != nil {
		return err
	}
	claims, err := readClaims(root)
	if err != nil {
		return err
	}
	if err := m.noteSource(id.pool); err != nil {
		return err
	}
	m.table, m.mounted, m.claims = t, id, claims
	clear(m.checked)
	m.readers.leave(m, id.pool)
	return m.findEarlier()
}

// retire unmounts everything in the table. Preconditions: mu is held.
func (m *member) retire(ctx context.Context) error {
	var errs []error
	for _, i := range m.table.List() {
		errs = append(errs, m.table.Unmount(ctx, i.Key))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w while images of it are mounted here, stop the containers that run from them: %w",
			ErrReset, err)
	}
	if err := m.table.UnmountPool(ctx); err != nil && !errors.Is(err, mount.ErrNotFound) {
		return fmt.Errorf("%w: %w", ErrReset, err)
	}
	m.table = nil
	return nil
}

// dir is the directory for the mounts of a pool.
func (m *member) dir(id [16]byte) string { return filepath.Join(m.cfg.Root, hex.EncodeToString(id[:])) }

func (m *member) closeMemory() error {
	if m.mem == nil {
		return nil
	}
	err := m.mem.Close()
	m.mem, m.view = nil, nil
	return err
}

func (m *member) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.closeMemory()
	if m.lease != nil {
		err = errors.Join(err, m.lease.Close())
	}
	return err
}

// lower mounts the image of a chain that was just claimed. Preconditions: mu has been held since.
func (m *member) lower(ctx context.Context, chain digest.Digest) (string, error) {
	img := m.claims[chain].image()
	mounted, err := m.table.Mount(ctx, mount.Image{
		Key: chain.String(), Name: img.Name(), Nid: m.view.cat.Geometry.SlotNid(img.Slot), Window: img.Window,
		WindowSize: img.WindowSize, UUID: img.UUID, Created: img.Created, Tree: m.checked[idOf(img)],
	})
	return mounted.Dir, err
}

// sweep ends the claims of unneeded chains. Preconditions: mu is held.
func (m *member) sweep(ctx context.Context, needed func(digest.Digest) bool) error {
	var errs []error
	for chain := range m.claims {
		if needed(chain) {
			continue
		}
		if m.table != nil {
			err := m.table.Unmount(ctx, chain.String())
			if err != nil && !errors.Is(err, mount.ErrNotFound) {
				if !errors.Is(err, mount.ErrBusy) {
					errs = append(errs, err)
				}
				continue
			}
		}
		errs = append(errs, m.release(chain))
	}
	if m.table != nil {
		errs = append(errs, m.sweepEarlier(needed))
	}
	if m.table != nil && len(m.table.List()) == 0 {
		if err := m.table.UnmountPool(ctx); err != nil && !errors.Is(err, mount.ErrNotFound) &&
			!errors.Is(err, mount.ErrBusy) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (m *member) status() Status {
	s := Status{Name: m.src.Name, Claimed: len(m.claims), Lease: m.src.Lease, Leased: m.lease != nil, Lost: m.lost()}
	for _, e := range m.earlier {
		s.Claimed += len(e.claims)
	}
	if m.view != nil {
		s.ID, s.Generation, s.Images = hex.EncodeToString(m.view.cat.PoolID[:]), m.view.cat.Generation,
			len(m.view.chains)
	}
	if m.table != nil {
		list := m.table.List()
		s.Mounted = len(list)
		if len(list) > 0 {
			s.Driver = list[0].Driver
		}
	}
	err := m.err
	if err == nil && m.lease != nil {
		err = m.lease.Check()
	}
	if err != nil {
		s.Error = err.Error()
	}
	return s
}
