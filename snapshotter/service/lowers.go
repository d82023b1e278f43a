package service

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/converter/tree"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// lowers implements snapshotter.Lowers with a pool and a table of mounts.
//
// Lock order: the lock of a chain, then that of a layer, then what pool and table have inside.
type lowers struct {
	pool   *pool.Pool
	table  *mount.Table
	packs  *packs // nil: streamed layers need none, or containerd keeps the blobs
	limits layer.Limits
	// find opens a blob, of whatever name and compression, of the layer with a diff ID.
	find func(ctx context.Context, diffID digest.Digest) (io.ReadCloser, error)
	// private says that nobody but root can have written to the region, so that an image in it is as we wrote it.
	private bool

	chains, layers keyLock
}

var _ snapshotter.Lowers = (*lowers)(nil)

// holder is our name in the table. One is enough: which snapshots use an image is the snapshotter's to know.
const holder = "snapshotter"

// blobPrefix begins the keys of streamed layers; the diff ID follows.
const blobPrefix = "blob/"

// AddDir implements snapshotter.Lowers.
func (l *lowers) AddDir(ctx context.Context, key, dir string) error {
	unlock, err := l.layers.lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	if _, _, err := l.load(key); err == nil {
		return nil
	}
	b := l.pool.Begin()
	defer b.Discard()
	made, err := layer.FromDir(ctx, dir, b, l.limits)
	if err != nil {
		return toErrdefs(err)
	}
	return toErrdefs(l.commit(ctx, b, key, made, 0))
}

// commit makes a layer of a batch, in the place of one that cannot be read: another version of the program may have stored
// it. The payload is the size of the layer's tar, then the layer. Preconditions: the layer is locked, or not known yet.
func (l *lowers) commit(ctx context.Context, b *pool.Batch, key string, made *layer.Layer, size int64) error {
	raw, err := made.MarshalBinary()
	if err != nil {
		return err
	}
	if _, _, err := l.load(key); errors.Is(err, pool.ErrCorrupt) {
		log.G(ctx).WithError(err).Warn("replacing a layer that cannot be read")
		if err := l.pool.RemoveLayer(ctx, key); err != nil && !errors.Is(err, pool.ErrNotFound) {
			return err
		}
	}
	return b.CommitLayer(ctx, key, append(binary.AppendUvarint(nil, uint64(size)), raw...))
}

// load returns a stored layer and the size of its tar.
func (l *lowers) load(key string) (*layer.Layer, int64, error) {
	raw, err := l.pool.Layer(key)
	if err != nil {
		return nil, 0, err
	}
	size, n := binary.Uvarint(raw)
	if n <= 0 {
		return nil, 0, fmt.Errorf("layer %q: payload of %d bytes: %w", key, len(raw), pool.ErrCorrupt)
	}
	made := &layer.Layer{}
	if err := made.UnmarshalBinary(raw[n:]); err != nil {
		return nil, 0, fmt.Errorf("layer %q: %w: %w", key, err, pool.ErrCorrupt)
	}
	return made, int64(size), nil
}

// AddBlob implements snapshotter.Lowers.
func (l *lowers) AddBlob(ctx context.Context, b snapshotter.Blob) (snapshotter.Streamed, error) {
	if b.DiffID != "" {
		// Others that stream the same layer wait here, and then find it.
		unlock, err := l.layers.lock(ctx, blobPrefix+b.DiffID.String())
		if err != nil {
			return snapshotter.Streamed{}, err
		}
		defer unlock()
		b.Pin(blobPrefix + b.DiffID.String())
		if s, ok := l.stored(b.DiffID); ok {
			return s, nil
		}
	}
	s, err := l.stream(ctx, b, l.packs)
	return s, toErrdefs(err)
}

// stored returns a streamed layer that is there, and durable.
func (l *lowers) stored(diffID digest.Digest) (snapshotter.Streamed, bool) {
	if l.packs != nil && !l.packs.has(diffID) {
		return snapshotter.Streamed{}, false
	}
	made, size, err := l.load(blobPrefix + diffID.String())
	if err != nil {
		return snapshotter.Streamed{}, false
	}
	return streamed(diffID, made, size), true
}

func streamed(diffID digest.Digest, made *layer.Layer, size int64) snapshotter.Streamed {
	return snapshotter.Streamed{
		Key: blobPrefix + diffID.String(), DiffID: diffID, Size: size,
		Usage: snapshots.Usage{Size: made.Stats.Bytes, Inodes: made.Stats.Entries},
	}
}

// stream reads a blob into the pool, and into a pack if packs are to be kept.
func (l *lowers) stream(ctx context.Context, b snapshotter.Blob, keep *packs) (s snapshotter.Streamed, err error) {
	rc, err := b.Open(ctx)
	if err != nil {
		return s, err
	}
	var copied *pack
	if keep != nil {
		if copied, err = keep.copyOf(rc); err != nil {
			return s, errors.Join(err, rc.Close())
		}
		defer copied.drop()
		rc = copied
	}
	// Not the digest of the blob: containerd verified it when it stored the blob, and the diff ID covers the rest.
	r, err := blob.NewReader(ctx, rc, blob.Spec{
		MediaType: b.MediaType, Size: b.Size, DiffID: b.DiffID, MaxSize: l.maxTar(),
	})
	if err != nil {
		return s, err
	}
	defer r.Close()
	batch := l.pool.Begin()
	defer batch.Discard()
	made, err := layer.FromTar(ctx, r, batch, l.limits)
	if err := r.Finish(err); err != nil {
		return s, err
	}
	s = streamed(r.DiffID(), made, r.Size())
	b.Pin(s.Key)
	// The pack first: a layer in the pool is taken to have one.
	if copied != nil {
		if err := copied.keep(s.DiffID); err != nil {
			return s, err
		}
	}
	return s, l.commit(ctx, batch, s.Key, made, s.Size)
}

// maxTar bounds a tar by what its contents may be, with room for headers.
func (l *lowers) maxTar() int64 {
	if l.limits.MaxBytes <= 0 {
		return 0
	}
	return l.limits.MaxBytes + 4096*max(l.limits.MaxEntries, 1)
}

// Lower implements snapshotter.Lowers.
func (l *lowers) Lower(ctx context.Context, chain string, layers []snapshotter.Layer) (string, error) {
	unlock, err := l.chains.lock(ctx, chain)
	if err != nil {
		return "", err
	}
	defer unlock()
	dir, err := l.mount(ctx, chain, layers)
	if errors.Is(err, mount.ErrCheck) {
		// The memory no longer holds what was written there. Layers are checked by nothing, so they are not trusted
		// either where they can be stored again.
		log.G(ctx).WithError(err).WithField("chain", chain).Error("an image is damaged, making it again")
		if err = l.forget(ctx, chain, layers); err == nil {
			dir, err = l.mount(ctx, chain, layers)
		}
	}
	if err != nil {
		return "", toErrdefs(fmt.Errorf("image of chain %q: %w", chain, err))
	}
	return dir, nil
}

// mount mounts the image of a chain, which it builds if there is none. Preconditions: the chain is locked.
func (l *lowers) mount(ctx context.Context, chain string, layers []snapshotter.Layer) (string, error) {
	img, err := l.pool.Image(chain)
	built := errors.Is(err, pool.ErrNotFound)
	if built {
		img, err = l.build(ctx, chain, layers)
	}
	if err != nil {
		return "", err
	}
	m, err := l.table.Mount(ctx, l.source(img, built), holder)
	return m.Dir, err
}

// forget removes an image, which is not mounted, and those of its layers that can be stored again.
func (l *lowers) forget(ctx context.Context, chain string, layers []snapshotter.Layer) error {
	if err := l.pool.RemoveImage(ctx, chain); err != nil {
		return err
	}
	for _, f := range layers {
		if f.Dir == "" && !l.restorable(f.Key) {
			continue
		}
		unlock, err := l.layers.lock(ctx, f.Key)
		if err != nil {
			return err
		}
		err = l.pool.RemoveLayer(ctx, f.Key)
		unlock()
		if err != nil && !errors.Is(err, pool.ErrNotFound) {
			return err
		}
	}
	return nil
}

// source describes an image of the pool to the table.
func (l *lowers) source(img pool.Image, built bool) mount.Source {
	src := mount.Source{Key: img.Key, Region: l.pool.Region().Info(), Off: img.Off, Size: img.Size, Version: version(img)}
	switch {
	case built:
		src.Checked = "this process built it"
	case l.private:
		src.Checked = "only root can write to the pool"
	}
	return src
}

// version tells an image from others that had its key and its window before it.
func version(img pool.Image) string {
	return fmt.Sprintf("%x of %d", img.UUID, img.Created.UnixNano())
}

// private tells whether the memory of a region belongs to this machine's root alone. Devices may be shared with others.
func private(info region.Info) bool {
	switch info.Kind {
	case region.KindFile, region.KindTmpfs, region.KindHugetlbfs:
		return true
	}
	return false
}

// build makes the image of a chain.
func (l *lowers) build(ctx context.Context, chain string, from []snapshotter.Layer) (pool.Image, error) {
	var layers []*layer.Layer
	for _, f := range from {
		made, err := l.ensure(ctx, f)
		if err != nil {
			return pool.Image{}, err
		}
		layers = append(layers, made)
	}
	root, err := tree.Merge(layers)
	if err != nil {
		return pool.Image{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return l.pool.AddImage(ctx, chain, root, daxfs.Options{})
}

// ensure returns a layer of the pool, after storing it again where that is needed.
func (l *lowers) ensure(ctx context.Context, f snapshotter.Layer) (*layer.Layer, error) {
	made, _, err := l.load(f.Key)
	if !errors.Is(err, pool.ErrNotFound) && !errors.Is(err, pool.ErrCorrupt) {
		return made, err
	}
	if f.Dir != "" {
		err = l.AddDir(ctx, f.Key, f.Dir)
	} else {
		err = l.restore(ctx, f.Key)
	}
	if err != nil {
		return nil, err
	}
	made, _, err = l.load(f.Key)
	return made, err
}

// restore stores a streamed layer again: from its pack, else from the blob, if containerd still has it.
func (l *lowers) restore(ctx context.Context, key string) error {
	unlock, err := l.layers.lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	if _, _, err := l.load(key); err == nil {
		return nil
	}
	id := digest.Digest(strings.TrimPrefix(key, blobPrefix))
	if err := id.Validate(); err != nil {
		return fmt.Errorf("layer %q: %w: %w", key, err, errdefs.ErrInvalidArgument)
	}
	perr := l.again(ctx, id, nil, func(context.Context) (io.ReadCloser, error) { return l.packs.open(id) })
	if perr == nil || ctx.Err() != nil || errdefs.IsResourceExhausted(toErrdefs(perr)) {
		return perr
	}
	berr := l.again(ctx, id, l.packs, func(ctx context.Context) (io.ReadCloser, error) { return l.find(ctx, id) })
	switch {
	case berr == nil:
		log.G(ctx).WithField("layer", id).Info("stored a layer again from the blob in containerd")
		return nil
	case ctx.Err() != nil, errdefs.IsResourceExhausted(toErrdefs(berr)):
		return berr
	case errors.Is(perr, os.ErrNotExist):
		return fmt.Errorf("layer %s is no longer in the pool, it has no layer pack, and its blob is not to be had (%v); pull the image again: %w",
			id, berr, errdefs.ErrNotFound)
	}
	// It was a good layer when it was written.
	return fmt.Errorf("layer pack %q is damaged: %w, and the blob is not to be had (%v); pull the image again: %w",
		l.packs.path(id), perr, berr, errdefs.ErrDataLoss)
}

// again stores a layer that a snapshot names from the bytes that open yields, which need not be what they should be.
func (l *lowers) again(ctx context.Context, id digest.Digest, keep *packs, open func(context.Context) (io.ReadCloser, error)) error {
	_, err := l.stream(ctx, snapshotter.Blob{
		DiffID: id, Open: open,
		Pin: func(string) {}, // the caller's snapshot names the layer
	}, keep)
	return err
}
