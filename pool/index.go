package pool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bberrors "go.etcd.io/bbolt/errors"

	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// index is the owner's database. There is no table of extents: each holder, a layer or an image, lists the extents that
// it holds in full, and an extent exists while a holder lists it. So no crash can leave an extent without a holder, and
// removing a holder is one record's removal.
//
//	meta    id, generation
//	layers  key -> payload
//	held    key -> extents of the layer
//	images  key -> catalogue entry
//	used    key -> extents of the image
type index struct {
	db   *bbolt.DB
	path string
	// fail is called before every change, for tests that cut there, and done after it was made, for tests of a disk that
	// fails while it is synced.
	fail, done func(op string) error

	mu     sync.Mutex
	broken error // why nobody knows what is in the file; see update
}

// errUnknown reports an index of which nobody knows whether it holds the last change.
var errUnknown = errors.New("whether the disk has it is unknown")

var (
	bucketMeta   = []byte("meta")
	bucketLayers = []byte("layers")
	bucketHeld   = []byte("held")
	bucketImages = []byte("images")
	bucketUsed   = []byte("used")
	keyID        = []byte("id")
	keyGen       = []byte("generation")
)

// openIndex opens the database of a pool, or makes an empty one. durable is false for regions that end with the kernel:
// what the page cache holds then outlives what it describes.
func openIndex(path string, durable bool) (*index, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Millisecond, NoSync: !durable, FreelistType: bbolt.FreelistMapType})
	switch {
	case errors.Is(err, bberrors.ErrTimeout):
		return nil, &region.BusyError{Path: path, PID: region.LockHolder(path)}
	case errors.Is(err, bberrors.ErrInvalid), errors.Is(err, bberrors.ErrVersionMismatch), errors.Is(err, bberrors.ErrChecksum):
		return nil, fmt.Errorf("index %q: %w: %w", path, ErrCorrupt, err)
	case err != nil:
		return nil, fmt.Errorf("index %q: %w", path, err)
	}
	never := func(string) error { return nil }
	return &index{db: db, path: path, fail: never, done: never}, nil
}

func (x *index) close() error { return x.db.Close() }

// format writes the identity of a new pool into an empty index.
func (x *index) format(id [16]byte, gen uint64) error {
	return x.update("format", func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketMeta, bucketLayers, bucketHeld, bucketImages, bucketUsed} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		if err := tx.Bucket(bucketMeta).Put(keyID, id[:]); err != nil {
			return err
		}
		return putGeneration(tx, gen)
	})
}

// update makes one change, whole or not at all. If the disk fails at the very end nobody knows which, and the file may
// come to hold it later. Then no change follows: the caller must keep all that either answer needs, until the pool is opened
// anew and the file is read.
func (x *index) update(op string, f func(tx *bbolt.Tx) error) error {
	wrap := func(err error) error { return fmt.Errorf("index %q: %s: %w", x.path, op, err) }
	if err := x.unknown(); err != nil {
		return wrap(err)
	}
	if err := x.fail(op); err != nil {
		return wrap(err)
	}
	before := x.transaction()
	err := x.db.Update(f)
	changed := x.transaction() != before
	if err == nil {
		err = x.done(op)
	}
	if err != nil && changed {
		err = fmt.Errorf("%w; look at the disk, then open the pool anew: %w", errUnknown, err)
		x.mu.Lock()
		x.broken = err
		x.mu.Unlock()
	}
	if err != nil {
		return wrap(err)
	}
	return nil
}

// transaction is the number of the last one that readers see.
func (x *index) transaction() (id int) {
	_ = x.db.View(func(tx *bbolt.Tx) error { // of a closed database, whose changes fail as well
		id = tx.ID()
		return nil
	})
	return id
}

// unknown returns the error after which nobody knows what is in the file, or nil.
func (x *index) unknown() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.broken
}

// putGeneration notes the generation that the header is about to get. The header then has it or the one before.
func putGeneration(tx *bbolt.Tx, gen uint64) error {
	return tx.Bucket(bucketMeta).Put(keyGen, binary.LittleEndian.AppendUint64(nil, gen))
}

func (x *index) setGeneration(gen uint64) error {
	return x.update("generation", func(tx *bbolt.Tx) error { return putGeneration(tx, gen) })
}

func (x *index) putLayer(key string, payload []byte, held []extentID) error {
	return x.update("put layer", func(tx *bbolt.Tx) error {
		if err := tx.Bucket(bucketLayers).Put([]byte(key), payload); err != nil {
			return err
		}
		return tx.Bucket(bucketHeld).Put([]byte(key), encodeExtents(held))
	})
}

func (x *index) removeLayer(key string) error {
	return x.update("remove layer", func(tx *bbolt.Tx) error {
		if err := tx.Bucket(bucketLayers).Delete([]byte(key)); err != nil {
			return err
		}
		return tx.Bucket(bucketHeld).Delete([]byte(key))
	})
}

func (x *index) payload(key string) ([]byte, error) {
	var out []byte
	err := x.db.View(func(tx *bbolt.Tx) error {
		v := tx.Bucket(bucketLayers).Get([]byte(key))
		if v == nil {
			return fmt.Errorf("layer %q: %w", key, ErrNotFound)
		}
		out = append(make([]byte, 0, len(v)), v...)
		return nil
	})
	return out, err
}

func (x *index) putImage(m *Image, used []extentID, gen uint64) error {
	return x.update("put image", func(tx *bbolt.Tx) error {
		entry := make([]byte, entrySize)
		encodeImage(entry, m)
		if err := tx.Bucket(bucketImages).Put([]byte(m.Key), entry); err != nil {
			return err
		}
		if err := tx.Bucket(bucketUsed).Put([]byte(m.Key), encodeExtents(used)); err != nil {
			return err
		}
		return putGeneration(tx, gen)
	})
}

func (x *index) removeImage(key string) error {
	return x.update("remove image", func(tx *bbolt.Tx) error {
		if err := tx.Bucket(bucketImages).Delete([]byte(key)); err != nil {
			return err
		}
		return tx.Bucket(bucketUsed).Delete([]byte(key))
	})
}

// contents is all of an index but the payloads.
type contents struct {
	id     [16]byte
	gen    uint64
	empty  bool // never formatted
	layers map[string][]extentID
	images map[string]Image
	used   map[string][]extentID
}

// load reads everything and checks what can be checked without the region. size is the pool's.
func (x *index) load(size int64) (*contents, error) {
	c := &contents{layers: map[string][]extentID{}, images: map[string]Image{}, used: map[string][]extentID{}}
	err := x.db.View(func(tx *bbolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		if meta == nil {
			c.empty = true
			return nil
		}
		id, gen := meta.Get(keyID), meta.Get(keyGen)
		if len(id) != len(c.id) || len(gen) != 8 {
			return fmt.Errorf("pool id of %d bytes and generation of %d", len(id), len(gen))
		}
		copy(c.id[:], id)
		c.gen = binary.LittleEndian.Uint64(gen)
		for _, name := range [][]byte{bucketLayers, bucketHeld, bucketImages, bucketUsed} {
			if tx.Bucket(name) == nil {
				return fmt.Errorf("bucket %q is missing", name)
			}
		}
		if err := loadExtents(tx.Bucket(bucketHeld), tx.Bucket(bucketLayers), c.layers); err != nil {
			return err
		}
		if err := loadExtents(tx.Bucket(bucketUsed), tx.Bucket(bucketImages), c.used); err != nil {
			return err
		}
		return tx.Bucket(bucketImages).ForEach(func(k, v []byte) error {
			if len(v) != entrySize {
				return fmt.Errorf("image %q: entry of %d bytes", k, len(v))
			}
			m, err := decodeImage(v, size)
			if err != nil {
				return err
			}
			if m.Key != string(k) {
				return fmt.Errorf("image %q is stored as %q", m.Key, k)
			}
			c.images[m.Key] = m
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("index %q: %w: %w", x.path, ErrCorrupt, err)
	}
	return c, nil
}

// loadExtents reads the lists of one kind of holder; each list must have its holder in the other bucket.
func loadExtents(lists, holders *bbolt.Bucket, into map[string][]extentID) error {
	if a, b := lists.Stats().KeyN, holders.Stats().KeyN; a != b {
		return fmt.Errorf("%d lists of extents for %d holders", a, b)
	}
	return lists.ForEach(func(k, v []byte) error {
		ids, err := decodeExtents(v)
		if err != nil {
			return fmt.Errorf("extents of %q: %w", k, err)
		}
		if holders.Get(k) == nil {
			return fmt.Errorf("extents of %q, which does not exist", k)
		}
		into[string(k)] = ids
		return nil
	})
}

// extentID is what a holder knows of an extent: its place, its size in bytes and the sum of its contents.
type extentID struct {
	off, size int64
	sum       [32]byte
}

const extentsVersion = 2

// encodeExtents packs a list, which is sorted by offset: a version byte, the count, then for each the distance from
// the one before in pages, the size and the sum.
func encodeExtents(ids []extentID) []byte {
	b := make([]byte, 0, 16+len(ids)*40)
	b = append(b, extentsVersion)
	b = binary.AppendUvarint(b, uint64(len(ids)))
	var at int64
	for _, e := range ids {
		b = binary.AppendUvarint(b, uint64(e.off-at)/alloc.Unit)
		b = binary.AppendUvarint(b, uint64(e.size))
		b = append(b, e.sum[:]...)
		at = e.off
	}
	return b
}

func decodeExtents(b []byte) ([]extentID, error) {
	if len(b) == 0 || b[0] != extentsVersion {
		return nil, errors.New("unknown version")
	}
	b = b[1:]
	count, n := binary.Uvarint(b)
	if n <= 0 || count > uint64(len(b))/34 {
		return nil, fmt.Errorf("%d extents in %d bytes", count, len(b))
	}
	b = b[n:]
	ids := make([]extentID, 0, count)
	var at uint64
	for range count {
		pages, n := binary.Uvarint(b)
		if n <= 0 || pages >= 1<<50 {
			return nil, errors.New("bad offset")
		}
		size, k := binary.Uvarint(b[n:])
		if k <= 0 || size == 0 || size >= 1<<62 || len(b) < n+k+32 {
			return nil, errors.New("bad size")
		}
		at += pages * alloc.Unit
		if at >= 1<<62 {
			return nil, errors.New("bad offset")
		}
		e := extentID{off: int64(at), size: int64(size)}
		copy(e.sum[:], b[n+k:])
		ids = append(ids, e)
		b = b[n+k+32:]
	}
	if len(b) != 0 {
		return nil, fmt.Errorf("%d bytes after the last extent", len(b))
	}
	return ids, nil
}

// removeIndex removes an index file that no process has open.
func removeIndex(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := region.Flock(f); err != nil {
		return err
	}
	return os.Remove(path)
}
