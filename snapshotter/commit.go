package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// Commit turns an active snapshot into a committed one. It only records: containerd waits for it inside a write
// transaction of its own. What was streamed is durable already; what was unpacked is handed to Lowers in the background.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	id, info, rec, err := s.lookup(ctx, key)
	if err != nil {
		return err
	}
	if info.Kind != snapshots.KindActive {
		return fmt.Errorf("snapshot %q is %s, expected an active one: %w", key, info.Kind, errdefs.ErrFailedPrecondition)
	}
	empty, err := isEmpty(s.upper(id))
	if err != nil {
		return fmt.Errorf("snapshot %q: %w", key, err)
	}
	if rec.Lower != nil && rec.Lower.Streaming && len(rec.Streamed) == 0 {
		// Whoever wrote here could not see the layers below, so directories may have got wrong attributes.
		s.recent.distrust()
		return fmt.Errorf("snapshot %q was prepared to be streamed but was unpacked by another differ; pull again: %w",
			key, errdefs.ErrFailedPrecondition)
	}
	usage := rec.StreamedUsage
	// Without a streamed layer even an empty directory is a layer: it says what the attributes of the root are.
	isDir := len(rec.Streamed) == 0 || !empty
	if isDir {
		du, err := fs.DiskUsage(ctx, s.upper(id))
		if err != nil {
			return fmt.Errorf("snapshot %q: %w", key, err)
		}
		usage.Add(snapshots.Usage(du))
	}
	err = s.st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		// A differ whose caller gave up may have ended only now.
		if now, err := getRecord(tx, id); err != nil {
			return err
		} else if len(now.Streamed) != len(rec.Streamed) {
			return fmt.Errorf("snapshot %q is still being written: %w", key, errdefs.ErrFailedPrecondition)
		}
		if _, err := storage.CommitActive(ctx, key, name, usage, opts...); err != nil {
			return err
		}
		if _, info, _, err = storage.GetInfo(ctx, name); err != nil {
			return err
		}
		rec.Chain, rec.Dir, rec.Lower = s.chainKey(name, id), isDir, nil
		rec.Top = positionOf(info.Labels) == positionTop
		return putRecord(tx, id, rec)
	})
	if err != nil {
		return err
	}
	if len(rec.Streamed) > 0 {
		s.recent.add(rec.Chain)
	}
	s.work.committed(name)
	return nil
}

// lookup returns the id, info and record of a snapshot.
func (s *Snapshotter) lookup(ctx context.Context, key string) (id string, info snapshots.Info, rec record, err error) {
	err = s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		if id, info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		rec, err = getRecord(tx, id)
		return err
	})
	return id, info, rec, err
}

// Remove forgets a snapshot. What it held is freed by Cleanup.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	return s.st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		id, _, err := storage.Remove(ctx, key)
		if err != nil {
			return fmt.Errorf("remove snapshot %q: %w", key, err)
		}
		return deleteRecord(tx, id)
	})
}

// isEmpty reports whether a directory has no entries.
func isEmpty(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	return false, err
}
