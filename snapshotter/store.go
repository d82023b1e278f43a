package snapshotter

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// The metadata file is that of core/snapshots/storage (bucket "v1"), and beside it
//
//	daxfs
//	├── version                the version of the records, see migrate.go
//	├── store                  16 hex digits: tells the snapshot ids of this file from those of any other
//	├── records                not a bucket, see closeToVersionOne
//	├── snapshots
//	│   └── <snapshot id>      record, JSON
//	└── gone
//	    └── <snapshot id>      lower, JSON
//
// All change in one transaction.
var (
	bucketOwn     = []byte("daxfs")
	keyVersion    = []byte("version")
	keyStore      = []byte("store")
	bucketRecords = []byte("snapshots")
	bucketGone    = []byte("gone")
)

// record is what we know about a snapshot beyond what storage knows.
type record struct {
	// Lower is what an active snapshot or a view stands on. It never changes once it can be mounted.
	Lower *lower `json:"lower,omitempty"`
	// Streamed are the keys of the layers that were streamed into the snapshot, bottom first.
	Streamed []string `json:"streamed,omitempty"`
	// StreamedUsage is what these layers hold.
	StreamedUsage snapshots.Usage `json:"streamedUsage,omitzero"`
	// Claim is set while the one key in Streamed is a claim: the layer was unpacked where it was expected to be
	// streamed, and has to be restored from a blob of the same namespace before it is used.
	Claim *Claim `json:"claim,omitempty"`
	// Image is the key of the image of the chain that ends with this committed snapshot.
	Image string `json:"image,omitempty"`
	// Dir says that the directory of this committed snapshot is a layer too, above those streamed.
	Dir bool `json:"dir,omitempty"`
	// Ingested says that the directory was handed to Lowers once. Lowers may have dropped it since.
	Ingested bool `json:"ingested,omitempty"`
	// Dropped says that the directory was removed because Lowers keeps its contents durably.
	Dropped bool `json:"dropped,omitempty"`
	// Shared is the chain whose image a pool of another owner has, for which this committed snapshot stands. It has no
	// layer of its own then.
	Shared digest.Digest `json:"shared,omitempty"`
	// Top says that the chain ends an OCI image, as far as that is known: its image is worth being kept mounted.
	Top bool `json:"top,omitempty"`
	// Built says that the image was built once. It may have been dropped since.
	Built bool `json:"built,omitempty"`
}

// hasDir reports whether the directory of a committed snapshot is there and holds a layer.
func (r *record) hasDir() bool { return r.Dir && !r.Dropped }

// lower is what a snapshot stands on: the directories of committed snapshots above the image of a chain. Either may be
// missing; with both missing the snapshot stands on nothing.
type lower struct {
	// Dirs are snapshot ids, top first.
	Dirs []string `json:"dirs,omitempty"`
	// Image is the key of the image below.
	Image string `json:"image,omitempty"`
	// Plain says that the image is a copy on disk because there was no room for the shared one.
	Plain bool `json:"plain,omitempty"`
	// Blind says that the snapshot has a parent but was given no lower: it is a layer that will be streamed, or one
	// that is unpacked out of order. Its mount can not be mounted, only written below its upper directory.
	Blind bool `json:"blind,omitempty"`
	// OverShared says that Blind was chosen for a layer of a chain with a claimed snapshot. Such a layer has to become a
	// directory.
	OverShared bool `json:"overShared,omitempty"`
	// Streaming says that Blind was chosen because the layer is expected to be streamed. An unpacker that walks would
	// have needed to see the directories below; see record.Claim.
	Streaming bool `json:"streaming,omitempty"`
	// Why says why the shared image was not to be had, if that is why this is something else. It is for people.
	Why string `json:"why,omitempty"`
}

// stands reports whether an overlay that stands on something can have been mounted.
func (l *lower) stands() bool { return l != nil && !l.Blind && (l.Image != "" || len(l.Dirs) > 0) }

// onShared reports whether the snapshot stands on an image of another owner's pool, or will.
func (l *lower) onShared() bool {
	return l != nil && (l.OverShared || strings.HasPrefix(l.Image, sharedPrefix))
}

// store is the metadata file.
type store struct {
	ms   *storage.MetaStore
	file string
	id   string
}

// openStore opens or makes the file. migrate brings the records of earlier versions up to date.
func openStore(ctx context.Context, file string,
	migrate func(context.Context, *bolt.Tx, *store) error,
) (*store, error) {
	ms, err := storage.NewMetaStore(file)
	if err != nil {
		return nil, err
	}
	st := &store{ms: ms, file: file}
	err = st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		if err := st.init(tx); err != nil {
			return err
		}
		return migrate(ctx, tx, st)
	})
	if err != nil {
		ms.Close()
		return nil, fmt.Errorf("snapshot metadata %q: %w", file, err)
	}
	return st, nil
}

func (st *store) init(tx *bolt.Tx) error {
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
	for _, name := range [][]byte{bucketRecords, bucketGone} {
		if _, err := b.CreateBucketIfNotExists(name); err != nil {
			return err
		}
	}
	if err := closeToVersionOne(b); err != nil {
		return err
	}
	if id := b.Get(keyStore); id != nil {
		st.id = string(id)
		return nil
	}
	var raw [8]byte
	rand.Read(raw[:])
	st.id = hex.EncodeToString(raw[:])
	if err := b.Put(keyVersion, []byte{recordVersion}); err != nil {
		return err
	}
	return b.Put(keyStore, []byte(st.id))
}

// reserved is how much room the file gets ahead of its use.
const reserved = 4 << 20

// reserve allocates the blocks of the file and some more. Removing a snapshot writes to the file, and must succeed on a
// full disk. A full disk, or a file system that can not reserve, changes nothing.
func (st *store) reserve() {
	f, err := os.OpenFile(st.file, os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil {
		_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, info.Size()+reserved)
	}
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

func own(tx *bolt.Tx, name []byte) *bolt.Bucket { return tx.Bucket(bucketOwn).Bucket(name) }

// getRecord returns the record of a snapshot id; an empty one if there is none.
func getRecord(tx *bolt.Tx, id string) (record, error) {
	var r record
	raw := own(tx, bucketRecords).Get([]byte(id))
	if raw == nil {
		return r, nil
	}
	if err := json.Unmarshal(raw, &r); err != nil {
		return r, fmt.Errorf("record of snapshot %s: %w", id, err)
	}
	return r, nil
}

func putRecord(tx *bolt.Tx, id string, r record) error { return putJSON(own(tx, bucketRecords), id, r) }

func putJSON(b *bolt.Bucket, key string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return b.Put([]byte(key), raw)
}

func deleteRecord(tx *bolt.Tx, id string) error { return own(tx, bucketRecords).Delete([]byte(id)) }

// recordIDs returns the ids that have a record.
func recordIDs(tx *bolt.Tx) []string {
	var ids []string
	c := own(tx, bucketRecords).Cursor()
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

// all returns all snapshots, by name, active ones and views too.
func all(ctx context.Context, tx *bolt.Tx) (everything, error) {
	ids, err := storage.IDMap(ctx)
	if err != nil {
		return nil, err
	}
	byName := make(map[string]string, len(ids))
	for id, name := range ids {
		byName[name] = id
	}
	e := make(everything, len(ids))
	return e, storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
		id := byName[info.Name]
		rec, err := getRecord(tx, id)
		e[info.Name] = link{id: id, info: info, rec: rec}
		return err
	})
}

// everything are all snapshots, by name.
type everything map[string]link

// chain returns a snapshot and those below it. Top first.
func (e everything) chain(name string) []link {
	var links []link
	for name != "" {
		l := e[name]
		links = append(links, l)
		name = l.info.Parent
	}
	return links
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
