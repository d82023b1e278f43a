package pool

import (
	"encoding/binary"
	"hash/crc32"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// TestHeaderRefuses changes one field of a header at a time, under a right checksum.
func TestHeaderRefuses(t *testing.T) {
	h := header{generation: 6, size: 64 << 20, used: 9, windows: true, dax: true}
	h.geo = geometry(h.size, 64, daxfs.SlotsPerBlock)
	le := binary.LittleEndian
	for name, change := range map[string]func(b []byte){
		"":                      func([]byte) {},
		"entry size":            func(b []byte) { le.PutUint32(b[12:], entrySize+1) },
		"other copy":            func(b []byte) { le.PutUint64(b[32:], 7) },
		"no size":               func(b []byte) { le.PutUint64(b[40:], 0) },
		"negative size":         func(b []byte) { le.PutUint64(b[40:], -uint64(h.size)) },
		"size in pages":         func(b []byte) { le.PutUint64(b[40:], uint64(h.size+4096)) },
		"size over 2^44":        func(b []byte) { le.PutUint64(b[40:], 1<<44+64<<20) }, // blocks of 33 bits
		"no slots":              func(b []byte) { le.PutUint32(b[64:], 0) },
		"too many slots":        func(b []byte) { le.PutUint32(b[64:], daxfs.MaxSlots+1) },
		"slots in a block":      func(b []byte) { le.PutUint32(b[68:], 2) },
		"place of the tree":     func(b []byte) { le.PutUint64(b[72:], uint64(h.geo.Head+4096)) },
		"slots for a large one": func(b []byte) { le.PutUint64(b[40:], 2<<20); le.PutUint32(b[64:], 60_000) },
		"used slots":            func(b []byte) { le.PutUint32(b[80:], 65) },
		"flags":                 func(b []byte) { le.PutUint32(b[84:], flagWindows|flagDAX|4) },
	} {
		b := h.encode()
		change(b)
		le.PutUint32(b[headerSize-4:], crc32.Checksum(b[:headerSize-4], castagnoli))
		got, err := decodeHeader(b, headerOff(h.generation))
		if (err == nil) != (name == "") {
			t.Errorf("%q: %+v, %v", name, got, err)
		}
	}
}

// The newest copy of the header is the first, whatever its place.
func TestHeaderNewest(t *testing.T) {
	for _, generations := range [][2]uint64{{2, 1}, {2, 3}, {4, 1}} {
		r := newSimRegion(simSize, &faults{})
		for _, gen := range generations {
			h := header{generation: gen, size: simSize}
			h.geo = geometry(h.size, 64, daxfs.SlotsPerBlock)
			write(t, r, h.encode(), headerOff(gen))
		}
		hs, err := readHeaders(r)
		noError(t, err)
		if len(hs) != 2 || hs[0].generation != max(generations[0], generations[1]) {
			t.Errorf("copies of generations %d: the first of %d is %d", generations, len(hs), hs[0].generation)
		}
	}
}
