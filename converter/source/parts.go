package source

import (
	"context"
	"fmt"
	"io"
)

// Parts gives random access to a blob.
type Parts interface {
	// Part returns exactly the bytes [from, to), unverified. It may be called concurrently.
	Part(ctx context.Context, from, to int64) ([]byte, error)
}

// Parts gives random access to the layer's blob, whose size must be known. From a registry it fetches
// only the parts; local blobs are read up to them.
func (l Layer) Parts(ctx context.Context) (Parts, error) {
	if l.parts != nil {
		return l.parts(ctx)
	}
	return skipping{l}, nil
}

type skipping struct{ l Layer }

func (s skipping) Part(ctx context.Context, from, to int64) ([]byte, error) {
	if from < 0 || from > to || to > s.l.Desc.Size {
		return nil, fmt.Errorf("bytes %d to %d of a blob of %d", from, to, s.l.Desc.Size)
	}
	rc, err := s.l.Open(ctx)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	if _, err := io.CopyN(io.Discard, rc, from); err != nil {
		return nil, err
	}
	b := make([]byte, to-from)
	_, err = io.ReadFull(rc, b)
	return b, err
}
