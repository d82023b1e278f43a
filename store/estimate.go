package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/converter/tree"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// Estimator computes how much space images would take in an empty pool, without storing them. It reads
// each layer once and remembers digests of contents, about 100 bytes for each distinct file. It
// belongs to one goroutine.
type Estimator struct {
	limits layer.Limits
	seen   contents
	layers cache
	known  map[digest.Digest]int64 // sizes of files of the distinct layers, by diff ID
	inodes map[estimatedInode]int  // number of inodes of each kind
}

// Estimate is the space that images would take, in bytes. Contents are whole pages.
type Estimate struct {
	// Contents is the size of the contents of all layers, each distinct content once.
	Contents int64 `json:"contents"`
	// Metadata is the size of the trees of the images.
	Metadata int64 `json:"metadata"`
	// Unpacked is the size of the files of all layers in directories, each distinct layer once: overlayfs
	// on disk, without its directories and inodes.
	Unpacked int64 `json:"unpacked"`
	// Layers is the number of distinct layers.
	Layers int `json:"layers"`
}

// estimatedInode identifies an inode that images share: by its attributes and contents.
type estimatedInode struct {
	key daxfs.InodeKey
	off int64
}

// NewEstimator returns an Estimator for layers within limits.
func NewEstimator(limits layer.Limits) *Estimator {
	return &Estimator{
		limits: limits, seen: contents{at: map[contentsKey]int64{}}, known: map[digest.Digest]int64{},
		inodes: map[estimatedInode]int{},
	}
}

// Add reads an image and returns how much it adds. After an error it may be counted in part.
func (e *Estimator) Add(ctx context.Context, img *source.Image) (Estimate, error) {
	before := e.seen.size
	var out Estimate
	m := tree.NewMerger()
	apply := func(l *layer.Layer) error {
		if err := m.Apply(l); err != nil {
			return fmt.Errorf("%w: %w", layer.ErrInvalid, err)
		}
		return nil
	}
	if img.Tree != nil {
		put := &counted{contents: &e.seen}
		l, err := img.Tree(ctx, put, e.limits)
		if err != nil {
			return out, err
		}
		out.Layers, out.Unpacked = 1, put.size
		if err := apply(l); err != nil {
			return out, err
		}
	}
	for i, l := range img.Layers {
		parsed, unpacked, isNew, err := e.layer(ctx, l)
		if err != nil {
			return out, fmt.Errorf("layer %d (%s): %w", i, l.Name(), err)
		}
		if isNew {
			out.Layers++
			out.Unpacked += unpacked
		}
		if err := apply(parsed); err != nil {
			return out, fmt.Errorf("layer %d (%s): %w", i, l.Name(), err)
		}
	}
	metadata, err := e.metadata(m.Root())
	out.Contents, out.Metadata = e.seen.size-before, metadata
	return out, err
}

// layer returns a layer, its size in a directory, and whether it was not counted before.
func (e *Estimator) layer(ctx context.Context,
	l source.Layer,
) (parsed *layer.Layer, unpacked int64, isNew bool, err error) {
	key := l.DiffID.String()
	if parsed, _, ok := e.layers.get(key); ok {
		return parsed, 0, false, nil
	}
	rc, err := l.Open(ctx)
	if err != nil {
		return nil, 0, false, err
	}
	put := &counted{contents: &e.seen}
	b, err := layer.FromBlob(ctx, rc, l.Blob(), put, e.limits)
	if err != nil {
		return nil, 0, false, err
	}
	e.layers.add(key, b.Layer, b.Size)
	_, had := e.known[b.DiffID]
	e.known[b.DiffID] = put.size
	return b.Layer, put.size, !had, nil
}

// metadata returns how much the tree of an image adds to those before it.
func (e *Estimator) metadata(root *daxfs.Node) (int64, error) {
	plan, err := daxfs.NewLivePlan(root, daxfs.Options{}, false)
	if err != nil {
		return 0, err
	}
	id := func(f daxfs.LiveFile) estimatedInode {
		if f.Data.Size == 0 {
			return estimatedInode{f.Key, 0}
		}
		return estimatedInode{f.Key, f.Data.Off}
	}
	err = plan.Resolve(func(f daxfs.LiveFile) (nid uint64, d daxfs.Data, err error) {
		if f.Seq < e.inodes[id(f)] {
			nid = 1 // any number: nothing is written
		}
		return nid, f.Data, nil
	})
	if err != nil {
		return 0, err
	}
	for i := range plan.FileCount() {
		if f := plan.File(i); f.New {
			e.inodes[id(f)]++
		}
	}
	return plan.Size(), nil
}

// contentsKey identifies contents.
type contentsKey struct {
	sum  [sha256.Size]byte
	size int64
}

// contents are distinct contents, each with a place of its own where nothing is written.
type contents struct {
	mu   sync.Mutex
	at   map[contentsKey]int64
	size int64 // of all contents, in whole pages
}

// counted is a layer.Store that keeps no bytes. It counts the contents of one layer, in whole pages.
type counted struct {
	*contents
	size int64
}

// Put implements layer.Store.
func (c *counted) Put(ctx context.Context, size int64, r io.Reader) (daxfs.Data, error) {
	if err := ctx.Err(); err != nil {
		return daxfs.Data{}, err
	}
	h := sha256.New()
	_, err := io.CopyN(h, r, size)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return daxfs.Data{}, err
	}
	key := contentsKey{size: size}
	h.Sum(key.sum[:0])
	pages := (size + daxfs.BlockSize - 1) / daxfs.BlockSize * daxfs.BlockSize
	c.mu.Lock()
	defer c.mu.Unlock()
	c.size += pages
	off, ok := c.at[key]
	if !ok {
		off = daxfs.BlockSize + c.contents.size // behind all others, and never 0
		c.contents.size += pages
		c.at[key] = off
	}
	return daxfs.Data{Off: off, Size: size, Sum: key.sum}, nil
}
