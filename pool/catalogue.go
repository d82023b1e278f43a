package pool

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// Image is one image in a pool: the window [Off, Off+Size) that is mounted for it.
type Image struct {
	Key     string    `json:"key"`     // chain ID or another name, 1 to MaxKey bytes of UTF-8
	Off     int64     `json:"offset"`  // start of the window and of the segment, a multiple of 2 MiB
	Size    int64     `json:"size"`    // bytes of the window, a multiple of 2 MiB
	Seg     int64     `json:"segment"` // bytes of the segment at the start of the window, a multiple of 2 MiB
	UUID    [16]byte  `json:"-"`       // of the image
	Created time.Time `json:"created"` // when it was added
}

// Catalogue is what a pool says about itself to whoever maps it.
type Catalogue struct {
	PoolID     [16]byte
	Generation uint64 // rises with every change
	Size       int64  // bytes of the pool
	Images     []Image
}

// encodeImage writes one entry of entrySize bytes.
func encodeImage(b []byte, m *Image) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], uint64(m.Off))
	le.PutUint64(b[8:], uint64(m.Size))
	le.PutUint64(b[16:], uint64(m.Seg))
	copy(b[24:40], m.UUID[:])
	le.PutUint64(b[40:], uint64(m.Created.UnixNano()))
	le.PutUint16(b[48:], uint16(len(m.Key)))
	clear(b[50:entrySize])
	copy(b[64:], m.Key)
}

// decodeImage reads one entry of a pool of size bytes.
func decodeImage(b []byte, size int64) (Image, error) {
	le := binary.LittleEndian
	m := Image{Off: int64(le.Uint64(b[0:])), Size: int64(le.Uint64(b[8:])), Seg: int64(le.Uint64(b[16:]))}
	copy(m.UUID[:], b[24:40])
	m.Created = time.Unix(0, int64(le.Uint64(b[40:])))
	n := int(le.Uint16(b[48:]))
	if n == 0 || n > MaxKey {
		return m, fmt.Errorf("key of %d bytes, expected 1 to %d", n, MaxKey)
	}
	m.Key = string(b[64 : 64+n])
	if err := checkKey(m.Key); err != nil {
		return m, err
	}
	switch {
	case !isZero(b[50:64]) || !isZero(b[64+n:entrySize]):
		return m, fmt.Errorf("image %q: reserved bytes are not zero", m.Key)
	case m.Off < headArea || m.Off%alloc.Align != 0 || m.Off >= size:
		return m, fmt.Errorf("image %q: starts at %d of %d", m.Key, m.Off, size)
	case m.Size <= 0 || m.Size%alloc.Align != 0 || m.Size > size-m.Off:
		return m, fmt.Errorf("image %q: window of %d bytes at %d of %d", m.Key, m.Size, m.Off, size)
	case m.Seg <= 0 || m.Seg%alloc.Align != 0 || m.Seg > m.Size:
		return m, fmt.Errorf("image %q: segment of %d bytes in a window of %d", m.Key, m.Seg, m.Size)
	}
	return m, nil
}

func checkKey(key string) error {
	if len(key) == 0 || len(key) > MaxKey || !utf8.ValidString(key) || bytes.IndexByte([]byte(key), 0) >= 0 {
		return fmt.Errorf("key %q, expected 1 to %d bytes of UTF-8 without NUL: %w", key, MaxKey, ErrInvalid)
	}
	return nil
}

// encodeCatalogue returns the bytes of a catalogue, its images by offset.
func encodeCatalogue(images []Image) []byte {
	images = slices.Clone(images)
	slices.SortFunc(images, func(a, b Image) int { return cmp.Compare(a.Off, b.Off) })
	b := make([]byte, len(images)*entrySize)
	for i := range images {
		encodeImage(b[i*entrySize:], &images[i])
	}
	return b
}

// decodeCatalogue checks the checksum before it looks at an entry.
func decodeCatalogue(h *header, b []byte) (*Catalogue, error) {
	if sum := crc32.Checksum(b, castagnoli); sum != h.sum {
		return nil, fmt.Errorf("catalogue of generation %d: checksum %#x, stored is %#x", h.generation, sum, h.sum)
	}
	c := &Catalogue{PoolID: h.id, Generation: h.generation, Size: h.size}
	keys := make(map[string]bool, h.count)
	end := int64(headArea)
	for ; len(b) > 0; b = b[entrySize:] {
		m, err := decodeImage(b[:entrySize], h.size)
		if err != nil {
			return nil, fmt.Errorf("catalogue of generation %d: %w", h.generation, err)
		}
		if keys[m.Key] {
			return nil, fmt.Errorf("catalogue of generation %d: image %q twice", h.generation, m.Key)
		}
		if m.Off < end {
			return nil, fmt.Errorf("catalogue of generation %d: segment of image %q at %d, expected %d or higher", h.generation, m.Key, m.Off, end)
		}
		keys[m.Key] = true
		end = m.Off + m.Seg
		c.Images = append(c.Images, m)
	}
	return c, nil
}

// ReadCatalogue reads the catalogue of a pool without being its owner and without locks: from another process or from
// another kernel that maps the same memory. It trusts no byte, and returns one whole generation even while the owner
// writes the next: the owner never writes over the newest one.
//
// Errors: ErrWiped where there is no pool, ErrCorrupt where there is one that can not be true.
func ReadCatalogue(r io.ReaderAt) (*Catalogue, error) {
	var last error
	// Two changes may overtake one reader; many times in a row only if they never stop.
	for range 100 {
		hs, err := readHeaders(r)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrWiped, err)
		}
		for _, h := range hs {
			c, err := readCatalogueOf(r, h)
			if err == nil {
				return c, nil
			}
			last = err
		}
		if again, err := readHeaders(r); err == nil && again[0].generation == hs[0].generation {
			break
		}
	}
	return nil, fmt.Errorf("%w: %w", ErrCorrupt, last)
}

func readCatalogueOf(r io.ReaderAt, h *header) (*Catalogue, error) {
	b := make([]byte, int(h.count)*entrySize)
	if n, err := r.ReadAt(b, catalogueOff(h.generation)); n < len(b) && err != nil {
		return nil, errors.Join(fmt.Errorf("catalogue of generation %d", h.generation), err)
	}
	return decodeCatalogue(h, b)
}

func crcOf(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
