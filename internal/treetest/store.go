package treetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// Store is a layer.Store in memory, safe for concurrent use. The zero value is ready to use.
type Store struct {
	mu   sync.Mutex
	data map[int64][]byte
	offs map[[sha256.Size]byte]int64
	next int64
}

// Put reads size bytes from r and keeps them.
func (s *Store) Put(_ context.Context, size int64, r io.Reader) (daxfs.Data, error) {
	var b bytes.Buffer
	if n, err := io.CopyN(&b, r, size); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return daxfs.Data{}, fmt.Errorf("contents end after %d of %d bytes: %w", n, size, err)
	}
	key := sha256.Sum256(b.Bytes())
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.data == nil {
		s.data, s.offs = make(map[int64][]byte), make(map[[sha256.Size]byte]int64)
	}
	off, ok := s.offs[key]
	if !ok {
		s.next += daxfs.BlockSize // block 0 is never data
		off = s.next
		s.next += (size - 1) / daxfs.BlockSize * daxfs.BlockSize
		s.data[off], s.offs[key] = b.Bytes(), off
	}
	return daxfs.Data{Off: off, Size: size, Sum: key}, nil
}

// Open returns the contents at a place that Put returned.
func (s *Store) Open(d daxfs.Data) (io.Reader, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.data[d.Off]
	if !ok || int64(len(b)) != d.Size {
		return nil, fmt.Errorf("no contents of %d bytes at %d", d.Size, d.Off)
	}
	return bytes.NewReader(b), nil
}

// Image returns the dual image of a tree whose contents are in the store.
func (s *Store) Image(root *daxfs.Node, o daxfs.Options) ([]byte, error) {
	plan, err := daxfs.NewPlan(root, o)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	end := s.next + daxfs.BlockSize
	img := make(memory, end+plan.MetaSize())
	for off, b := range s.data {
		copy(img[off:], b)
	}
	if err := plan.Place(daxfs.Placement{Meta: end, End: int64(len(img))}); err != nil {
		return nil, err
	}
	return img, plan.WriteTo(img)
}

// memory is an io.WriterAt of a fixed size.
type memory []byte

func (m memory) WriteAt(p []byte, off int64) (int, error) { return copy(m[off:], p), nil }
