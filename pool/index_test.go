package pool

import (
	"encoding/binary"
	"errors"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// changedIndex is the index of a closed pool, which a test changes.
type changedIndex struct {
	t  *testing.T
	tx *bbolt.Tx
}

func (x changedIndex) get(bucket []byte, key string) []byte {
	return append([]byte{}, x.tx.Bucket(bucket).Get([]byte(key))...)
}

func (x changedIndex) put(bucket []byte, key string, value []byte) {
	noError(x.t, x.tx.Bucket(bucket).Put([]byte(key), value))
}

func (x changedIndex) remove(bucket []byte, key string) {
	noError(x.t, x.tx.Bucket(bucket).Delete([]byte(key)))
}

// image changes image a, which is then stored under a key.
func (x changedIndex) image(key string, change func(m *storedImage)) {
	m, err := decodeStored(x.get(bucketImages, "a"), simSize)
	noError(x.t, err)
	m.Key = key
	change(m)
	x.put(bucketImages, key, m.encode())
}

// layer changes the list of layer a.
func (x changedIndex) layer(change func(ids []extentID)) {
	ids, err := decodeExtents(x.get(bucketHeld, "a"))
	noError(x.t, err)
	change(ids)
	x.put(bucketHeld, "a", encodeExtents(extentsOf(ids...)))
}

// tree changes the words of the tree area: what is used, then the offset and length of each chunk.
func (x changedIndex) tree(change func(words []uint64)) {
	b := x.get(bucketMeta, string(keyTree))
	words := make([]uint64, len(b)/8)
	for i := range words {
		words[i] = binary.LittleEndian.Uint64(b[8*i:])
	}
	change(words)
	b = nil
	for _, w := range words {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	x.put(bucketMeta, string(keyTree), b)
}

// TestOpenRefusesIndex contradicts one thing in an index at a time. Opening the pool would give space to two
// owners, or lose some: it is refused.
func TestOpenRefusesIndex(t *testing.T) {
	if testing.Short() {
		t.Skip("slow: opens a pool dozens of times")
	}
	dir := fastDir(t)
	r, index := newSimRegion(simSize, &faults{}), filepath.Join(dir, "index")
	p, err := Create(r, index, Options{Slots: 8, Windows: Yes})
	noError(t, err)
	addImage(t, p, "a", bodies.a, bodies.b)
	addImage(t, p, "b", bodies.b, bodies.d)
	noError(t, p.Close())
	for name, change := range map[string]func(x changedIndex){
		"nothing":                func(changedIndex) {},
		"extent of two digests":  func(x changedIndex) { x.layer(func(ids []extentID) { ids[0].sum[0]++ }) },
		"extent in another":      func(x changedIndex) { x.layer(func(ids []extentID) { ids[0].off += alloc.Unit }) },
		"extent behind the pool": func(x changedIndex) { x.layer(func(ids []extentID) { ids[1].off = simSize }) },
		"extent in the header":   func(x changedIndex) { x.layer(func(ids []extentID) { ids[0].off = alloc.Unit }) },
		"inode of another size": func(x changedIndex) {
			k, v := x.tx.Bucket(bucketRuns).Cursor().First()
			list, err := decodeRun(v)
			noError(x.t, err)
			list[0].size++
			x.put(bucketRuns, string(k), encodeRun(list))
		},
		"list without layer": func(x changedIndex) { x.remove(bucketLayers, "a") },
		"layer without list": func(x changedIndex) { x.remove(bucketHeld, "a") },
		"list of another layer": func(x changedIndex) {
			x.remove(bucketLayers, "a")
			x.put(bucketLayers, "x", nil)
		},
		"image without list": func(x changedIndex) { x.remove(bucketUsed, "a") },
		"image under another key": func(x changedIndex) {
			x.put(bucketImages, "x", x.get(bucketImages, "a"))
			x.put(bucketUsed, "x", x.get(bucketUsed, "a"))
			x.remove(bucketImages, "a")
			x.remove(bucketUsed, "a")
		},
		"two images at one slot": func(x changedIndex) {
			x.image("c", func(m *storedImage) { m.Window, m.WindowSize, m.Segment = 0, 0, 0 })
			x.put(bucketUsed, "c", x.get(bucketUsed, "a"))
		},
		"slot behind the last": func(x changedIndex) { x.image("a", func(m *storedImage) { m.Slot = 8 }) },
		"contents not in window": func(x changedIndex) {
			x.image("a", func(m *storedImage) { m.WindowSize = m.Segment })
		},
		"contents in segment": func(x changedIndex) {
			x.image("a", func(m *storedImage) { m.Segment = m.WindowSize })
		},
		"own part misaligned": func(x changedIndex) { x.image("a", func(m *storedImage) { m.own.Off++ }) },
		"own part too long":   func(x changedIndex) { x.image("a", func(m *storedImage) { m.own.Len = simSize }) },
		"own part behind the pool": func(x changedIndex) {
			x.image("a", func(m *storedImage) { m.own.Off = 2 * simSize })
		},
		"document over contents": func(x changedIndex) {
			x.image("a", func(m *storedImage) {
				ids, err := decodeExtents(x.get(bucketUsed, "a"))
				noError(x.t, err)
				m.Document = Document{Off: ids[0].off, Size: ids[0].size, Sum: ids[0].sum}
			})
		},
		"image to be erased":   func(x changedIndex) { x.put(bucketErase, string(slotKey(1)), make([]byte, 16)) },
		"no slot to be erased": func(x changedIndex) { x.put(bucketErase, string(slotKey(8)), make([]byte, 16)) },
		"tree area used before its chunk": func(x changedIndex) {
			x.tree(func(w []uint64) { w[0] = w[len(w)-2] - alloc.Unit })
		},
		"tree area used behind its chunk": func(x changedIndex) {
			x.tree(func(w []uint64) { w[0] = w[len(w)-2] + w[len(w)-1] + alloc.Unit })
		},
		"chunk behind the pool": func(x changedIndex) { x.tree(func(w []uint64) { w[len(w)-1] = 2 * simSize }) },
		"no bucket":             func(x changedIndex) { noError(x.t, x.tx.DeleteBucket(bucketErase)) },
		"no generation":         func(x changedIndex) { x.remove(bucketMeta, string(keyGen)) },
		"no tree area":          func(x changedIndex) { x.remove(bucketMeta, string(keyTree)) },
	} {
		t.Run(name, func(t *testing.T) {
			copied := filepath.Join(dir, "copy")
			copyFile(t, index, copied)
			db, err := bbolt.Open(copied, 0o600, &bbolt.Options{NoSync: true})
			noError(t, err)
			noError(t, db.Update(func(tx *bbolt.Tx) error {
				change(changedIndex{t, tx})
				return nil
			}))
			noError(t, db.Close())
			p, err := Open(r.syncedClone(), copied, Options{})
			if err == nil {
				defer p.Close()
			}
			if name == "nothing" {
				noError(t, err)
			} else if !errors.Is(err, ErrCorrupt) {
				t.Errorf("open: %v, expected %v", err, ErrCorrupt)
			}
		})
	}
}

// TestOpenRefusesCopies: an older copy of the region or the index, or those of another pool, do not open.
func TestOpenRefusesCopies(t *testing.T) {
	dir := fastDir(t)
	index, old, other := filepath.Join(dir, "index"), filepath.Join(dir, "old"), filepath.Join(dir, "other")
	r, r2 := newSimRegion(simSize, &faults{}), newSimRegion(simSize, &faults{})
	p, err := Create(r, index, Options{})
	noError(t, err)
	oldRegion := r.syncedClone()
	copyFile(t, index, old)
	addImage(t, p, "a", bodies.a)
	addImage(t, p, "b", bodies.b)
	noError(t, p.Close())
	p2, err := Create(r2, other, Options{})
	noError(t, err)
	addImage(t, p2, "a", bodies.a)
	addImage(t, p2, "b", bodies.b)
	if p2.Generation() != p.Generation() {
		t.Errorf("generations %d and %d: the test needs equal ones", p.Generation(), p2.Generation())
	}
	noError(t, p2.Close())
	for _, c := range []struct {
		name  string
		r     *simRegion
		index string
		want  error
	}{
		{"older region", oldRegion, index, ErrWiped},
		{"older index", r, old, ErrForeign},
		{"index of another pool", r, other, ErrForeign},
		{"pool of another index", r2, index, ErrForeign},
		{"both", r, index, nil},
	} {
		p, err := Open(c.r.syncedClone(), c.index, Options{})
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, expected %v", c.name, err, c.want)
		}
		if err == nil {
			noError(t, p.Close())
		}
	}
}
