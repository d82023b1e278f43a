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

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// catalogueBytes is the start of a pool with images in its slot table.
func catalogueBytes(t testing.TB, images []Image) []byte {
	t.Helper()
	h := header{
		id: [16]byte{1, 2, 3}, generation: 1, size: 64 << 20, used: 20,
		geo: geometry(64<<20, 64, daxfs.SlotsPerBlock),
	}
	b := make([]byte, h.geo.Head)
	copy(b[headerOff(1):], h.encode())
	for _, m := range images {
		encodeImage(b[entryOff(m.Slot):], &m)
	}
	return b
}

func someImages(n int) []Image {
	var out []Image
	for i := range n {
		out = append(out, Image{
			Key: fmt.Sprintf("sha256:%064x", i), Slot: 2 * i, Window: int64(i+1) * (2 << 20), WindowSize: 8 << 20,
			Segment: 2 << 20,
			UUID:    [16]byte{byte(i)}, Created: time.Unix(1700000000, int64(i)).UTC(),
			Document: Document{Off: int64(i+1) * 4096, Size: int64(5000 + i), Sum: [32]byte{7, byte(i)}},
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
		if c.Generation != 1 || c.Size != 64<<20 || c.PoolID != [16]byte{1, 2, 3} || len(c.Images) != n ||
			c.SlotsUsed != 20 {
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

// TestFormatIsPinned pins the numbers of docs/pool-format.md.
func TestFormatIsPinned(t *testing.T) {
	if headerSize != 4096 || entrySize != 256 || tableOff != 16384 || MaxKey != 144 || daxfs.SlotSize != 128 ||
		daxfs.MaxSlots != 65472 {
		t.Error("a size of the format has changed: that is a new version")
	}
	if headerOff(1) != 8192 || headerOff(2) != 4096 || entryOff(3) != 16384+768 {
		t.Error("a place of the format has changed: that is a new version")
	}
	b := catalogueBytes(t, someImages(2))
	le := binary.LittleEndian
	h, entry := b[8192:12288], b[16384+512:]
	sum := bytes.Clone(entry[:256])
	clear(sum[4:8])
	castagnoli := crc32.MakeTable(crc32.Castagnoli)
	for name, got := range map[string][2]uint64{
		"version":     {uint64(le.Uint32(h[8:])), 2},
		"entry size":  {uint64(le.Uint32(h[12:])), 256},
		"generation":  {le.Uint64(h[32:]), 1},
		"size":        {le.Uint64(h[40:]), 64 << 20},
		"slots":       {uint64(le.Uint32(h[64:])), 64},
		"per block":   {uint64(le.Uint32(h[68:])), 32},
		"head":        {le.Uint64(h[72:]), 32768},
		"used":        {uint64(le.Uint32(h[80:])), 20},
		"flags":       {uint64(le.Uint32(h[84:])), 0},
		"header sum":  {uint64(le.Uint32(h[4092:])), uint64(crc32.Checksum(h[:4092], castagnoli))},
		"state":       {uint64(le.Uint32(entry)), 1},
		"entry sum":   {uint64(le.Uint32(entry[4:])), uint64(crc32.Checksum(sum, castagnoli))},
		"window":      {le.Uint64(entry[8:]), 4 << 20},
		"window size": {le.Uint64(entry[16:]), 8 << 20},
		"segment":     {le.Uint64(entry[24:]), 2 << 20},
		"UUID":        {uint64(entry[32]), 1},
		"created":     {le.Uint64(entry[48:]), 1700000000e9 + 1},
		"document":    {le.Uint64(entry[64:]), 8192},
		"its size":    {le.Uint64(entry[72:]), 5001},
		"its digest":  {uint64(le.Uint16(entry[80:])), 7 + 256},
		"key length":  {uint64(le.Uint16(entry[56:])), 71},
		"reserved":    {uint64(len(bytes.Trim(h[88:4092], "\x00"))), 0},
		"in an entry": {uint64(len(bytes.Trim(entry[58:64], "\x00"))), 0},
		"first of id": {uint64(h[16]), 1},
	} {
		if got[0] != got[1] {
			t.Errorf("%s is %d, expected %d", name, got[0], got[1])
		}
	}
	if string(h[:8]) != "DAXFSPL\x01" || string(entry[112:119]) != "sha256:" {
		t.Errorf("magic %q, key %q", h[:8], entry[112:119])
	}
}

// TestCatalogueEveryByte changes each byte of header and entries: the reader reports the damage.
func TestCatalogueEveryByte(t *testing.T) {
	b := catalogueBytes(t, someImages(2))
	stride := int64(1)
	if testing.Short() {
		stride = 7
	}
	for _, r := range [][2]int64{{headerOff(1), headerSize}, {entryOff(0), entrySize}, {entryOff(2), entrySize}} {
		for at := r[0]; at < r[0]+r[1]; at += stride {
			b[at] ^= 0x40
			if c, err := ReadCatalogue(bytes.NewReader(b)); err == nil {
				t.Fatalf("byte %d changed: %+v", at, c)
			}
			b[at] ^= 0x40
		}
	}
}

func TestCatalogueRefuses(t *testing.T) {
	if _, err := ReadCatalogue(bytes.NewReader(make([]byte, 1<<20))); !errors.Is(err, ErrWiped) {
		t.Errorf("zeros: %v, expected ErrWiped", err)
	}
	if _, err := ReadCatalogue(bytes.NewReader(nil)); !errors.Is(err, ErrWiped) {
		t.Errorf("nothing: %v, expected ErrWiped", err)
	}
	good := someImages(3)
	for name, change := range map[string]func(m []Image){
		"key twice":                func(m []Image) { m[1].Key = m[0].Key },
		"no key":                   func(m []Image) { m[1].Key = "" },
		"key is not UTF-8":         func(m []Image) { m[1].Key = "\xff" },
		"key with NUL":             func(m []Image) { m[1].Key = "a\x00b" },
		"misaligned":               func(m []Image) { m[1].Window += 4096 },
		"window over the end":      func(m []Image) { m[2].WindowSize = 1 << 30 },
		"huge window":              func(m []Image) { m[2].WindowSize = -2 << 20 },
		"empty window":             func(m []Image) { m[2].WindowSize = 0 },
		"segment over window":      func(m []Image) { m[2].Segment = 10 << 20 },
		"no segment":               func(m []Image) { m[2].Segment = 0 },
		"window at the end":        func(m []Image) { m[2].Window = 64 << 20 },
		"window wraps":             func(m []Image) { m[2].Window = -2 << 20 },
		"document over the end":    func(m []Image) { m[1].Document.Off = 64<<20 - 4096 },
		"document wraps":           func(m []Image) { m[1].Document.Off = 1<<63 - 4096 },
		"document before the pool": func(m []Image) { m[1].Document.Off = -4096 },
		"document at 0":            func(m []Image) { m[1].Document.Off = 0 },
		"document misaligned":      func(m []Image) { m[1].Document.Off += 8 },
		"empty document":           func(m []Image) { m[1].Document.Size = 0 },
		"document too large":       func(m []Image) { m[1].Document.Size = MaxDocument + 1 },
		"digest of no document":    func(m []Image) { m[1].Document = Document{Sum: [32]byte{1}} },
		"segment without more":     func(m []Image) { m[2].Window, m[2].WindowSize = 0, 0 },
	} {
		images := slices.Clone(good)
		change(images)
		c, err := ReadCatalogue(bytes.NewReader(catalogueBytes(t, images)))
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %+v, %v; expected ErrCorrupt", name, c, err)
		}
		// The other images are usable.
		if c == nil || len(c.Images) != 2 || c.Images[0].Key != good[0].Key {
			t.Errorf("%s: read %+v beside the damaged entry, expected two images", name, c)
		}
	}
}

// TestCatalogueReaders reads while the owner works: each image is readable, or was removed.
func TestCatalogueReaders(t *testing.T) {
	p := newTestPool(t, 64<<20)
	addImage(t, p, "stays", random(1, 5000))
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
				c, err := ReadCatalogue(p.Region())
				if err != nil || len(c.Images) < 1 || len(c.Images) > 2 || c.Images[0].Key != "stays" ||
					c.Generation < last {
					t.Errorf("read %+v after generation %d: %v", c, last, err)
					return
				}
				last = c.Generation
				if _, err := imageFiles(p.Region(), c.Images[0]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	changes := 100
	if slow.Leave() {
		changes = 20
	}
	for i := range changes {
		addImage(t, p, fmt.Sprint(i), random(uint64(i), 3000))
		if err := p.RemoveImage(ctx, fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	close(done)
	wg.Wait()
}

// FuzzCatalogue reads arbitrary bytes: no panic, and the result keeps ReadCatalogue's promises.
func FuzzCatalogue(f *testing.F) {
	b := catalogueBytes(f, someImages(2))
	f.Add(b[headerOff(1):headerOff(1)+128], b[entryOff(0):entryOff(3)], true)
	f.Add(b[headerOff(1):headerOff(1)+128], []byte{}, false)
	f.Fuzz(func(t *testing.T, head, table []byte, fix bool) {
		if len(table) > 16*entrySize || len(head) > headerSize-4 {
			return
		}
		b := make([]byte, tableOff+daxfs.MaxSlots*entrySize)
		h := b[headerOff(1):][:headerSize]
		copy(h, head)
		copy(b[tableOff:], table)
		if fix {
			binary.LittleEndian.PutUint32(h[headerSize-4:], crc32.Checksum(h[:headerSize-4], castagnoli))
			for i := 0; (i+1)*entrySize <= len(table); i++ {
				e := b[entryOff(i):][:entrySize]
				binary.LittleEndian.PutUint32(e[4:], entrySum(e))
			}
		}
		c, err := ReadCatalogue(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, ErrWiped) && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		for _, m := range c.Images {
			if m.Slot >= c.SlotsUsed || m.Window < 0 || m.Window+m.WindowSize > c.Size || m.Segment > m.WindowSize ||
				checkKey(m.Key) != nil ||
				m.Document.Size > MaxDocument || m.Document.Off+m.Document.Size > c.Size {
				t.Fatalf("accepted %+v of a pool of %d bytes", m, c.Size)
			}
			again := make([]byte, entrySize)
			encodeImage(again, &m)
			if !bytes.Equal(again, b[entryOff(m.Slot):][:entrySize]) {
				t.Fatal("what was read is not what is there")
			}
		}
	})
}

func extentsOf(ids ...extentID) []*extent {
	var out []*extent
	for _, id := range ids {
		out = append(out, &extent{extentID: id})
	}
	return out
}

// FuzzExtents decodes lists: no panic, bounded memory, and an accepted list encodes to itself.
func FuzzExtents(f *testing.F) {
	f.Add(encodeExtents(nil))
	f.Add(encodeExtents(extentsOf(extentID{off: 4096, size: 5},
		extentID{off: 1 << 40, size: 1 << 30, sum: [32]byte{9}, head: [8]byte{1}})))
	f.Add(encodeRun([]runInode{{nid: 7}, {off: 4096, size: 5, nid: 1 << 40, key: daxfs.InodeKey{1}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if ids, err := decodeExtents(b); err == nil {
			again, err := decodeExtents(encodeExtents(extentsOf(ids...)))
			if err != nil || !slices.Equal(ids, again) {
				t.Fatalf("%v, %v after a round trip, %v", again, err, ids)
			}
		}
		if inodes, err := decodeRun(b); err == nil {
			again, err := decodeRun(encodeRun(inodes))
			if err != nil || !slices.Equal(inodes, again) {
				t.Fatalf("%v, %v after a round trip, %v", again, err, inodes)
			}
		}
	})
}
