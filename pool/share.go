package pool

import (
	"errors"
	"fmt"
	"io"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
)

// Shared says how much images of a pool share by their own metadata, in bytes of whole pages.
type Shared struct {
	ImageExtents int64 // contents of all images, each counted once
	Unshared     int64 // size without any sharing
	Images       map[string]ImageUsage
}

// ReadShared reads the metadata of all images of a catalogue. Like ReadCatalogue it needs neither the
// index nor a lock, and trusts no byte. An image that was removed meanwhile looks damaged: it is left
// out and named in the error.
func ReadShared(r io.ReaderAt, c *Catalogue) (*Shared, error) {
	live, err := daxfs.OpenLive(r, c.Size)
	if err != nil {
		return nil, err
	}
	users := map[alloc.Span]int{}
	images := make([]map[alloc.Span]bool, len(c.Images))
	var errs []error
	for i, m := range c.Images {
		spans, err := imageSpans(live, m)
		if err != nil {
			errs = append(errs, fmt.Errorf("image %q: %w", m.Key, err))
			continue
		}
		images[i] = spans
		for s := range spans {
			users[s]++
		}
	}
	out := &Shared{Images: map[string]ImageUsage{}}
	for i, spans := range images {
		if spans == nil {
			continue
		}
		u := ImageUsage{Segment: c.Images[i].Segment, Files: len(spans)}
		for s := range spans {
			u.Extents += s.Len
			if users[s] > 1 {
				u.Shared += s.Len
			}
		}
		out.Images[c.Images[i].Key] = u
	}
	for s, n := range users {
		out.ImageExtents += s.Len
		out.Unshared += s.Len * int64(n)
	}
	return out, errors.Join(errs...)
}

// imageSpans returns the spans of the pool that hold the contents of an image.
func imageSpans(live *daxfs.Live, m Image) (map[alloc.Span]bool, error) {
	spans := map[alloc.Span]bool{}
	err := walkFiles(live, m, func(_ string, off, n int64) {
		spans[alloc.Span{Off: off, Len: n}] = true
	})
	return spans, err
}

// WalkFiles calls fn for every name in an image that has contents, with its path ("." is the root) and
// the place of the contents in the pool, in whole pages. Contents at one place are one copy, in every
// image. Like ReadCatalogue it needs neither the index nor a lock, and trusts no byte.
func WalkFiles(r io.ReaderAt, c *Catalogue, m Image, fn func(path string, off, n int64)) error {
	live, err := daxfs.OpenLive(r, c.Size)
	if err != nil {
		return err
	}
	return walkFiles(live, m, fn)
}

func walkFiles(live *daxfs.Live, m Image, fn func(path string, off, n int64)) error {
	img, err := live.Image(m.Slot)
	if err != nil {
		return err
	}
	return img.Walk(func(path string, in daxfs.Inode) error {
		if off, n, ok := in.Data(); ok && n > 0 {
			fn(path, off, alloc.RoundUnit(n))
		}
		return nil
	})
}
