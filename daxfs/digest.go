package daxfs

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/daxfs/daxfs-snapshotter/daxfs/internal/disk"
)

// RootHash authenticates every byte of an image: it is the SHA-256 of the digest table's footer up to
// the hash.
type RootHash [sha256.Size]byte

// String returns the root hash in hexadecimal.
func (h RootHash) String() string { return fmt.Sprintf("%x", h[:]) }

// ErrNoDigests reports an image without a digest table: a window, or an image written by another
// program or an earlier version.
var ErrNoDigests = errors.New("the image has no digest table")

// ReadRootHash returns the root hash stored in an image of size bytes. Only Prove compares it with the bytes.
//
// The error is ErrNoDigests; or a *FormatError of RuleDigestTable for a damaged table or an unknown
// version; or an error of r.
func ReadRootHash(r io.ReaderAt, size int64) (RootHash, error) {
	s, err := newSource(r, size)
	if err != nil {
		return RootHash{}, err
	}
	d, err := readDigests(&s)
	if err != nil {
		return RootHash{}, err
	}
	return d.root, nil
}

// digests holds the checked fields of a digest table's footer.
type digests struct {
	root        RootHash
	foot        int64 // offset of the footer
	off         int64 // offset of the table
	count       int64
	meta        int64 // offset of the core: contents lie below
	sum, metSum [sha256.Size]byte
}

func readDigests(s *source) (*digests, error) {
	d := &digests{foot: s.size - disk.V8OverlaySize - disk.DigestFooterSize}
	if d.foot < BlockSize {
		return nil, ErrNoDigests
	}
	b := make([]byte, disk.DigestFooterSize) // a copy, so that the checked bytes are the ones used
	if err := s.readFull(b, d.foot); err != nil {
		return nil, err
	}
	var f disk.DigestFooter
	f.Unmarshal(b)
	bad := func(format string, args ...any) (*digests, error) {
		return nil, corrupt(RuleDigestTable, d.foot, 0, format, args...)
	}
	if string(f.Magic[:]) != disk.DigestMagic {
		// If the root hash matches with the right magic, only the magic is damaged.
		copy(b, disk.DigestMagic)
		if sha256.Sum256(b[:disk.DigestRootOff]) == f.Root {
			return bad("magic is %q, expected %q", f.Magic, disk.DigestMagic)
		}
		return nil, ErrNoDigests
	}
	d.root = sha256.Sum256(b[:disk.DigestRootOff])
	end := d.foot + disk.DigestFooterSize
	switch {
	case d.root != f.Root:
		return bad("the footer has digest %v, but stores %x", d.root, f.Root)
	case f.Version != disk.DigestVersion || f.Algorithm != disk.DigestSHA256:
		return nil, unsupported(RuleDigestTable, d.foot+8, 0,
			"digest table of version %d with algorithm %d, expected %d and %d (SHA-256)",
			f.Version, f.Algorithm, disk.DigestVersion, disk.DigestSHA256)
	case f.Reserved != [16]byte{}:
		return bad("reserved bytes are %x, expected zeros", f.Reserved)
	case f.ImageSize != uint64(s.size):
		return bad("the table is that of an image of %d bytes, this one has %d", f.ImageSize, s.size)
	case f.TableOff%BlockSize != 0 || f.TableOff > uint64(end) || f.MetaOff%BlockSize != 0 ||
		f.MetaOff < BlockSize || f.MetaOff > f.TableOff:
		return bad("the table is at %d and the metadata at %d, expected whole blocks below %d",
			f.TableOff, f.MetaOff, end)
	case f.Count > uint64(s.size)/BlockSize:
		return bad("%d entries, an image of %d bytes has fewer contents", f.Count, s.size)
	}
	d.off, d.count, d.meta = int64(f.TableOff), int64(f.Count), int64(f.MetaOff)
	if want := roundUp(d.count*disk.DigestEntrySize+disk.DigestFooterSize, BlockSize); end-d.off != want {
		return bad("a table of %d entries takes %d bytes, expected %d", d.count, end-d.off, want)
	}
	d.sum, d.metSum = f.Table, f.Meta
	return d, nil
}

// metaRanges returns the ranges covered by the digest of the metadata, in order.
func (d *digests) metaRanges(s *source) [3][2]int64 {
	return [3][2]int64{{0, BlockSize}, {d.meta, d.off}, {s.size - disk.V8OverlaySize, s.size}}
}

// hashRange adds the bytes from off to end to h. It reads through buf.
func hashRange(h hash.Hash, s *source, off, end int64, buf []byte) error {
	for off < end {
		b, err := s.part(off, min(end-off, proofChunk), buf)
		if err != nil {
			return err
		}
		h.Write(b)
		off += int64(len(b))
	}
	return nil
}

// proofChunk is the maximum number of bytes read at once.
const proofChunk = 1 << 20

// buffer returns a read buffer for part, or nil if the image is in memory.
func (s *source) buffer() []byte {
	if s.b != nil {
		return nil
	}
	return make([]byte, min(proofChunk, s.size))
}

// part returns n bytes at off, at most proofChunk: memory of the image, or bytes read into buf.
func (s *source) part(off, n int64, buf []byte) ([]byte, error) {
	if s.b != nil {
		return s.view(off, int(n))
	}
	b := buf[:n]
	return b, s.readFull(b, off)
}
