package lease

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"strings"
	"unicode/utf8"

	"github.com/daxfs/daxfs-snapshotter/pool"
)

// Layout of a lease region; docs/pool-format.md is normative.
const (
	magic         = "DAXFSLS\x01"
	formatVersion = 1
	headerSize    = 4096
	entrySize     = 64
	// MinSize and MaxSize limit a lease region, in bytes. The rest of a larger one is unused.
	MinSize = headerSize + 64*entrySize
	MaxSize = headerSize + 16320*entrySize // 1 MiB
	maxName = 64
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Reader identifies a reader of a pool.
type Reader struct {
	// Name is for people: 1 to 64 bytes of UTF-8 without NUL.
	Name string
	// Machine identifies the reader's machine, and stays the same across reboots.
	Machine [16]byte
}

// header is the first page of a region.
type header struct {
	reader Reader
	// run is random and differs for each boot or process that opens the region: it exposes earlier claims.
	run [8]byte
}

func (h *header) encode() []byte {
	b := make([]byte, headerSize)
	le := binary.LittleEndian
	copy(b, magic)
	le.PutUint32(b[8:], formatVersion)
	le.PutUint32(b[12:], entrySize)
	copy(b[16:], h.reader.Machine[:])
	copy(b[32:], h.run[:])
	le.PutUint16(b[40:], uint16(len(h.reader.Name)))
	copy(b[64:], h.reader.Name)
	le.PutUint32(b[headerSize-4:], crc32.Checksum(b[:headerSize-4], castagnoli))
	return b
}

// decodeHeader reads a header. ok is false if there is none.
func decodeHeader(b []byte) (h header, ok bool) {
	le := binary.LittleEndian
	n := int(le.Uint16(b[40:]))
	if string(b[:8]) != magic || le.Uint32(b[8:]) != formatVersion || le.Uint32(b[12:]) != entrySize || n > maxName ||
		crc32.Checksum(b[:headerSize-4], castagnoli) != le.Uint32(b[headerSize-4:]) {
		return h, false
	}
	copy(h.reader.Machine[:], b[16:])
	copy(h.run[:], b[32:])
	h.reader.Name = string(b[64 : 64+n])
	return h, h.reader.check() == nil
}

func (r Reader) check() error {
	if len(r.Name) == 0 || len(r.Name) > maxName || !utf8.ValidString(r.Name) || strings.ContainsRune(r.Name, 0) {
		return fmt.Errorf("reader %q: expected a name of 1 to %d bytes of UTF-8 without NUL: %w", r.Name, maxName,
			pool.ErrInvalid)
	}
	return nil
}

// entry is one claim: an image of a pool is in use.
type entry struct {
	pool  [16]byte
	image [16]byte // UUID of its tree
	slot  uint32
	run   [8]byte // run of the header when the claim was made
}

func entryOf(poolID [16]byte, m pool.Image, run [8]byte) entry {
	return entry{pool: poolID, image: m.UUID, slot: uint32(m.Slot), run: run}
}

// same tells whether two entries claim the same image, in whatever run.
func (e entry) same(o entry) bool { return e.pool == o.pool && e.image == o.image && e.slot == o.slot }

func (e entry) encode() []byte {
	b := make([]byte, entrySize)
	copy(b, e.pool[:])
	copy(b[16:], e.image[:])
	binary.LittleEndian.PutUint32(b[32:], e.slot)
	copy(b[40:], e.run[:])
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	return b
}

// state is the state of an entry.
type state int

const (
	free state = iota
	claimed
	// torn entries are half written or damaged: their claim is unknown.
	torn
)

func decodeEntry(b []byte) (e entry, s state) {
	zero := true
	for _, c := range b[:entrySize] {
		zero = zero && c == 0
	}
	if zero {
		return e, free
	}
	if crc32.Checksum(b[:60], castagnoli) != binary.LittleEndian.Uint32(b[60:]) {
		return e, torn
	}
	copy(e.pool[:], b)
	copy(e.image[:], b[16:])
	e.slot = binary.LittleEndian.Uint32(b[32:])
	copy(e.run[:], b[40:])
	return e, claimed
}
