package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// rootfs is a plain directory, or the upper directory of an overlay.
type rootfs struct {
	name, dir string
	upper     bool
}

func (s *rootfs) String() string { return s.name }
func (s *rootfs) Close() error   { return nil }

func (s *rootfs) Image(context.Context, Platform) (*Image, error) {
	fi, err := os.Stat(s.dir)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	if !fi.IsDir() {
		return nil, fmt.Errorf("%s: %q is not a directory", s.name, s.dir)
	}
	return &Image{Tree: func(ctx context.Context, st layer.Store, lim layer.Limits) (*layer.Layer, error) {
		if s.upper {
			return layer.FromUpper(ctx, s.dir, st, lim)
		}
		return layer.FromDir(ctx, s.dir, st, lim)
	}}, nil
}

// imageFile is a dual image, as written by Convert.
type imageFile struct {
	name, file string
	f          *os.File
}

func (s *imageFile) String() string { return s.name }

func (s *imageFile) Close() error {
	if s.f == nil {
		return nil
	}
	return s.f.Close()
}

// Image checks the whole image before any use, and proves its contents if it has a digest table: it
// may come from anywhere.
func (s *imageFile) Image(ctx context.Context, _ Platform) (*Image, error) {
	if s.f == nil {
		f, err := openFile(s.file)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
		s.f = f
	}
	fi, err := s.f.Stat()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	img, err := daxfs.Open(s.f, fi.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: not an image of daxfs convert: %w", s.name, err)
	}
	stop := func(daxfs.Finding) bool { return false }
	if err := daxfs.Check(readerAt{ctx, s.f}, fi.Size(), stop); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fmt.Errorf("%s: the image is damaged: %w (daxfs verify %s lists everything)", s.name, err, s.file)
	}
	err = daxfs.Prove(ctx, s.f, fi.Size(), daxfs.ProveOptions{}, stop)
	if err != nil && !errors.Is(err, daxfs.ErrNoDigests) {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		what := "the image is damaged"
		if errors.Is(err, daxfs.ErrUnsupported) {
			what = "its contents cannot be proven"
		}
		return nil, fmt.Errorf("%s: %s: %w (daxfs verify %s lists everything)", s.name, what, err, s.file)
	}
	return &Image{Tree: func(ctx context.Context, st layer.Store, lim layer.Limits) (*layer.Layer, error) {
		return layer.FromImage(ctx, img, st, lim)
	}}, nil
}

// readerAt ends reads with its context.
type readerAt struct {
	ctx context.Context
	r   io.ReaderAt
}

func (r readerAt) ReadAt(p []byte, off int64) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.ReadAt(p, off)
}
