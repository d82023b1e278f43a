package disk

import "encoding/binary"

// The digest table of an image file consists of entries, zeros, and a footer that ends where the
// overlay pair begins.
const (
	DigestMagic      = "DAXFSsum"
	DigestVersion    = 1
	DigestSHA256     = 1   // the only algorithm
	DigestEntrySize  = 48  // one for each distinct contents
	DigestFooterSize = 160 //
	DigestRootOff    = 128 // offset of the root hash in the footer; it is the digest of the bytes before it
)

// DigestEntry describes one run of contents.
type DigestEntry struct {
	Off  uint64 // 0, in the image
	Size uint64 // 8, in bytes
	Sum  [32]byte
}

// Marshal writes 48 bytes to b.
func (e *DigestEntry) Marshal(b []byte) {
	b = b[:DigestEntrySize]
	le := binary.LittleEndian
	le.PutUint64(b[0:], e.Off)
	le.PutUint64(b[8:], e.Size)
	copy(b[16:], e.Sum[:])
}

// Unmarshal reads 48 bytes from b.
func (e *DigestEntry) Unmarshal(b []byte) {
	b = b[:DigestEntrySize]
	le := binary.LittleEndian
	e.Off, e.Size = le.Uint64(b[0:]), le.Uint64(b[8:])
	copy(e.Sum[:], b[16:])
}

// DigestFooter ends the digest table. It lies at a fixed distance from the end of the image.
type DigestFooter struct {
	Magic     [8]byte  // 0
	Version   uint32   // 8
	Algorithm uint32   // 12
	TableOff  uint64   // 16, offset of the first entry in the image
	Count     uint64   // 24, number of entries
	MetaOff   uint64   // 32, offset of the core in the image: contents lie below
	ImageSize uint64   // 40
	Reserved  [16]byte // 48
	Table     [32]byte // 64, digest of all entries
	Meta      [32]byte // 96, digest of block 0, the core and the overlay pair
	Root      [32]byte // 128, digest of the bytes before it
}

// Marshal writes 160 bytes to b.
func (f *DigestFooter) Marshal(b []byte) {
	b = b[:DigestFooterSize]
	le := binary.LittleEndian
	copy(b[0:], f.Magic[:])
	le.PutUint32(b[8:], f.Version)
	le.PutUint32(b[12:], f.Algorithm)
	le.PutUint64(b[16:], f.TableOff)
	le.PutUint64(b[24:], f.Count)
	le.PutUint64(b[32:], f.MetaOff)
	le.PutUint64(b[40:], f.ImageSize)
	copy(b[48:], f.Reserved[:])
	copy(b[64:], f.Table[:])
	copy(b[96:], f.Meta[:])
	copy(b[128:], f.Root[:])
}

// Unmarshal reads 160 bytes from b.
func (f *DigestFooter) Unmarshal(b []byte) {
	b = b[:DigestFooterSize]
	le := binary.LittleEndian
	copy(f.Magic[:], b[0:])
	f.Version, f.Algorithm = le.Uint32(b[8:]), le.Uint32(b[12:])
	f.TableOff, f.Count = le.Uint64(b[16:]), le.Uint64(b[24:])
	f.MetaOff, f.ImageSize = le.Uint64(b[32:]), le.Uint64(b[40:])
	copy(f.Reserved[:], b[48:])
	copy(f.Table[:], b[64:])
	copy(f.Meta[:], b[96:])
	copy(f.Root[:], b[128:])
}
