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

// Commit turns an active snapshot into a committed one. It only records, because containerd waits for
// it in a write transaction. Streamed layers are durable already; a worker hands unpacked ones to Lowers.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	id, info, rec, err := s.lookup(ctx, key)
	if err != nil {
		return err
	}
	if info.Kind != snapshots.KindActive {
		return fmt.Errorf("snapshot %q is %s, expected an active one: %w", key, info.Kind,
			errdefs.ErrFailedPrecondition)
	}
	streamed := len(rec.Streamed)
	usage, err := s.settleLayers(ctx, id, info, &rec)
	if err != nil {
		return fmt.Errorf("snapshot %q: %w", key, err)
	}
	err = s.st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		// A differ whose caller gave up may have finished only now.
		if now, err := getRecord(tx, id); err != nil {
			return err
		} else if len(now.Streamed) != streamed {
			return fmt.Errorf("snapshot %q is still being written: %w", key, errdefs.ErrFailedPrecondition)
		}
		if _, err := storage.CommitActive(ctx, key, name, usage, opts...); err != nil {
			return err
		}
		if !isExtract(key, info.Labels) { // layers being unpacked are never mounted
			if err := leave(tx, id, rec.Lower); err != nil {
				return err
			}
		}
		links, err := chain(ctx, tx, name)
		if err != nil {
			return err
		}
		rec.Lower, rec.Top = nil, isTop(links[0].info.Labels)
		links[0].rec = rec
		if mixed(links) && len(rec.Streamed) > 0 {
			return fmt.Errorf("snapshot %q: its layer was streamed, and the layers below were claimed meanwhile from "+
				"a shared pool: pull again: %w", key, errdefs.ErrFailedPrecondition)
		}
		rec.Image = s.imageKey(s.st, links)
		return putRecord(tx, id, rec)
	})
	if err != nil {
		return err
	}
	s.work.committed(name)
	return nil
}

// settleLayers decides which layers the committed snapshot adds, and returns their space.
func (s *Snapshotter) settleLayers(ctx context.Context, id string, info snapshots.Info,
	rec *record,
) (snapshots.Usage, error) {
	usage := rec.StreamedUsage
	empty, err := isEmpty(s.upper(id))
	if err != nil {
		return usage, err
	}
	walkedBlindly := rec.Lower != nil && rec.Lower.Streaming && len(rec.Streamed) == 0
	// Without a streamed layer even an empty directory is a layer: it has the attributes of the root.
	isDir := len(rec.Streamed) == 0 || !empty
	if isDir {
		du, err := fs.DiskUsage(ctx, s.upper(id))
		if err != nil {
			return usage, err
		}
		usage.Add(snapshots.Usage(du))
	}
	if !walkedBlindly {
		rec.Dir = isDir
		return usage, nil
	}
	// The unpacker could not see the layers below, so directories may have wrong attributes. The blob is right.
	claim := claimOf(info.Name, info.Labels)
	if claim.DiffID == "" {
		return usage,
			fmt.Errorf("it was prepared to be streamed but was unpacked by another differ, and no label %q tells "+
				"which layer it is; pull again: %w", labelDiffID, errdefs.ErrFailedPrecondition)
	}
	rec.Claim, rec.Streamed = &claim, []string{s.lowers.BlobKey(claim.DiffID)}
	return usage, nil
}

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

// Remove forgets a snapshot. Cleanup frees its space.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	return s.st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		id, kind, err := storage.Remove(ctx, key)
		if err != nil {
			return fmt.Errorf("remove snapshot %q: %w", key, err)
		}
		if kind != snapshots.KindCommitted {
			rec, err := getRecord(tx, id)
			if err != nil {
				return err
			}
			if err := leave(tx, id, rec.Lower); err != nil {
				return err
			}
		}
		return deleteRecord(tx, id)
	})
}

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
