package pool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"sync"
	"testing"
	"time"
)

// catalogueBytes is the bottom of a pool with images.
func catalogueBytes(t testing.TB, gens ...[]Image) []byte {
	t.Helper()
	f := &faults{}
	p := &Pool{region: newSimRegion(64<<20, f), header: header{size: 64 << 20, id: [16]byte{1, 2, 3}}}
	for i, images := range gens {
		if err := p.writeCatalogue(uint64(i+1), images); err != nil {
			t.Fatal(err)
		}
	}
	return p.region.Bytes()[:headArea]
}

func someImages(n int) []Image {
	var out []Image
	for i := range n {
		out = append(out, Image{
			Key: fmt.Sprintf("sha256:%064x", i), Off: headArea + int64(i)*(2<<20), Size: 8 << 20, Seg: 2 << 20,
			UUID: [16]byte{byte(i)}, Created: time.Unix(1700000000, int64(i)).UTC(),
		})
	}
	return out
}

func TestCatalogueRoundTrip(t *testing.T) {
	for _, n := range []int{0, 1, 7} {
		c, err := ReadCatalogue(bytes.NewReader(catalogueBytes(t, someImages(n))))
		if err != nil {
			t.Fatal(err)
		}
		if c.Generation != 1 || c.Size != 64<<20 || c.PoolID != [16]byte{1, 2, 3} || len(c.Images) != n {
			t.Errorf("%d images: %+v", n, c)
		}
		for i, m := range c.Images {
			m.Created = m.Created.UTC()
			if m != someImages(n)[i] {
				t.Errorf("image %d: %+v, expected %+v", i, m, someImages(n)[i])
			}
		}
	}
}

// TestFormatIsPinned holds the numbers of docs/pool-format.md.
func TestFormatIsPinned(t *testing.T) {
	if headerSize != 4096 || entrySize != 256 || headArea != 2<<20 || catArea != 1044480 || maxImages != 4080 || MaxKey != 192 {
		t.Error("a size of the format has changed: that is a new version")
	}
	for gen, want := range map[uint64][2]int64{1: {4096, 8192 + 1044480}, 2: {0, 8192}} {
		if headerOff(gen) != want[0] || catalogueOff(gen) != want[1] {
			t.Errorf("generation %d is at %d and %d, expected %v", gen, headerOff(gen), catalogueOff(gen), want)
		}
	}
	b := catalogueBytes(t, someImages(1))
	le := binary.LittleEndian
	h := b[4096:8192]
	entry := b[8192+1044480:]
	for name, got := range map[string][2]uint64{
		"version":     {uint64(le.Uint32(h[8:])), 1},
		"entry size":  {uint64(le.Uint32(h[12:])), 256},
		"generation":  {le.Uint64(h[32:]), 1},
		"size":        {le.Uint64(h[40:]), 64 << 20},
		"segments":    {le.Uint64(h[48:]), 2 << 20},
		"catalogue":   {le.Uint64(h[56:]), 8192 + 1044480},
		"count":       {uint64(le.Uint32(h[64:])), 1},
		"checksum":    {uint64(le.Uint32(h[68:])), uint64(crc32.Checksum(entry[:256], crc32.MakeTable(crc32.Castagnoli)))},
		"header sum":  {uint64(le.Uint32(h[4092:])), uint64(crc32.Checksum(h[:4092], crc32.MakeTable(crc32.Castagnoli)))},
		"offset":      {le.Uint64(entry[0:]), 2 << 20},
		"window":      {le.Uint64(entry[8:]), 8 << 20},
		"segment":     {le.Uint64(entry[16:]), 2 << 20},
		"created":     {le.Uint64(entry[40:]), 1700000000e9},
		"key length":  {uint64(le.Uint16(entry[48:])), 71},
		"first of id": {uint64(h[16]), 1},
	} {
		if got[0] != got[1] {
			t.Errorf("%s is %d, expected %d", name, got[0], got[1])
		}
	}
	if string(h[:8]) != "DAXFSPL\x01" || string(entry[64:71]) != "sha256:" {
		t.Errorf("magic %q, key %q", h[:8], entry[64:71])
	}
}

// TestCatalogueEveryByte changes each byte of the newest header and catalogue: the reader returns the generation before
// it, whole.
func TestCatalogueEveryByte(t *testing.T) {
	b := catalogueBytes(t, someImages(2), someImages(3))
	ranges := [][2]int64{{headerOff(2), headerSize}, {catalogueOff(2), 3 * entrySize}}
	for _, r := range ranges {
		for at := r[0]; at < r[0]+r[1]; at++ {
			b[at] ^= 0x40
			c, err := ReadCatalogue(bytes.NewReader(b))
			if err != nil || c.Generation != 1 || len(c.Images) != 2 {
				t.Fatalf("byte %d changed: %+v, %v; expected generation 1", at, c, err)
			}
			b[at] ^= 0x40
		}
	}
}

func TestCatalogueRefuses(t *testing.T) {
	if _, err := ReadCatalogue(bytes.NewReader(make([]byte, headArea))); !errors.Is(err, ErrWiped) {
		t.Errorf("zeros: %v, expected ErrWiped", err)
	}
	if _, err := ReadCatalogue(bytes.NewReader(nil)); !errors.Is(err, ErrWiped) {
		t.Errorf("nothing: %v, expected ErrWiped", err)
	}
	good := someImages(3)
	for name, change := range map[string]func(m []Image){
		"key twice":             func(m []Image) { m[1].Key = m[0].Key },
		"no key":                func(m []Image) { m[1].Key = "" },
		"key is not UTF-8":      func(m []Image) { m[1].Key = "\xff" },
		"key with NUL":          func(m []Image) { m[1].Key = "a\x00b" },
		"segments overlap":      func(m []Image) { m[0].Seg = 4 << 20 },
		"misaligned":            func(m []Image) { m[1].Off += 4096 },
		"in the head":           func(m []Image) { m[0].Off = 0 },
		"window over the end":   func(m []Image) { m[2].Size = 1 << 30 },
		"huge window":           func(m []Image) { m[2].Size = -2 << 20 },
		"empty window":          func(m []Image) { m[2].Size = 0 },
		"segment over window":   func(m []Image) { m[2].Seg = 10 << 20 },
		"no segment":            func(m []Image) { m[2].Seg = 0 },
		"offset over the end":   func(m []Image) { m[2].Off = 64 << 20 },
		"offset wraps negative": func(m []Image) { m[2].Off = -2 << 20 },
	} {
		images := slices.Clone(good)
		change(images)
		if c, err := ReadCatalogue(bytes.NewReader(catalogueBytes(t, images))); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %+v, %v; expected ErrCorrupt", name, c, err)
		}
	}
}

// TestCatalogueReaders reads while the owner writes: every catalogue that is read must be one that was written.
func TestCatalogueReaders(t *testing.T) {
	f := &faults{}
	r := newSimRegion(64<<20, f)
	p := &Pool{region: r, header: header{size: 64 << 20}}
	if err := p.writeCatalogue(1, someImages(1)); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	for range 2 {
		wg.Go(func() {
			last := uint64(0)
			for {
				select {
				case <-done:
					return
				default:
				}
				c, err := ReadCatalogue(r)
				if err != nil || len(c.Images) != int(c.Generation%20) || c.Generation < last {
					t.Errorf("read %+v after generation %d: %v", c, last, err)
					return
				}
				last = c.Generation
			}
		})
	}
	for gen := uint64(2); gen < 400; gen++ {
		if err := p.writeCatalogue(gen, someImages(int(gen%20))); err != nil {
			t.Fatal(err)
		}
	}
	close(done)
	wg.Wait()
}

// bottom is the bottom of a pool with the same catalogue for both generations, and zeros in between.
type bottom struct {
	heads [2][]byte
	cat   []byte
}

func (b *bottom) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	for slot := range int64(2) {
		for at, part := range map[int64][]byte{slot * headerSize: b.heads[slot], catalogueOff(uint64(slot)): b.cat} {
			if end := off + int64(len(p)); at < end && at+int64(len(part)) > off {
				copy(p[max(0, at-off):], part[max(0, off-at):])
			}
		}
	}
	return len(p), nil
}

// FuzzCatalogue gives the reader anything, also with right checksums: it must not panic, and what it returns must hold
// what ReadCatalogue promises.
func FuzzCatalogue(f *testing.F) {
	b := catalogueBytes(f, someImages(2))
	f.Add(b[headerOff(1):headerOff(1)+128], b[catalogueOff(1):catalogueOff(1)+2*entrySize], true)
	f.Add(b[headerOff(1):headerOff(1)+128], []byte{}, false)
	f.Fuzz(func(t *testing.T, head, cat []byte, fix bool) {
		if len(cat) > 16*entrySize {
			return
		}
		var image bottom
		for slot := range image.heads {
			h := make([]byte, headerSize)
			copy(h[:headerSize-4], head)
			le := binary.LittleEndian
			if count := int(le.Uint32(h[64:])); fix && count <= 16 {
				entries := make([]byte, count*entrySize)
				copy(entries, cat)
				le.PutUint32(h[68:], crcOf(entries))
			}
			if fix {
				le.PutUint32(h[headerSize-4:], crcOf(h[:headerSize-4]))
			}
			image.heads[slot], image.cat = h, cat
		}
		c, err := ReadCatalogue(&image)
		if err != nil {
			if !errors.Is(err, ErrWiped) && !errors.Is(err, ErrCorrupt) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		for _, m := range c.Images {
			if m.Off < headArea || m.Size <= 0 || m.Off+m.Size > c.Size || m.Off+m.Size < 0 || m.Seg > m.Size || m.Off%(2<<20) != 0 || checkKey(m.Key) != nil {
				t.Fatalf("accepted %+v of a pool of %d bytes", m, c.Size)
			}
		}
		stored := make([]byte, len(c.Images)*entrySize)
		copy(stored, cat)
		if again := encodeCatalogue(c.Images); !bytes.Equal(again, stored) {
			t.Fatal("what was read is not what is there")
		}
	})
}

// FuzzExtents decodes lists of extents: no panic, bounded memory, and what is accepted encodes to the same list.
func FuzzExtents(f *testing.F) {
	f.Add(encodeExtents(nil))
	f.Add(encodeExtents([]extentID{{off: 4096, size: 5}, {off: 1 << 40, size: 1 << 30, sum: [32]byte{9}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		ids, err := decodeExtents(b)
		if err != nil {
			return
		}
		again, err := decodeExtents(encodeExtents(ids))
		if err != nil || !slices.Equal(ids, again) {
			t.Fatalf("%v, %v after a round trip, %v", again, err, ids)
		}
	})
}
