package pool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// Layout of the start of a pool; docs/pool-format.md is normative. Block 0 belongs to the live tree.
const (
	magic         = "DAXFSPL\x01"
	formatVersion = 2
	headerSize    = 4096
	tableOff      = 4 * headerSize // offset of the slot table
	entrySize     = 256            // size of an entry
	// MaxKey is the length of the longest key of an image or layer, in bytes.
	MaxKey = entrySize - keyOff
	docOff = 64  // offset of the document's place in an entry
	keyOff = 112 // offset of the key
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is one of the two copies at 4096 and 8192.
type header struct {
	id         [16]byte
	generation uint64 // even generations are in copy 0, odd ones in copy 1
	size       int64  // of the pool
	geo        daxfs.Geometry
	used       int // slots below it were used in this epoch, or are about to be
	windows    bool
	dax        bool // each extent belongs to one inode
}

const (
	flagWindows = 1
	flagDAX     = 2
)

func headerOff(gen uint64) int64 { return headerSize * int64(1+gen%2) }

// headOf is the offset of the live tree behind a slot table.
func headOf(slots int) int64 {
	const block = daxfs.BlockSize
	return (tableOff + int64(slots)*entrySize + block - 1) / block * block
}

func (h *header) encode() []byte {
	b := make([]byte, headerSize)
	le := binary.LittleEndian
	copy(b, magic)
	le.PutUint32(b[8:], formatVersion)
	le.PutUint32(b[12:], entrySize)
	copy(b[16:], h.id[:])
	le.PutUint64(b[32:], h.generation)
	le.PutUint64(b[40:], uint64(h.size))
	copy(b[48:], h.geo.UUID[:])
	le.PutUint32(b[64:], uint32(h.geo.Slots))
	le.PutUint32(b[68:], uint32(h.geo.PerBlock))
	le.PutUint64(b[72:], uint64(h.geo.Head))
	le.PutUint32(b[80:], uint32(h.used))
	flags := uint32(0)
	if h.windows {
		flags |= flagWindows
	}
	if h.dax {
		flags |= flagDAX
	}
	le.PutUint32(b[84:], flags)
	le.PutUint32(b[headerSize-4:], crc32.Checksum(b[:headerSize-4], castagnoli))
	return b
}

// decodeHeader checks one copy in a fixed order: magic, version, checksum, then each field.
func decodeHeader(b []byte, at int64) (*header, error) {
	le := binary.LittleEndian
	if string(b[:8]) != magic {
		return nil, fmt.Errorf("no pool header at %d: magic %q, expected %q", at, b[:8], magic)
	}
	if v := le.Uint32(b[8:]); v != formatVersion {
		return nil, fmt.Errorf("pool format version %d, this program knows %d: %w", v, formatVersion, ErrVersion)
	}
	if got, want := crc32.Checksum(b[:headerSize-4], castagnoli), le.Uint32(b[headerSize-4:]); got != want {
		return nil, fmt.Errorf("header checksum %#x, stored is %#x", got, want)
	}
	h := &header{generation: le.Uint64(b[32:]), size: int64(le.Uint64(b[40:])), used: int(le.Uint32(b[80:]))}
	copy(h.id[:], b[16:])
	if h.size <= 0 || h.size%alloc.Align != 0 || h.size > MaxSize {
		return nil, fmt.Errorf("pool size %d", h.size)
	}
	h.geo = geometry(h.size, int(le.Uint32(b[64:])), int(le.Uint32(b[68:])))
	copy(h.geo.UUID[:], b[48:])
	flags := le.Uint32(b[84:])
	h.windows, h.dax = flags&flagWindows != 0, flags&flagDAX != 0
	switch {
	case le.Uint32(b[12:]) != entrySize:
		return nil, fmt.Errorf("slot table entries of %d bytes, expected %d", le.Uint32(b[12:]), entrySize)
	case h.geo.Validate() != nil:
		return nil, fmt.Errorf("live tree: %w", h.geo.Validate())
	case le.Uint64(b[72:]) != uint64(h.geo.Head):
		return nil, fmt.Errorf("live tree begins at %d, expected %d", le.Uint64(b[72:]), h.geo.Head)
	case headerOff(h.generation) != at:
		return nil, fmt.Errorf("generation %d in the copy at %d", h.generation, at)
	case h.used > h.geo.Slots:
		return nil, fmt.Errorf("%d slots in use of %d", h.used, h.geo.Slots)
	case flags&^(flagWindows|flagDAX) != 0:
		return nil, fmt.Errorf("flags %#x, expected at most %#x", flags, flagWindows|flagDAX)
	}
	return h, nil
}

// MaxSize is the size in bytes of the largest pool: the reach of 32-bit block addresses.
const MaxSize = (1<<32 - 512) * daxfs.BlockSize

// geometry is that of a pool of size bytes; the caller fills in the UUID.
func geometry(size int64, slots, perBlock int) daxfs.Geometry {
	slots = min(slots, daxfs.MaxSlots+1) // keep an excessive number excessive
	return daxfs.Geometry{Slots: slots, PerBlock: perBlock, Head: headOf(slots), Blocks: uint32(size / daxfs.BlockSize)}
}

// readHeaders returns the valid copies, the newest first. Without any it returns the reason.
func readHeaders(r io.ReaderAt) ([]*header, error) {
	var out []*header
	var firstErr error
	for _, off := range [2]int64{headerOff(0), headerOff(1)} {
		b := make([]byte, headerSize)
		if _, err := r.ReadAt(b, off); err != nil && err != io.EOF {
			return nil, fmt.Errorf("read the pool header: %w", err)
		}
		h, err := decodeHeader(b, off)
		if err != nil {
			if firstErr == nil || errors.Is(err, ErrVersion) {
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
	if len(out) > 0 {
		return out, nil
	}
	b := make([]byte, 16)
	if _, err := r.ReadAt(b, 0); err == nil && string(b[:8]) == magic {
		v := binary.LittleEndian.Uint32(b[8:])
		return nil, fmt.Errorf("pool format version %d, this program knows %d: %w", v, formatVersion, ErrVersion)
	}
	return nil, firstErr
}
