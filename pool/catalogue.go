package pool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"
	"unicode/utf8"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// Image is one image in a pool: the tree at a slot of the mounted pool.
type Image struct {
	Key     string    `json:"key"`     // 1 to MaxKey bytes of UTF-8 without NUL
	Slot    int       `json:"slot"`    // in the root directory of the live tree
	UUID    [16]byte  `json:"-"`       // of the tree
	Created time.Time `json:"created"` // when it was added
	// Window and WindowSize are the byte range that daxfs.ko mounts, and Segment the length of the
	// metadata at its start: multiples of 2 MiB, or all 0 in a pool without windows.
	Window     int64 `json:"window,omitempty"`
	WindowSize int64 `json:"windowSize,omitempty"`
	Segment    int64 `json:"segment,omitempty"`
	// Document is the place of the store's document about the image: see ReadDocument.
	Document Document `json:"-"`
}

// Name returns the name of the image in the root directory of the mounted pool.
func (m Image) Name() string { return daxfs.Geometry{}.SlotName(m.Slot) }

// Catalogue describes a pool to readers that map it.
type Catalogue struct {
	PoolID     [16]byte
	Generation uint64         // rises with every change
	Size       int64          // bytes of the pool
	Geometry   daxfs.Geometry // of the live tree; its UUID is that of the epoch
	SlotsUsed  int            // slots used in this epoch, including those of removed images
	Windows    bool           // images have windows for daxfs.ko
	DAX        bool           // each extent belongs to one inode
	Images     []Image        // by slot
}

const entryPublished = 1

// encodeImage writes the entry of an image, entrySize bytes.
func encodeImage(b []byte, m *Image) {
	b = b[:entrySize]
	clear(b)
	le := binary.LittleEndian
	le.PutUint32(b[0:], entryPublished)
	le.PutUint64(b[8:], uint64(m.Window))
	le.PutUint64(b[16:], uint64(m.WindowSize))
	le.PutUint64(b[24:], uint64(m.Segment))
	copy(b[32:48], m.UUID[:])
	le.PutUint64(b[48:], uint64(m.Created.UnixNano()))
	le.PutUint16(b[56:], uint16(len(m.Key)))
	le.PutUint64(b[docOff:], uint64(m.Document.Off))
	le.PutUint64(b[docOff+8:], uint64(m.Document.Size))
	copy(b[docOff+16:], m.Document.Sum[:])
	copy(b[keyOff:], m.Key)
	le.PutUint32(b[4:], entrySum(b))
}

// entrySum is the checksum of an entry with its checksum field taken as zero.
func entrySum(b []byte) uint32 {
	sum := crc32.Update(0, castagnoli, b[:4])
	sum = crc32.Update(sum, castagnoli, []byte{0, 0, 0, 0})
	return crc32.Update(sum, castagnoli, b[8:entrySize])
}

// decodeImage reads the entry of a slot in a pool of size bytes.
func decodeImage(b []byte, slot int, size int64) (Image, error) {
	le := binary.LittleEndian
	m := Image{
		Slot: slot, Window: int64(le.Uint64(b[8:])), WindowSize: int64(le.Uint64(b[16:])),
		Segment: int64(le.Uint64(b[24:])),
		Created: time.Unix(0, int64(le.Uint64(b[48:]))),
	}
	if state := le.Uint32(b); state != entryPublished {
		return m, fmt.Errorf("slot %d: state %d, expected 0 or %d", slot, state, entryPublished)
	}
	if got, want := entrySum(b), le.Uint32(b[4:]); got != want {
		return m, fmt.Errorf("slot %d: checksum %#x, stored is %#x", slot, got, want)
	}
	copy(m.UUID[:], b[32:48])
	n := int(le.Uint16(b[56:]))
	if n == 0 || n > MaxKey {
		return m, fmt.Errorf("slot %d: key of %d bytes, expected 1 to %d", slot, n, MaxKey)
	}
	m.Key = string(b[keyOff : keyOff+n])
	if err := checkKey(m.Key); err != nil {
		return m, fmt.Errorf("slot %d: %w", slot, err)
	}
	m.Document = Document{Off: int64(le.Uint64(b[docOff:])), Size: int64(le.Uint64(b[docOff+8:]))}
	copy(m.Document.Sum[:], b[docOff+16:])
	if err := m.Document.check(size); err != nil {
		return m, fmt.Errorf("image %q: %w", m.Key, err)
	}
	aligned := m.Window%alloc.Align == 0 && m.WindowSize%alloc.Align == 0 && m.Segment%alloc.Align == 0
	none := m.Window == 0 && m.WindowSize == 0 && m.Segment == 0
	switch {
	case !isZero(b[58:64]) || !isZero(b[keyOff+n:entrySize]):
		return m, fmt.Errorf("image %q: reserved bytes are not zero", m.Key)
	case none:
	case !aligned || m.Window <= 0 || m.WindowSize <= 0 || m.Window > size || m.WindowSize > size-m.Window:
		return m, fmt.Errorf("image %q: window of %d bytes at %d of %d", m.Key, m.WindowSize, m.Window, size)
	case m.Segment <= 0 || m.Segment > m.WindowSize:
		return m, fmt.Errorf("image %q: segment of %d bytes in a window of %d", m.Key, m.Segment, m.WindowSize)
	}
	return m, nil
}

func checkKey(key string) error {
	if len(key) == 0 || len(key) > MaxKey || !utf8.ValidString(key) || bytes.IndexByte([]byte(key), 0) >= 0 {
		return fmt.Errorf("key %q, expected 1 to %d bytes of UTF-8 without NUL: %w", key, MaxKey, ErrInvalid)
	}
	return nil
}

// ReadCatalogue reads the catalogue of a pool without owning it and without locks, from another
// process or from another kernel that maps the same memory. It trusts no byte. Every image that it
// returns was published when it was read. While the owner makes changes it reads again until nothing
// changes, a bounded number of times.
//
// Errors: ErrWiped if there is no pool, ErrVersion if the pool has another version, ErrCorrupt if it
// cannot be valid. With ErrCorrupt the catalogue is nil if the pool itself is damaged. If only entries
// are, it has all other images, and the error names the damaged entries.
func ReadCatalogue(r io.ReaderAt) (*Catalogue, error) {
	var c *Catalogue
	var last error
	// A change may overtake the reader; this repeats only if changes never stop. An entry that is being
	// written looks damaged for a moment, before the generation rises.
	for try, damaged := 0, 0; try < 100 && damaged < 10; try++ {
		hs, err := readHeaders(r)
		if err != nil {
			return nil, wipedError(err)
		}
		c, last = readSlots(r, hs[0])
		again, err := readHeaders(r)
		same := err == nil && again[0].generation == hs[0].generation
		if same && last == nil {
			break
		}
		if same {
			damaged++
			time.Sleep(100 * time.Microsecond)
		}
	}
	if last != nil {
		return c, fmt.Errorf("%w: %w", ErrCorrupt, last)
	}
	return c, nil
}

// readSlots reads the entries of all used slots of a header. With an error it returns nil or a
// catalogue without the entries that the error names.
func readSlots(r io.ReaderAt, h *header) (*Catalogue, error) {
	c := &Catalogue{
		PoolID: h.id, Generation: h.generation, Size: h.size, Geometry: h.geo, SlotsUsed: h.used,
		Windows: h.windows, DAX: h.dax,
	}
	const part = 256 // entries per read
	b := make([]byte, part*entrySize)
	keys := map[string]bool{}
	var errs []error
	for first := 0; first < h.used; first += part {
		n := min(part, h.used-first)
		if k, err := r.ReadAt(b[:n*entrySize], tableOff+int64(first)*entrySize); k < n*entrySize {
			return nil, fmt.Errorf("slot table at entry %d: %w", first, err)
		}
		for i := range n {
			e := b[i*entrySize:][:entrySize]
			if isZero(e[:4]) {
				continue
			}
			m, err := decodeImage(e, first+i, h.size)
			if err == nil && keys[m.Key] {
				err = fmt.Errorf("slot %d: image %q twice", m.Slot, m.Key)
			}
			if err != nil {
				if len(errs) < maxNamed {
					errs = append(errs, err)
				}
				continue
			}
			keys[m.Key] = true
			c.Images = append(c.Images, m)
		}
	}
	return c, errors.Join(errs...)
}

// maxNamed limits how many damaged entries an error names.
const maxNamed = 8

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
