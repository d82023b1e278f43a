package source

import (
	"context"
	"fmt"
	"io"
)

// Parts is a blob of which parts can be read.
type Parts interface {
	// Part returns exactly the bytes [from, to). They are not verified. It may be called concurrently.
	Part(ctx context.Context, from, to int64) ([]byte, error)
}

// Parts opens the layer's blob, whose size is known, to read parts of it. What is on this machine is skipped up to them;
// of a registry only they are fetched.
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
