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

// The metadata file holds the bucket of core/snapshots/storage ("v1"), and beside it
//
//	daxfs
//	├── version                the version of the records, see migrate.go
//	├── store                  16 hex digits: tell the snapshot ids of this file from others
//	├── records                not a bucket, see closeToVersionOne
//	├── snapshots
//	│   └── <snapshot id>      record, JSON
//	└── gone
//	    └── <snapshot id>      lower, JSON
//
// All of them change in one transaction.
var (
	bucketOwn     = []byte("daxfs")
	keyVersion    = []byte("version")
	keyStore      = []byte("store")
	bucketRecords = []byte("snapshots")
	bucketGone    = []byte("gone")
)

// record is our own data about a snapshot, beside that of storage.
type record struct {
	// Lower is the lower of an active snapshot or a view. It never changes once it can be mounted.
	Lower *lower `json:"lower,omitempty"`
	// Streamed are the keys of the layers streamed into the snapshot, bottom first.
	Streamed []string `json:"streamed,omitempty"`
	// StreamedUsage is the space of these layers.
	StreamedUsage snapshots.Usage `json:"streamedUsage,omitzero"`
	// Claim is set while the only key in Streamed is a claim: the layer was unpacked although it was
	// prepared to be streamed. It must be restored from a blob of the same namespace before use.
	Claim *Claim `json:"claim,omitempty"`
	// Image is the key of the image of the chain that ends with this committed snapshot.
	Image string `json:"image,omitempty"`
	// Dir says that the directory of this committed snapshot is a layer too, above the streamed ones.
	Dir bool `json:"dir,omitempty"`
	// Ingested says that Lowers got the directory once. Lowers may have dropped the layer since.
	Ingested bool `json:"ingested,omitempty"`
	// Dropped says that the directory was removed because Lowers stores its contents durably.
	Dropped bool `json:"dropped,omitempty"`
	// Shared is the chain whose image, in a pool of another owner, this committed snapshot stands for. The
	// snapshot then has no layer of its own.
	Shared digest.Digest `json:"shared,omitempty"`
	// Top says that the chain is known to end an OCI image, so its image is worth keeping mounted.
	Top bool `json:"top,omitempty"`
	// Built says that the image was built once. It may have been dropped since.
	Built bool `json:"built,omitempty"`
}

// hasDir reports whether the directory of a committed snapshot exists and holds a layer.
func (r *record) hasDir() bool { return r.Dir && !r.Dropped }

// lower is what a snapshot stands on: directories of committed snapshots above the image of a chain.
// Either part may be missing; without both, the snapshot stands on nothing.
type lower struct {
	// Dirs are snapshot ids, top first.
	Dirs []string `json:"dirs,omitempty"`
	// Image is the key of the image below.
	Image string `json:"image,omitempty"`
	// Plain says that the image is a copy on disk, because there was no room for the shared one.
	Plain bool `json:"plain,omitempty"`
	// Blind says that the snapshot has a parent but no lower, because its layer will be streamed or is
	// unpacked out of order. Its mount only names the upper directory; nobody can mount it.
	Blind bool `json:"blind,omitempty"`
	// OverShared says that Blind was chosen for a chain with a claimed snapshot: the layer becomes a directory.
	OverShared bool `json:"overShared,omitempty"`
	// Streaming says that Blind was chosen because the layer is expected to be streamed. A walking
	// unpacker would have to see the directories below; see record.Claim.
	Streaming bool `json:"streaming,omitempty"`
	// Why explains to people why this is not the shared image; empty if it is.
	Why string `json:"why,omitempty"`
}

// stands reports whether an overlay over a lower layer may have been mounted.
func (l *lower) stands() bool { return l != nil && !l.Blind && (l.Image != "" || len(l.Dirs) > 0) }

// onShared reports whether the snapshot stands, or will stand, on an image of another owner's pool.
func (l *lower) onShared() bool {
	return l != nil && (l.OverShared || strings.HasPrefix(l.Image, sharedPrefix))
}

// store is the metadata file.
type store struct {
	ms   *storage.MetaStore
	file string
	id   string
}

// openStore opens or creates the file. migrate brings the records of earlier versions up to date.
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
	// Before the first snapshot storage has no buckets, and walking fails. Create them.
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

// reserved is the number of bytes that the file gets ahead of its use.
const reserved = 4 << 20

// reserve allocates the blocks of the file and some more. Removing a snapshot writes to the file and
// must succeed on a full disk. reserve ignores errors, such as no space or no support for fallocate.
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

// view runs fn in a read transaction, update in a write transaction. The context passed to fn carries
// the transaction for package storage.
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
	// storage hides its bbolt transaction behind an interface; our bucket must change in the same one.
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

// getRecord returns the record of a snapshot id, or an empty one if there is none.
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

// chain returns the committed snapshots from name down to the first layer, top first.
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

// all returns all snapshots by name, including active ones and views.
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

type everything map[string]link

// chain returns a snapshot and those below it, top first.
func (e everything) chain(name string) []link {
	var links []link
	for name != "" {
		l := e[name]
		links = append(links, l)
		name = l.info.Parent
	}
	return links
}

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
