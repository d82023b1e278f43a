package pool

import (
	"encoding/binary"
	"fmt"
	"slices"

	"go.etcd.io/bbolt"

	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// treeArea is the part of the pool that holds the runs of the live tree. It consists of chunks from
// the lower part of the pool and keeps them for the whole epoch. Each address in it is used once,
// because kernels cache what they have read there.
type treeArea struct {
	chunks []alloc.Span // in the order of allocation
	next   int64        // start of the free rest of the last chunk
}

// room is the free length of the last chunk.
func (t *treeArea) room() int64 {
	if len(t.chunks) == 0 {
		return 0
	}
	return t.chunks[len(t.chunks)-1].End() - t.next
}

// used is the number of bytes that runs took, including unused ends of chunks.
func (t *treeArea) used() (n int64) {
	for _, c := range t.chunks {
		n += c.Len
	}
	return n - t.room()
}

// take returns the place for a run of n bytes, and the tree area after it. If the last chunk is full,
// take gets another from space; after a failed publication, drop gives it back.
func (t treeArea) take(space *alloc.Space, n int64) (off int64, after treeArea, ok bool) {
	after = treeArea{chunks: slices.Clone(t.chunks), next: t.next}
	if t.room() < n {
		last := len(t.chunks) - 1
		more := (n + alloc.Align - 1) &^ (alloc.Align - 1)
		at, ok := space.Segment(more)
		if !ok {
			return 0, t, false
		}
		if last >= 0 && t.chunks[last].End() == at {
			after.chunks[last].Len += more
		} else {
			after.chunks = append(after.chunks, alloc.Span{Off: at, Len: more})
			after.next = at
		}
	}
	off = after.next
	after.next += n
	return off, after, true
}

// drop undoes a take that was never made durable.
func (t treeArea) drop(space *alloc.Space, before treeArea) {
	have := map[int64]int64{}
	for _, c := range before.chunks {
		have[c.Off] = c.Len
	}
	for _, c := range t.chunks {
		if n := have[c.Off]; n < c.Len {
			space.FreeSegment(c.Off+n, c.Len-n)
		}
	}
}

func (t treeArea) put(tx *bbolt.Tx) error {
	b := binary.LittleEndian.AppendUint64(nil, uint64(t.next))
	for _, c := range t.chunks {
		b = binary.LittleEndian.AppendUint64(b, uint64(c.Off))
		b = binary.LittleEndian.AppendUint64(b, uint64(c.Len))
	}
	return tx.Bucket(bucketMeta).Put(keyTree, b)
}

func decodeTree(b []byte, size int64) (t treeArea, err error) {
	if len(b) < 8 || len(b)%16 != 8 {
		return t, fmt.Errorf("tree area of %d bytes", len(b))
	}
	t.next = int64(binary.LittleEndian.Uint64(b))
	for b = b[8:]; len(b) > 0; b = b[16:] {
		c, err := getSpan(b, size)
		if err != nil {
			return t, fmt.Errorf("chunk of the tree area: %w", err)
		}
		t.chunks = append(t.chunks, c)
	}
	if r := t.room(); len(t.chunks) > 0 && (r < 0 || r > t.chunks[len(t.chunks)-1].Len) || t.next%alloc.Unit != 0 {
		return t, fmt.Errorf("tree area is used up to %d", t.next)
	}
	return t, nil
}
