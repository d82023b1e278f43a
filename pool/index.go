package pool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
	"unsafe"

	"go.etcd.io/bbolt"
	bberrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// index is the owner's database. It has no table of extents: each holder, a layer or an image, lists
// its extents in full, and an extent is held while a holder lists it. So a crash cannot leave an
// extent without a holder, and removing a holder removes one record. An extent without a holder but
// with inodes in a run is dead: its space is not free yet.
//
//	meta     id, generation, epoch, tree
//	layers   key -> payload
//	held     key -> extents of the layer
//	images   key -> slot, entry of the slot table, bytes of the slot, span of the run
//	used     key -> extents of the image
//	runs     offset of a run -> inodes of regular files in it
//	erase    slot -> span that only the removed image used
//	records  kind -> key -> value of the store above
type index struct {
	db   *bbolt.DB
	path string
	// Test hooks: fail runs before every change, to cut there; done runs after it, to fail its sync.
	fail, done func(op string) error

	mu     sync.Mutex
	broken error // why the contents of the file are unknown; see update
	noted  []noted
}

// noted is a record that the next change writes, too.
type noted struct {
	kind, key string
	value     []byte
}

// errUnknown reports that nobody knows whether the file holds the last change.
var errUnknown = errors.New("whether the disk has it is unknown")

var (
	bucketMeta    = []byte("meta")
	bucketLayers  = []byte("layers")
	bucketHeld    = []byte("held")
	bucketImages  = []byte("images")
	bucketUsed    = []byte("used")
	bucketRuns    = []byte("runs")
	bucketErase   = []byte("erase")
	bucketRecords = []byte("records")
	keyID         = []byte("id")
	keyGen        = []byte("generation")
	keyEpoch      = []byte("epoch")
	keyTree       = []byte("tree")

	buckets = [][]byte{
		bucketMeta, bucketLayers, bucketHeld, bucketImages, bucketUsed, bucketRuns,
		bucketErase, bucketRecords,
	}
	// perEpoch lists the buckets that a new epoch empties.
	perEpoch = [][]byte{bucketImages, bucketUsed, bucketRuns, bucketErase}
)

// openIndex opens or creates the database of a pool. durable is false for regions that end with the
// kernel: the page cache with the database lives as long.
func openIndex(path string, durable bool) (*index, error) {
	db, err := bbolt.Open(path, 0o600,
		&bbolt.Options{Timeout: time.Millisecond, NoSync: !durable, FreelistType: bbolt.FreelistMapType})
	switch {
	case errors.Is(err, bberrors.ErrTimeout):
		return nil, &region.BusyError{Path: path, PID: region.LockHolder(path)}
	case errors.Is(err, bberrors.ErrInvalid), errors.Is(err, bberrors.ErrVersionMismatch),
		errors.Is(err, bberrors.ErrChecksum):
		return nil, fmt.Errorf("index %q: %w: %w", path, ErrCorrupt, err)
	case err != nil:
		return nil, fmt.Errorf("index %q: %w", path, err)
	}
	never := func(string) error { return nil }
	return &index{db: db, path: path, fail: never, done: never}, nil
}

func (x *index) close() error { return x.db.Close() }

// format writes the identity of a new pool into an empty index.
func (x *index) format(id [16]byte, gen uint64, uuid [16]byte, t treeArea) error {
	return x.update("format", func(tx *bbolt.Tx) error {
		for _, name := range buckets {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		if err := tx.Bucket(bucketMeta).Put(keyID, id[:]); err != nil {
			return err
		}
		return putEpoch(tx, gen, uuid, t)
	})
}

func putEpoch(tx *bbolt.Tx, gen uint64, uuid [16]byte, t treeArea) error {
	if err := tx.Bucket(bucketMeta).Put(keyEpoch, uuid[:]); err != nil {
		return err
	}
	return errors.Join(putGeneration(tx, gen), t.put(tx))
}

// newEpoch deletes all images and the tree area.
func (x *index) newEpoch(gen uint64, uuid [16]byte, t treeArea) error {
	return x.update("epoch", func(tx *bbolt.Tx) error {
		for _, name := range perEpoch {
			if err := tx.DeleteBucket(name); err != nil {
				return err
			}
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		return putEpoch(tx, gen, uuid, t)
	})
}

// update makes one change atomically. If the disk fails at the very end, the change may or may not be
// in the file, now or later. No further change is allowed then: the caller must keep everything that
// either outcome needs, until the pool is opened anew and the file is read.
func (x *index) update(op string, f func(tx *bbolt.Tx) error) error {
	wrap := func(err error) error { return fmt.Errorf("index %q: %s: %w", x.path, op, err) }
	if err := x.unknown(); err != nil {
		return wrap(err)
	}
	if err := x.fail(op); err != nil {
		return wrap(err)
	}
	notes := x.takeNotes()
	before := x.transaction()
	err := x.db.Update(func(tx *bbolt.Tx) error {
		for _, n := range notes {
			if err := putRecord(tx, n); err != nil {
				return err
			}
		}
		return f(tx)
	})
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
		x.noteFirst(notes)
		return wrap(err)
	}
	return nil
}

// noteLast queues a record for the next change.
func (x *index) noteLast(n noted) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.noted = append(x.noted, n)
}

// noteFirst puts records back at the front of the queue.
func (x *index) noteFirst(records []noted) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.noted = append(records[:len(records):len(records)], x.noted...)
}

func (x *index) takeNotes() []noted {
	x.mu.Lock()
	defer x.mu.Unlock()
	notes := x.noted
	x.noted = nil
	return notes
}

// transaction returns the number of the newest transaction that readers see.
func (x *index) transaction() (id int) {
	_ = x.db.View(func(tx *bbolt.Tx) error { // fails on a closed database, whose changes fail, too
		id = tx.ID()
		return nil
	})
	return id
}

// unknown returns the error that made the contents of the file unknown, or nil.
func (x *index) unknown() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.broken
}

// putGeneration records the next header's generation. The region has that or the one before.
func putGeneration(tx *bbolt.Tx, gen uint64) error {
	return tx.Bucket(bucketMeta).Put(keyGen, binary.LittleEndian.AppendUint64(nil, gen))
}

func (x *index) setGeneration(gen uint64) error {
	return x.update("generation", func(tx *bbolt.Tx) error { return putGeneration(tx, gen) })
}

func (x *index) putLayer(key string, payload []byte, held []*extent) error {
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
		dropPages(v)
		return nil
	})
	return out, err
}

// dropPages drops pages of the mapped file from this process's memory once v was decoded: lists of a
// million extents would otherwise stay beside their decoded form. The page cache keeps them, and v
// stays valid.
func dropPages(v []byte) {
	page := uintptr(os.Getpagesize())
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(v))) & (page - 1)
	if uintptr(len(v)) < skip+page {
		return
	}
	whole := v[skip:][:(uintptr(len(v))-skip)&^(page-1)]
	_ = unix.Madvise(whole, unix.MADV_DONTNEED) // advisory
}

// storedImage is an image as the index records it.
type storedImage struct {
	Image
	slot []byte     // as it is published
	own  alloc.Span // part of the run that only this image uses
	// unlisted is set if the image was removed while readers used it.
	unlisted bool
}

const storedSize = 4 + entrySize + daxfs.SlotSize + 16 + 1

func (m *storedImage) encode() []byte {
	b := make([]byte, storedSize)
	le := binary.LittleEndian
	le.PutUint32(b, uint32(m.Slot))
	encodeImage(b[4:], &m.Image)
	copy(b[4+entrySize:], m.slot)
	putSpan(b[4+entrySize+daxfs.SlotSize:], m.own)
	if m.unlisted {
		b[storedSize-1] = 1
	}
	return b
}

func putSpan(b []byte, s alloc.Span) {
	binary.LittleEndian.PutUint64(b, uint64(s.Off))
	binary.LittleEndian.PutUint64(b[8:], uint64(s.Len))
}

func getSpan(b []byte, size int64) (alloc.Span, error) {
	s := alloc.Span{Off: int64(binary.LittleEndian.Uint64(b)), Len: int64(binary.LittleEndian.Uint64(b[8:]))}
	if s.Off < 0 || s.Len < 0 || s.Off > size || s.Len > size-s.Off || s.Off%alloc.Unit != 0 || s.Len%alloc.Unit != 0 {
		return s, fmt.Errorf("span of %d bytes at %d", s.Len, s.Off)
	}
	return s, nil
}

func decodeStored(b []byte, size int64) (*storedImage, error) {
	if len(b) != storedSize {
		return nil, fmt.Errorf("entry of %d bytes, expected %d", len(b), storedSize)
	}
	img, err := decodeImage(b[4:4+entrySize], int(binary.LittleEndian.Uint32(b)), size)
	if err != nil {
		return nil, err
	}
	m := &storedImage{Image: img, slot: bytes.Clone(b[4+entrySize:][:daxfs.SlotSize]), unlisted: b[storedSize-1] != 0}
	m.own, err = getSpan(b[4+entrySize+daxfs.SlotSize:], size)
	return m, err
}

// putImage records an image, the encoded inodes of its run, if any, and the end of the used tree area.
func (x *index) putImage(m *storedImage, used []*extent, run int64, newInodes []byte, t treeArea, gen uint64) error {
	return x.update("put image", func(tx *bbolt.Tx) error {
		if err := tx.Bucket(bucketImages).Put([]byte(m.Key), m.encode()); err != nil {
			return err
		}
		if err := tx.Bucket(bucketUsed).Put([]byte(m.Key), encodeExtents(used)); err != nil {
			return err
		}
		if len(newInodes) > 0 {
			if err := tx.Bucket(bucketRuns).Put(runKey(run), newInodes); err != nil {
				return err
			}
		}
		return errors.Join(t.put(tx), putGeneration(tx, gen))
	})
}

// putStored records a change of an image: of its document, or of whether the catalogue lists it.
func (x *index) putStored(m *storedImage, gen uint64) error {
	return x.update("change image", func(tx *bbolt.Tx) error {
		if err := tx.Bucket(bucketImages).Put([]byte(m.Key), m.encode()); err != nil {
			return err
		}
		return putGeneration(tx, gen)
	})
}

// removeImage deletes an image and records the span that must be erased.
func (x *index) removeImage(m *storedImage, gen uint64) error {
	return x.update("remove image", func(tx *bbolt.Tx) error {
		if err := tx.Bucket(bucketImages).Delete([]byte(m.Key)); err != nil {
			return err
		}
		if err := tx.Bucket(bucketUsed).Delete([]byte(m.Key)); err != nil {
			return err
		}
		b := make([]byte, 16)
		putSpan(b, m.own)
		if err := tx.Bucket(bucketErase).Put(slotKey(m.Slot), b); err != nil {
			return err
		}
		return putGeneration(tx, gen)
	})
}

// erased deletes the records of spans that were erased.
func (x *index) erased(slots []int) error {
	return x.update("erase", func(tx *bbolt.Tx) error {
		for _, i := range slots {
			if err := tx.Bucket(bucketErase).Delete(slotKey(i)); err != nil {
				return err
			}
		}
		return nil
	})
}

// putRuns replaces lists of inodes; an empty list is deleted.
func (x *index) putRuns(runs map[int64][]runInode) error {
	return x.update("put runs", func(tx *bbolt.Tx) error {
		for run, inodes := range runs {
			var err error
			if len(inodes) == 0 {
				err = tx.Bucket(bucketRuns).Delete(runKey(run))
			} else {
				err = tx.Bucket(bucketRuns).Put(runKey(run), encodeRun(inodes))
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func runKey(off int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(off)) }
func slotKey(i int) []byte    { return binary.BigEndian.AppendUint32(nil, uint32(i)) }

// setRecord stores a record of the layer above; a nil value removes it.
func (x *index) setRecord(kind, key string, value []byte) error {
	return x.update("record "+kind, func(tx *bbolt.Tx) error { return putRecord(tx, noted{kind, key, value}) })
}

func putRecord(tx *bbolt.Tx, n noted) error {
	b, err := tx.Bucket(bucketRecords).CreateBucketIfNotExists([]byte(n.kind))
	if err != nil {
		return err
	}
	if n.value == nil {
		return b.Delete([]byte(n.key))
	}
	return b.Put([]byte(n.key), n.value)
}

// flush writes the queued records.
func (x *index) flush() error {
	x.mu.Lock()
	waiting := len(x.noted)
	x.mu.Unlock()
	if waiting == 0 {
		return nil
	}
	return x.update("records", func(*bbolt.Tx) error { return nil })
}

func (x *index) records(kind string) (map[string][]byte, error) {
	out := map[string][]byte{}
	err := x.db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketRecords).Bucket([]byte(kind))
		if b == nil {
			return nil
		}
		return b.ForEach(func(k, v []byte) error {
			out[string(k)] = append([]byte{}, v...)
			return nil
		})
	})
	return out, err
}

// contents is an index without payloads and records.
type contents struct {
	id     [16]byte
	gen    uint64
	uuid   [16]byte // of the epoch
	tree   treeArea
	empty  bool // never formatted
	layers map[string][]extentID
	images map[string]*storedImage
	used   map[string][]extentID
	runs   map[int64][]runInode
	erase  map[int]alloc.Span // slots of removed images
}

// load reads the index and checks everything that does not need the region. size is the pool's.
func (x *index) load(size int64) (*contents, error) {
	c := &contents{
		layers: map[string][]extentID{}, images: map[string]*storedImage{}, used: map[string][]extentID{},
		runs: map[int64][]runInode{}, erase: map[int]alloc.Span{},
	}
	err := x.db.View(func(tx *bbolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		if meta == nil {
			c.empty = true
			return nil
		}
		if err := c.loadMeta(meta, size); err != nil {
			return err
		}
		for _, name := range buckets {
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
		if err := c.loadTree(tx, size); err != nil {
			return err
		}
		return tx.Bucket(bucketImages).ForEach(func(k, v []byte) error {
			m, err := decodeStored(v, size)
			if err != nil {
				return fmt.Errorf("image %q: %w", k, err)
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

func (c *contents) loadMeta(meta *bbolt.Bucket, size int64) (err error) {
	id, gen, uuid := meta.Get(keyID), meta.Get(keyGen), meta.Get(keyEpoch)
	if len(id) != len(c.id) || len(gen) != 8 || len(uuid) != len(c.uuid) {
		return fmt.Errorf("pool id of %d bytes, generation of %d, epoch of %d", len(id), len(gen), len(uuid))
	}
	copy(c.id[:], id)
	copy(c.uuid[:], uuid)
	c.gen = binary.LittleEndian.Uint64(gen)
	c.tree, err = decodeTree(meta.Get(keyTree), size)
	return err
}

// loadTree reads the runs and the spans to erase.
func (c *contents) loadTree(tx *bbolt.Tx, size int64) error {
	err := tx.Bucket(bucketRuns).ForEach(func(k, v []byte) error {
		inodes, err := decodeRun(v)
		if err != nil || len(k) != 8 {
			return fmt.Errorf("run %x: %w", k, err)
		}
		dropPages(v)
		c.runs[int64(binary.BigEndian.Uint64(k))] = inodes
		return nil
	})
	if err != nil {
		return err
	}
	return tx.Bucket(bucketErase).ForEach(func(k, v []byte) error {
		if len(k) != 4 || len(v) != 16 {
			return fmt.Errorf("removed image %x: %d bytes", k, len(v))
		}
		s, err := getSpan(v, size)
		c.erase[int(binary.BigEndian.Uint32(k))] = s
		return err
	})
}

// loadExtents reads the lists of one kind of holder, each with its holder in the other bucket.
func loadExtents(lists, holders *bbolt.Bucket, into map[string][]extentID) error {
	if a, b := lists.Stats().KeyN, holders.Stats().KeyN; a != b {
		return fmt.Errorf("%d lists of extents for %d holders", a, b)
	}
	return lists.ForEach(func(k, v []byte) error {
		ids, err := decodeExtents(v)
		if err != nil {
			return fmt.Errorf("extents of %q: %w", k, err)
		}
		dropPages(v)
		if holders.Get(k) == nil {
			return fmt.Errorf("extents of %q, which does not exist", k)
		}
		into[string(k)] = ids
		return nil
	})
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
