package pool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// The layout of the bottom of a pool; docs/pool-format.md is normative for it.
const (
	magic         = "DAXFSPL\x01"
	formatVersion = 1
	headerSize    = 4096
	headArea      = 2 << 20           // header copies and catalogue areas; segments start here
	entrySize     = 256               // one image in the catalogue
	catArea       = headArea/2 - 4096 // bytes of each of two catalogue areas
	maxImages     = catArea / entrySize
	// MaxKey is the length of the longest key of an image or layer, in bytes.
	MaxKey = entrySize - 64
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errVersion reports a header of another version of the format. What it is the header of may be in use.
var errVersion = errors.New("made by another version")

// header is one of the two copies at 0 and 4096.
type header struct {
	id         [16]byte
	generation uint64 // even generations are in copy 0, odd ones in copy 1
	size       int64  // of the pool
	count      uint32 // images in the catalogue of this generation
	sum        uint32 // CRC-32C of the catalogue
}

func headerOff(gen uint64) int64    { return int64(gen%2) * headerSize }
func catalogueOff(gen uint64) int64 { return 2*headerSize + int64(gen%2)*catArea }

func (h *header) encode() []byte {
	b := make([]byte, headerSize)
	le := binary.LittleEndian
	copy(b, magic)
	le.PutUint32(b[8:], formatVersion)
	le.PutUint32(b[12:], entrySize)
	copy(b[16:], h.id[:])
	le.PutUint64(b[32:], h.generation)
	le.PutUint64(b[40:], uint64(h.size))
	le.PutUint64(b[48:], uint64(headArea))
	le.PutUint64(b[56:], uint64(catalogueOff(h.generation)))
	le.PutUint32(b[64:], h.count)
	le.PutUint32(b[68:], h.sum)
	le.PutUint32(b[headerSize-4:], crc32.Checksum(b[:headerSize-4], castagnoli))
	return b
}

// decodeHeader checks one copy in a fixed order: magic, version, checksum, then each field.
func decodeHeader(b []byte, slot int64) (*header, error) {
	le := binary.LittleEndian
	if string(b[:8]) != magic {
		return nil, fmt.Errorf("no pool header: magic %q, expected %q", b[:8], magic)
	}
	if v := le.Uint32(b[8:]); v != formatVersion {
		return nil, fmt.Errorf("pool format version %d, this program knows %d: %w", v, formatVersion, errVersion)
	}
	if got, want := crc32.Checksum(b[:headerSize-4], castagnoli), le.Uint32(b[headerSize-4:]); got != want {
		return nil, fmt.Errorf("header checksum %#x, stored is %#x", got, want)
	}
	h := &header{generation: le.Uint64(b[32:]), size: int64(le.Uint64(b[40:])), count: le.Uint32(b[64:]), sum: le.Uint32(b[68:])}
	copy(h.id[:], b[16:])
	switch {
	case le.Uint32(b[12:]) != entrySize:
		return nil, fmt.Errorf("catalogue entries of %d bytes, expected %d", le.Uint32(b[12:]), entrySize)
	case h.size < 2*headArea || h.size%alloc.Align != 0:
		return nil, fmt.Errorf("pool size %d", h.size)
	case le.Uint64(b[48:]) != headArea:
		return nil, fmt.Errorf("segments start at %d, expected %d", le.Uint64(b[48:]), headArea)
	case le.Uint64(b[56:]) != uint64(catalogueOff(h.generation)) || headerOff(h.generation) != slot:
		return nil, fmt.Errorf("generation %d with its catalogue at %d in the copy at %d", h.generation, le.Uint64(b[56:]), slot)
	case h.count > maxImages:
		return nil, fmt.Errorf("%d images, at most %d fit", h.count, maxImages)
	}
	return h, nil
}

// readHeaders returns the valid copies, the newest first, or why there is none.
func readHeaders(r io.ReaderAt) ([]*header, error) {
	var out []*header
	var firstErr error
	for _, off := range [2]int64{0, headerSize} {
		b := make([]byte, headerSize)
		if _, err := r.ReadAt(b, off); err != nil && err != io.EOF {
			return nil, fmt.Errorf("read the pool header: %w", err)
		}
		h, err := decodeHeader(b, off)
		if err != nil {
			if firstErr == nil || errors.Is(err, errVersion) {
				firstErr = err
			}
			continue
		}
		if len(out) > 0 && h.generation > out[0].generation {
			out = append([]*header{h}, out...)
		} else {
			out = append(out, h)
		}
	}
	if len(out) == 0 {
		return nil, firstErr
	}
	return out, nil
}
