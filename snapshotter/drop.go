package snapshotter

import (
	"context"
	"errors"
	"os"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	bolt "go.etcd.io/bbolt"
)

// dropDirs removes the directories of unpacked layers whose contents Lowers stores durably, so that no
// layer is on disk twice. A directory stays while its chain is incomplete, because the layers above
// may be unpacked over it, and while anything stands on it.
func (s *Snapshotter) dropDirs(ctx context.Context) error {
	if !s.opts.Durable {
		return nil
	}
	var candidates []link
	err := s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		named, err := namedDirs(ctx, tx)
		if err != nil {
			return err
		}
		all, err := all(ctx, tx)
		if err != nil {
			return err
		}
		seen := map[string]bool{}
		for name, top := range all {
			if top.info.Kind != snapshots.KindCommitted || !top.rec.Built || top.rec.Shared != "" {
				continue
			}
			for _, l := range all.chain(name) {
				if l.rec.hasDir() && l.rec.Ingested && !named[l.id] && !seen[l.id] {
					seen[l.id] = true
					candidates = append(candidates, l)
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return s.drop(ctx, candidates)
}

// drop removes the directories of layers. It updates the records first: from then on no operation
// starts to read the directories, and those that started before hold a pin.
func (s *Snapshotter) drop(ctx context.Context, candidates []link) error {
	if len(candidates) == 0 {
		return nil
	}
	var stored []link
	var unpins []func()
	var errs []error
	for _, l := range candidates {
		unpins = append(unpins, s.pins.pin(s.dirKey(l.id)))
		ns, _ := splitName(l.info.Name)
		// The layer may have been evicted since it was stored.
		if err := s.lowers.AddDir(ctx, ns, s.dirKey(l.id), s.upper(l.id)); err != nil {
			errs = append(errs, s.unlessGone(ctx, l.info.Name, err))
			continue
		}
		stored = append(stored, l)
	}
	err := s.st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		named, err := namedDirs(ctx, tx)
		if err != nil {
			return err
		}
		for _, l := range stored {
			id, _, _, err := storage.GetInfo(ctx, l.info.Name)
			if err != nil || id != l.id || named[l.id] {
				continue // it was removed, or something stands on it by now
			}
			rec, err := getRecord(tx, l.id)
			if err != nil {
				return err
			}
			rec.Dropped = true
			if err := putRecord(tx, l.id, rec); err != nil {
				return err
			}
		}
		return nil
	})
	for _, unpin := range unpins {
		unpin()
	}
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, l := range stored {
		errs = append(errs, s.removeDropped(ctx, l.info.Name))
	}
	return errors.Join(errs...)
}

// removeDropped removes the rest of the directory of a committed snapshot that no longer needs it.
func (s *Snapshotter) removeDropped(ctx context.Context, name string) error {
	id, info, rec, err := s.lookup(ctx, name)
	if err != nil {
		return ignoreGone(err)
	}
	if info.Kind != snapshots.KindCommitted || rec.hasDir() || rec.Claim != nil || s.pins.has(s.dirKey(id)) {
		return nil
	}
	if _, err := os.Lstat(s.upper(id)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	doomed, err := s.doom(s.upper(id), id+"-fs")
	if errors.Is(err, os.ErrNotExist) {
		return nil // another cleanup was faster
	}
	if err != nil {
		return err
	}
	return os.RemoveAll(doomed)
}

// namedDirs returns the ids of the snapshots whose directories something stands on, or which may be mounted.
func namedDirs(ctx context.Context, tx *bolt.Tx) (map[string]bool, error) {
	named := map[string]bool{}
	add := func(low *lower) {
		if low != nil {
			for _, id := range low.Dirs {
				named[id] = true
			}
		}
	}
	gone, err := goneLowers(tx)
	if err != nil {
		return nil, err
	}
	for id, low := range gone {
		named[id] = true // its overlay may be alive
		add(low)
	}
	for _, id := range recordIDs(tx) {
		rec, err := getRecord(tx, id)
		if err != nil {
			return nil, err
		}
		add(rec.Lower)
	}
	return named, nil
}
