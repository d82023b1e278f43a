package store

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/containerd/log"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// batchSize is how many extents are asked about at a time.
const batchSize = 512

// reclaim frees the contents that nothing holds and that nobody can read any more.
//
// Overlays of snapshots are dead when their image is removed: the snapshotter asked the kernel. So
// only files that are open now can still be read, and the kernel is asked about those. Foreign mounts
// may live on detached, with a process inside; once there was one in an epoch, contents wait until the
// kernel has dropped their inodes.
func (s *Store) reclaim(ctx context.Context) error {
	dead := s.pool.Dead()
	if len(dead) == 0 {
		return nil
	}
	s.epoch.RLock()
	defer s.epoch.RUnlock()
	s.mu.Lock()
	evicted, stray := s.records.loose, s.records.stray
	s.mu.Unlock()
	if stray {
		log.G(ctx).Debug("contents without a holder wait: an earlier mount of the pool may still be in use")
		return nil
	}
	for len(dead) > 0 {
		n := min(len(dead), batchSize)
		_, err := Free(ctx, s.pool, s.table, dead[:n], evicted)
		if errors.Is(err, mount.ErrNotFound) {
			return nil // the pool is not mounted: see turn
		}
		if errors.Is(err, mount.ErrBusy) {
			log.G(ctx).WithError(err).Debug("contents without a holder wait")
			return nil
		}
		if err != nil {
			return fmt.Errorf("free contents without a holder: %w", err)
		}
		dead = dead[n:]
	}
	return nil
}

// Free frees those of dead that nobody can read any more, and returns their number. The order is:
// erase the inodes, ask the kernel who has them, and only then free the space. With evicted, contents
// wait until the kernel has dropped their inodes.
//
// Preconditions: the images of dead are removed from p and unmounted, and overlays over them are dead.
// p is mounted by t (else mount.ErrNotFound) and by nobody else on this machine (else mount.ErrBusy).
func Free(ctx context.Context, p *pool.Pool, t *mount.Table, dead []pool.Dead, evicted bool) (int, error) {
	var erased []pool.Dead
	extents := make([]mount.Extent, len(dead))
	index := map[int64]int{}
	for i, d := range dead {
		extents[i] = mount.Extent{Nids: d.Nids, Evicted: evicted}
		index[d.Off] = i
	}
	unused, err := t.Unused(ctx, extents, func() (err error) {
		erased, err = p.Erase(ctx, dead)
		return err
	})
	if err != nil {
		return 0, err
	}
	var free []pool.Dead
	for _, d := range erased {
		if unused[index[d.Off]] {
			free = append(free, d)
		}
	}
	return len(free), p.Free(ctx, free)
}

func (s *Store) epochName() string {
	uuid := s.pool.UUID()
	return hex.EncodeToString(uuid[:])
}

// noteLoose records that something other than overlays of snapshots used an image in this epoch.
func (s *Store) noteLoose() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.records.loose {
		return nil
	}
	if err := s.pool.SetRecord(kindLoose, s.epochName(), []byte("{}")); err != nil {
		return err
	}
	s.records.loose = true
	return nil
}

// turn frees all dead contents if nothing is mounted, and begins a new epoch of the pool if that pays
// off. It does nothing while images are added or mounted.
func (s *Store) turn(ctx context.Context) error {
	if s.keeps(ctx) || !s.epoch.TryLock() {
		return nil
	}
	defer s.epoch.Unlock()
	if u := s.pool.Usage(); u.DeadCount == 0 && u.SlotsUsed == u.Images {
		return nil // nothing to gain
	}
	idle, err := s.unmountAll(ctx)
	if err != nil || !idle {
		return err
	}
	turned, err := s.pool.NothingMounted(ctx)
	if err != nil {
		return fmt.Errorf("free contents while nothing is mounted: %w", err)
	}
	return s.turned(ctx, turned)
}

// UnmountIdle unmounts the pool if no image is mounted, to leave no device or server behind.
func (s *Store) UnmountIdle(ctx context.Context) error {
	s.epoch.Lock()
	defer s.epoch.Unlock()
	_, err := s.unmountAll(ctx)
	return err
}

// newEpoch begins a new epoch if nothing is mounted.
func (s *Store) newEpoch(ctx context.Context) error {
	s.epoch.Lock()
	defer s.epoch.Unlock()
	idle, err := s.unmountAll(ctx)
	if err == nil && !idle {
		err = fmt.Errorf("something is mounted from the pool: %w", mount.ErrBusy)
	}
	if err != nil {
		return err
	}
	if err := s.pool.NewEpoch(ctx); err != nil {
		return err
	}
	return s.turned(ctx, true)
}

// unmountAll unmounts the pool if no image is mounted, and reports whether no file system of it lives
// on this machine. One may live on if a process has a file open through a detached mount. It is out of
// reach: the next mount of the pool is another file system, which the kernel answers for separately.
// Then nothing is freed until the pool is unmounted again and the kernel says that all are gone.
//
// Preconditions: epoch is held for writing.
func (s *Store) unmountAll(ctx context.Context) (idle bool, err error) {
	if len(s.table.List()) > 0 {
		return false, nil
	}
	if err := s.table.UnmountPool(ctx); err != nil && !errors.Is(err, mount.ErrNotFound) {
		if errors.Is(err, mount.ErrBusy) {
			return false, nil
		}
		return false, err
	}
	alive, err := s.table.Alive(ctx)
	if err != nil {
		return false, err
	}
	return !alive, s.noteStray(alive)
}

func (s *Store) noteStray(stray bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.records.stray == stray {
		return nil
	}
	var value []byte
	if stray {
		value = []byte("{}")
	}
	if err := s.pool.SetRecord(kindStray, strayKey, value); err != nil {
		return err
	}
	s.records.stray = stray
	return nil
}

// turned opens the table of a new epoch. Preconditions: epoch is held for writing.
func (s *Store) turned(ctx context.Context, turned bool) error {
	if !turned {
		return nil
	}
	log.G(ctx).Info("the pool began a new epoch")
	s.mu.Lock()
	var errs []error
	if old, err := s.pool.Records(kindLoose); err != nil {
		errs = append(errs, err)
	} else {
		for name := range old {
			errs = append(errs, s.pool.SetRecord(kindLoose, name, nil))
		}
	}
	s.records.loose = false
	s.mu.Unlock()
	return errors.Join(append(errs, s.openTable(ctx))...)
}
