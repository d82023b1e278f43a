package snapshotter

import (
	"context"
	"errors"
	"os"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
)

// dropDirs removes the directories of unpacked layers whose contents Lowers keeps durably, so that nothing is on disk
// twice. A directory stays while its chain is incomplete, because the layers above may be unpacked over it, and while
// anything stands on it.
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
		seen := map[string]bool{}
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			if info.Kind != snapshots.KindCommitted {
				return nil
			}
			links, err := chain(ctx, tx, info.Name)
			if err != nil || !links[0].rec.Built {
				return err
			}
			for _, l := range links {
				if l.rec.hasDir() && l.rec.Ingested && !named[l.id] && !seen[l.id] {
					seen[l.id] = true
					candidates = append(candidates, l)
				}
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range candidates {
		if err := s.dropDir(ctx, l); err != nil {
			errs = append(errs, s.unlessGone(ctx, l.info.Name, err))
		}
	}
	return errors.Join(errs...)
}

// dropDir removes the directory of one layer. The record goes first: from then on nobody begins to read the directory,
// and whoever began before holds a pin.
func (s *Snapshotter) dropDir(ctx context.Context, l link) error {
	key := s.dirKey(l.id)
	unpin := s.pins.pin(key)
	ns, _ := splitName(l.info.Name)
	err := s.lowers.AddDir(ctx, ns, key, s.upper(l.id)) // it may have been evicted since it was stored
	if err == nil {
		err = s.st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
			if id, _, _, err := storage.GetInfo(ctx, l.info.Name); err != nil || id != l.id {
				return err
			}
			named, err := namedDirs(ctx, tx)
			if err != nil || named[l.id] {
				return err
			}
			rec, err := getRecord(tx, l.id)
			if err != nil {
				return err
			}
			rec.Dropped = true
			return putRecord(tx, l.id, rec)
		})
	}
	unpin()
	if err != nil {
		return err
	}
	log.G(ctx).WithField("snapshot", l.info.Name).Debug("the layer is in the pool, removing its directory")
	return s.removeDropped(ctx, l.info.Name)
}

// removeDropped removes what is left of the directory of a committed snapshot that no longer needs it.
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

// namedDirs returns the ids of the snapshots whose directories are in use: something stands on them, or they may still
// be mounted.
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
