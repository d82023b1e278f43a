package pool

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// extentID is an extent as its holder records it.
type extentID struct {
	off, size int64
	sum       [32]byte // SHA-256 of the contents
	// head begins the SHA-256 of the first chunk of large contents. It only finds candidates to compare.
	head [8]byte
}

const extentsVersion = 2

// encodeExtents encodes a list sorted by offset: a version byte, the count, then for each extent the
// distance from the one before in pages, the size, the digest and, for a large one, the head.
func encodeExtents(es []*extent) []byte {
	b := make([]byte, 0, 16+len(es)*40)
	b = append(b, extentsVersion)
	b = binary.AppendUvarint(b, uint64(len(es)))
	var at int64
	for _, e := range es {
		b = binary.AppendUvarint(b, uint64(e.off-at)/alloc.Unit)
		b = binary.AppendUvarint(b, uint64(e.size))
		b = append(b, e.sum[:]...)
		if e.size > smallMax {
			b = append(b, e.head[:]...)
		}
		at = e.off
	}
	return b
}

func decodeExtents(b []byte) ([]extentID, error) {
	count, b, err := countOf(b, extentsVersion, 34)
	if err != nil {
		return nil, err
	}
	ids := make([]extentID, 0, count)
	var at uint64
	for range count {
		var e extentID
		if at, e.size, b, err = placeOf(b, at); err != nil {
			return nil, err
		}
		need := len(e.sum)
		if e.size > smallMax {
			need += len(e.head)
		}
		if e.size == 0 || len(b) < need {
			return nil, errors.New("bad size")
		}
		e.off = int64(at)
		copy(e.sum[:], b)
		copy(e.head[:], b[len(e.sum):need])
		ids = append(ids, e)
		b = b[need:]
	}
	if len(b) != 0 {
		return nil, fmt.Errorf("%d bytes after the last extent", len(b))
	}
	return ids, nil
}

// countOf reads the version and the number of items, each at least least bytes long.
func countOf(b []byte, version byte, least int) (uint64, []byte, error) {
	if len(b) == 0 || b[0] != version {
		return 0, nil, errors.New("unknown version")
	}
	b = b[1:]
	count, n := binary.Uvarint(b)
	if n <= 0 || count > uint64(len(b)/least) {
		return 0, nil, fmt.Errorf("%d items in %d bytes", count, len(b))
	}
	return count, b[n:], nil
}

// placeOf reads a distance from at, in pages, and a size.
func placeOf(b []byte, at uint64) (off uint64, size int64, rest []byte, err error) {
	pages, n := binary.Uvarint(b)
	if n <= 0 || pages >= 1<<50 {
		return 0, 0, nil, errors.New("bad offset")
	}
	v, k := binary.Uvarint(b[n:])
	if k <= 0 || v >= 1<<62 {
		return 0, 0, nil, errors.New("bad size")
	}
	if at += pages * alloc.Unit; at >= 1<<62 {
		return 0, 0, nil, errors.New("bad offset")
	}
	return at, int64(v), b[n+k:], nil
}

// runInode is an inode of a regular file in a run, with its extent, number and key.
type runInode struct {
	off, size int64 // of the extent; both 0 for empty files
	nid       uint64
	key       daxfs.InodeKey
}

const runVersion = 1

// runList encodes the inodes of a run. They must be added in the order of their extents' offsets.
type runList struct {
	b  []byte
	at int64 // offset of the last extent
}

func newRunList(n int) *runList {
	b := append(make([]byte, 0, 16+n*44), runVersion)
	return &runList{b: binary.AppendUvarint(b, uint64(n))}
}

func (l *runList) add(in runInode) {
	l.b = binary.AppendUvarint(l.b, uint64(in.off-l.at)/alloc.Unit)
	l.b = binary.AppendUvarint(l.b, uint64(in.size))
	l.b = binary.AppendUvarint(l.b, in.nid)
	l.b = append(l.b, in.key[:]...)
	l.at = in.off
}

func encodeRun(inodes []runInode) []byte {
	l := newRunList(len(inodes))
	for _, in := range inodes {
		l.add(in)
	}
	return l.b
}

func decodeRun(b []byte) (out []runInode, err error) {
	count, _, err := countOf(b, runVersion, 35)
	if err != nil {
		return nil, err
	}
	out = make([]runInode, 0, count)
	err = eachInode(b, func(in runInode) { out = append(out, in) })
	return out, err
}

// eachInode calls fn for each inode of a list. It stops with an error where the list is damaged.
func eachInode(b []byte, fn func(runInode)) error {
	count, b, err := countOf(b, runVersion, 35)
	if err != nil {
		return err
	}
	var at uint64
	for range count {
		var in runInode
		if at, in.size, b, err = placeOf(b, at); err != nil {
			return err
		}
		nid, n := binary.Uvarint(b)
		if n <= 0 || len(b) < n+len(in.key) {
			return errors.New("bad inode")
		}
		in.off, in.nid = int64(at), nid
		copy(in.key[:], b[n:])
		fn(in)
		b = b[n+len(in.key):]
	}
	if len(b) != 0 {
		return fmt.Errorf("%d bytes after the last inode", len(b))
	}
	return nil
}
