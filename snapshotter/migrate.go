package snapshotter

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// recordVersion is the version of the records that this program writes.
//
//	1  images are named by chain IDs, and chains without one by snapshots. The file holds no version.
//	2  images are named by the keys of their layers
const recordVersion = 2

// keyOldRecords is the bucket of records of version 1.
var keyOldRecords = []byte("records")

// closeToVersionOne moves the records away from where version 1 looks for them, and puts a key there
// that is not a bucket. Version 1 checks no version: it would find records that name no image, and
// start containers on their upper directories alone. With the key in place it refuses to start.
func closeToVersionOne(b *bolt.Bucket) error {
	if old := b.Bucket(keyOldRecords); old != nil {
		records := b.Bucket(bucketRecords)
		if err := old.ForEach(func(k, v []byte) error { return records.Put(k, bytes.Clone(v)) }); err != nil {
			return err
		}
		if err := b.DeleteBucket(keyOldRecords); err != nil {
			return err
		}
	}
	return b.Put(keyOldRecords, []byte("a newer program has moved the records"))
}

// oldRecord holds the fields of version 1 that the key of an image replaced in version 2.
type oldRecord struct {
	Chain string `json:"chain"`
	Lower *struct {
		Chain string `json:"chain"`
	} `json:"lower"`
}

// migrate updates the records of an earlier version. Each snapshot keeps standing on the same layers.
func (s *Snapshotter) migrate(ctx context.Context, tx *bolt.Tx, st *store) error {
	version := byte(1)
	if raw := tx.Bucket(bucketOwn).Get(keyVersion); len(raw) == 1 {
		version = raw[0]
	}
	switch version {
	case recordVersion:
		return nil
	case 1:
	default:
		return fmt.Errorf("its records are of version %d, expected %d or older: a newer program wrote them, start "+
			"that one: %w", version, recordVersion, errdefs.ErrFailedPrecondition)
	}
	names, err := storage.IDMap(ctx)
	if err != nil {
		return err
	}
	old := map[string]oldRecord{}
	for id := range names {
		var r oldRecord
		if raw := own(tx, bucketRecords).Get([]byte(id)); raw != nil {
			if err := json.Unmarshal(raw, &r); err != nil {
				return fmt.Errorf("record of snapshot %s: %w", id, err)
			}
		}
		old[id] = r
	}
	for id, name := range names {
		if err := s.migrateOne(ctx, tx, st, id, name, old); err != nil {
			return fmt.Errorf("snapshot %q: %w", name, err)
		}
	}
	return tx.Bucket(bucketOwn).Put(keyVersion, []byte{recordVersion})
}

func (s *Snapshotter) migrateOne(ctx context.Context, tx *bolt.Tx, st *store, id, name string,
	old map[string]oldRecord,
) error {
	links, err := chain(ctx, tx, name)
	if err != nil {
		return err
	}
	rec := links[0].rec
	if old[id].Chain != "" {
		rec.Image = s.imageKey(st, links)
		// The images and layers of version 1 are in a pool that this program does not write to.
		rec.Ingested, rec.Built = false, false
	}
	if l := old[id].Lower; l != nil && l.Chain != "" {
		for i, parent := range links[1:] {
			if old[parent.id].Chain == l.Chain {
				rec.Lower.Image = s.imageKey(st, links[i+1:])
				break
			}
		}
		if rec.Lower.Image == "" {
			return fmt.Errorf("chain %q is not among its parents: %w", l.Chain, errdefs.ErrDataLoss)
		}
	}
	return putRecord(tx, id, rec)
}
