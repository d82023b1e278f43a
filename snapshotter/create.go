package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// Prepare creates an active snapshot.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindActive, key, parent, opts)
}

// View creates a read-only snapshot.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

// errChanged reports that a directory of the chosen lower was removed meanwhile.
var errChanged = errors.New("a directory below was removed meanwhile")

func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string,
	opts []snapshots.Opt,
) (_ []mount.Mount, err error) {
	began := time.Now()
	defer func() {
		failed := err
		if errdefs.IsAlreadyExists(err) {
			failed = nil // not a failure: the layer exists
		}
		s.opts.Observe("prepare", time.Since(began), failed)
	}()

	want := snapshots.Info{Name: key, Kind: kind, Parent: parent}
	for _, opt := range opts {
		if err := opt(&want); err != nil {
			return nil, err
		}
	}
	if claimed, err := s.claim(ctx, want, opts); claimed || err != nil {
		if err == nil {
			err = fmt.Errorf("chain %s is in a shared pool: %w", want.Labels[snapshots.LabelSnapshotRef],
				errdefs.ErrAlreadyExists)
		}
		return nil, err
	}
	if kind == snapshots.KindActive {
		if mounts, done, err := s.pull(ctx, want, opts); done {
			return mounts, err
		}
	}
	for {
		mounts, err := s.tryCreate(ctx, want, opts)
		if !errors.Is(err, errChanged) {
			return mounts, err
		}
	}
}

func (s *Snapshotter) tryCreate(ctx context.Context, want snapshots.Info, opts []snapshots.Opt) ([]mount.Mount, error) {
	var links []link
	err := s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		if _, _, _, err := storage.GetInfo(ctx, want.Name); err == nil {
			return fmt.Errorf("snapshot %q: %w", want.Name, errdefs.ErrAlreadyExists)
		}
		links, err = chain(ctx, tx, want.Parent)
		if err == nil && len(links) > 0 && links[0].info.Kind != snapshots.KindCommitted {
			err = fmt.Errorf("parent %q is not a committed snapshot: %w", want.Parent, errdefs.ErrInvalidArgument)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	// No record names the chosen lower yet. Until one does, pins keep sweeps away from it.
	for _, l := range links {
		defer s.pins.pin(l.rec.Image)()
	}
	low, lowerdirs, err := s.chooseLower(ctx, want, links)
	if err != nil {
		return nil, fmt.Errorf("snapshot %q on %q: %w", want.Name, want.Parent, err)
	}
	root, err := s.upperRoot(want.Labels, lowerdirs)
	if err != nil {
		return nil, fmt.Errorf("snapshot %q: %w", want.Name, err)
	}
	id, info, err := s.record(ctx, want, low, root, opts)
	if err != nil {
		return nil, err
	}
	s.makeAhead()
	unpacks := want.Kind == snapshots.KindActive && isExtract(want.Name, want.Labels)
	if len(links) > 0 && low.Image != "" && low.Image == links[0].rec.Image && !low.Plain &&
		!links[0].rec.Built && !unpacks {
		s.work.add(task{name: want.Parent, started: true})
	}
	return s.describe(id, info, low, lowerdirs), nil
}

// record creates the directories of a snapshot and its record.
func (s *Snapshotter) record(ctx context.Context, want snapshots.Info, low *lower, root rootAttr,
	opts []snapshots.Opt,
) (id string, info snapshots.Info, err error) {
	temp := ""
	defer func() {
		if err == nil || temp == "" {
			return
		}
		if rerr := os.RemoveAll(temp); rerr != nil {
			err = errors.Join(err, rerr)
		}
		// If the directory got its name before the transaction failed, only a cleanup may remove it: storage
		// may give the id to another snapshot at this moment.
		s.work.add(task{})
	}()
	err = s.st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		if err := checkDirs(tx, low); err != nil {
			return err
		}
		// Inside the transaction: Cleanup, which runs in one too, never sees a directory without a record.
		snap, err := storage.CreateSnapshot(ctx, want.Kind, want.Name, want.Parent, opts...)
		if err != nil {
			return err
		}
		id = snap.ID
		if _, info, _, err = storage.GetInfo(ctx, want.Name); err != nil {
			return err
		}
		if err := putRecord(tx, id, record{Lower: low}); err != nil {
			return err
		}
		// An earlier transaction that failed after the rename leaves a directory without a record.
		if _, err := os.Lstat(s.dir(id)); err == nil {
			if _, err := s.doom(s.dir(id), id); err != nil {
				return err
			}
		}
		temp, err = s.placeDirs(id, root)
		return err
	})
	return id, info, err
}

// checkDirs returns errChanged if a directory that low names was dropped.
func checkDirs(tx *bolt.Tx, low *lower) error {
	for _, id := range low.Dirs {
		if rec, err := getRecord(tx, id); err != nil || !rec.hasDir() {
			return errors.Join(err, errChanged)
		}
	}
	return nil
}
