package snapshotter

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// The metadata file is that of core/snapshots/storage (bucket "v1"), and beside it
//
//	daxfs
//	├── store                  16 hex digits: tells the snapshot ids of this file from those of any other
//	└── records
//	    └── <snapshot id>      record, JSON
//
// Both change in one transaction.
var (
	bucketOwn     = []byte("daxfs")
	keyStore      = []byte("store")
	bucketRecords = []byte("records")
)

// record is what we know about a snapshot beyond what storage knows.
type record struct {
	// Lower is what an active snapshot or a view stands on. It never changes.
	Lower *lower `json:"lower,omitempty"`
	// Streamed are the keys of the layers that were streamed into the snapshot, bottom first.
	Streamed []string `json:"streamed,omitempty"`
	// StreamedUsage is what these layers hold.
	StreamedUsage snapshots.Usage `json:"streamedUsage,omitzero"`
	// Chain is the key of the chain that ends with this committed snapshot.
	Chain string `json:"chain,omitempty"`
	// Dir says that the directory of this committed snapshot is a layer too, above those streamed.
	Dir bool `json:"dir,omitempty"`
	// Ingested says that the directory was handed to Lowers once. Lowers may have dropped it since.
	Ingested bool `json:"ingested,omitempty"`
	// Top says that the chain ends an OCI image, as far as that can be known: its image is worth being kept mounted.
	Top bool `json:"top,omitempty"`
	// Built says that the image was built once ahead of its first container. It may have been dropped since.
	Built bool `json:"built,omitempty"`
}

// lower is what a snapshot stands on: the directories of committed snapshots above the image of a chain. Either may be
// missing; with both missing the snapshot stands on nothing.
type lower struct {
	// Dirs are snapshot ids, top first.
	Dirs []string `json:"dirs,omitempty"`
	// Chain is the key of the chain whose image is below.
	Chain string `json:"chain,omitempty"`
	// Blind says that the snapshot has a parent but was given no lower: it is a layer that will be streamed, or one
	// that is unpacked out of order. Its mount can not be mounted, only written below its upper directory.
	Blind bool `json:"blind,omitempty"`
	// Streaming says that Blind was chosen because the layer is expected to be streamed. It must be, then: an
	// unpacker that walks would have needed to see the directories below.
	Streaming bool `json:"streaming,omitempty"`
}

// store is the metadata file.
type store struct {
	ms *storage.MetaStore
	id string
}

// openStore opens or makes the file.
func openStore(ctx context.Context, file string) (*store, error) {
	ms, err := storage.NewMetaStore(file)
	if err != nil {
		return nil, err
	}
	st := &store{ms: ms}
	err = st.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		// Until the first snapshot is made storage has no buckets, and walking fails. Make them.
		v1, err := tx.CreateBucketIfNotExists([]byte("v1"))
		if err != nil {
			return err
		}
		for _, name := range []string{"snapshots", "parents"} {
			if _, err := v1.CreateBucketIfNotExists([]byte(name)); err != nil {
				return err
			}
		}
		b, err := tx.CreateBucketIfNotExists(bucketOwn)
		if err != nil {
			return err
		}
		if _, err := b.CreateBucketIfNotExists(bucketRecords); err != nil {
			return err
		}
		if id := b.Get(keyStore); id != nil {
			st.id = string(id)
			return nil
		}
		var raw [8]byte
		rand.Read(raw[:])
		st.id = hex.EncodeToString(raw[:])
		return b.Put(keyStore, []byte(st.id))
	})
	if err != nil {
		ms.Close()
		return nil, fmt.Errorf("snapshot metadata %q: %w", file, err)
	}
	return st, nil
}

// view runs fn in a read transaction, update in a write transaction. The context that fn gets carries the transaction
// for package storage.
func (st *store) view(ctx context.Context, fn func(context.Context, *bolt.Tx) error) error {
	return st.transact(ctx, false, fn)
}

func (st *store) update(ctx context.Context, fn func(context.Context, *bolt.Tx) error) error {
	return st.transact(ctx, true, fn)
}

func (st *store) transact(ctx context.Context, writable bool, fn func(context.Context, *bolt.Tx) error) (err error) {
	ctx, t, err := st.ms.TransactionContext(ctx, writable)
	if err != nil {
		return err
	}
	done := false
	defer func() {
		if !done {
			t.Rollback()
		}
	}()
	// storage hands out its bbolt transaction behind an interface; our bucket must change together with its own.
	tx, ok := t.(*bolt.Tx)
	if !ok {
		return fmt.Errorf("metadata transaction is a %T, expected a bbolt transaction", t)
	}
	if err := fn(ctx, tx); err != nil || !writable {
		return err
	}
	done = true
	return t.Commit()
}

// getRecord returns the record of a snapshot id; an empty one if there is none.
func getRecord(tx *bolt.Tx, id string) (record, error) {
	var r record
	raw := tx.Bucket(bucketOwn).Bucket(bucketRecords).Get([]byte(id))
	if raw == nil {
		return r, nil
	}
	if err := json.Unmarshal(raw, &r); err != nil {
		return r, fmt.Errorf("record of snapshot %s: %w", id, err)
	}
	return r, nil
}

func putRecord(tx *bolt.Tx, id string, r record) error {
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return tx.Bucket(bucketOwn).Bucket(bucketRecords).Put([]byte(id), raw)
}

func deleteRecord(tx *bolt.Tx, id string) error {
	return tx.Bucket(bucketOwn).Bucket(bucketRecords).Delete([]byte(id))
}

// recordIDs returns the ids that have a record.
func recordIDs(tx *bolt.Tx) []string {
	var ids []string
	c := tx.Bucket(bucketOwn).Bucket(bucketRecords).Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.Next() {
		ids = append(ids, string(k))
	}
	return ids
}

// link is one committed snapshot of a chain.
type link struct {
	id   string
	info snapshots.Info
	rec  record
}

// chain returns the committed snapshots from name down to the first layer. Top first.
func chain(ctx context.Context, tx *bolt.Tx, name string) ([]link, error) {
	var links []link
	for name != "" {
		id, info, _, err := storage.GetInfo(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("snapshot %q: %w", name, err)
		}
		rec, err := getRecord(tx, id)
		if err != nil {
			return nil, err
		}
		links = append(links, link{id: id, info: info, rec: rec})
		name = info.Parent
	}
	return links, nil
}

// nameOf returns the name of the snapshot with an id.
func nameOf(ctx context.Context, id string) (string, error) {
	ids, err := storage.IDMap(ctx)
	if err != nil {
		return "", err
	}
	name, ok := ids[id]
	if !ok {
		return "", fmt.Errorf("snapshot with id %q: %w", id, errdefs.ErrNotFound)
	}
	return name, nil
}
