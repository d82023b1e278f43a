package store

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// aside holds contents for which the pool has no room, in an unnamed file. Their offsets lie behind
// the end of the region, so that one reader serves both.
type aside struct {
	region region.Region
	file   *os.File

	mu   sync.Mutex
	used int64
}

// newAside makes an empty file in dir. It disappears when it is closed.
func newAside(r region.Region, dir string) (*aside, error) {
	f, err := os.CreateTemp(dir, plainNew)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &aside{region: r, file: f}, nil
}

func (a *aside) Close() error { return a.file.Close() }

// Put implements layer.Store.
func (a *aside) Put(_ context.Context, size int64, r io.Reader) (daxfs.Data, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, err := io.CopyN(io.NewOffsetWriter(a.file, a.used), r, size)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return daxfs.Data{}, err
	}
	d := daxfs.Data{Off: a.region.Size() + a.used, Size: size}
	a.used += size
	return d, nil
}

// ReadAt reads from the region, or at offsets behind its end from the file. No contents lie in both.
func (a *aside) ReadAt(p []byte, off int64) (int, error) {
	if off < a.region.Size() {
		return a.region.ReadAt(p, off)
	}
	return a.file.ReadAt(p, off-a.region.Size())
}

// layer returns a layer of the pool. If the pool has no room for it, layer reads it from its source.
func (a *aside) layer(ctx context.Context, s *Store, f Layer) (*layer.Layer, error) {
	parsed, err := s.ensure(ctx, f)
	if !IsFull(err) {
		return parsed, err
	}
	if f.Dir != "" {
		return layer.FromUpper(ctx, f.Dir, a, s.cfg.Limits)
	}
	err = s.eachSource(ctx, f, func(rc io.ReadCloser, spec Blob, _ *packs) error {
		b, err := s.read(ctx, rc, spec, a)
		if err == nil {
			parsed = b.Layer
		}
		return err
	})
	return parsed, err
}
