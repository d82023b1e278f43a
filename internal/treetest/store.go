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

// Store keeps contents in memory, equal contents once. The zero value is ready; it may be used concurrently. It is a
// layer.Store.
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

// Open returns the contents that Put gave a place.
func (s *Store) Open(d daxfs.Data) (io.Reader, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.data[d.Off]
	if !ok || int64(len(b)) != d.Size {
		return nil, fmt.Errorf("no contents of %d bytes at %d", d.Size, d.Off)
	}
	return bytes.NewReader(b), nil
}
