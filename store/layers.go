package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// blobPrefix begins the keys of streamed layers; the diff ID follows.
const blobPrefix = "blob/"

// BlobKey returns the key of the streamed layer with a diff ID.
func BlobKey(diffID digest.Digest) string { return blobPrefix + diffID.String() }

// blobDiffID returns the diff ID of a streamed layer, which the store computed. ok is false for another key.
func blobDiffID(key string) (id digest.Digest, ok bool) {
	name, ok := strings.CutPrefix(key, blobPrefix)
	return digest.Digest(name), ok
}

// Layer is one layer of a chain.
type Layer struct {
	Key string
	// Dir is the directory that an unpacked layer can be restored from, if it is still there.
	Dir string
	// Claim says which blob an unpacked layer without a directory was made of, according to its owner.
	Claim Claim
}

// Claim is what somebody says about a layer.
type Claim struct {
	// Namespace is the namespace of containerd whose blobs count.
	Namespace string
	// DiffID is the claimed diff ID; empty if there is no claim.
	DiffID digest.Digest
	// Blob is the digest of the blob; empty if it is not known.
	Blob digest.Digest
}

// Blob is an OCI layer to be streamed.
type Blob struct {
	// Digest and MediaType are those of the descriptor. The digest is empty if it is not known.
	Digest    digest.Digest
	MediaType string
	// Verify computes the digest of the blob. It is not needed for blobs from containerd, which did it.
	Verify bool
	// DiffID is the diff ID that the blob is expected to have; empty if it is not known.
	DiffID digest.Digest
	// Size is the number of bytes that Open yields.
	Size int64
	// Open starts reading the blob. That it succeeds proves that the caller has the blob.
	Open func(ctx context.Context) (io.ReadCloser, error)
	// Pin is called with the key of the layer before the layer is stored, or found to be stored already.
	Pin func(key string)
	// Holder is who holds the layer.
	Holder string
}

// Stored is a streamed layer.
type Stored struct {
	Key    string
	DiffID digest.Digest
	// Size is the number of bytes of the layer's tar, Bytes that of its files, and Entries their number.
	Size, Bytes, Entries int64
}

func stored(diffID digest.Digest, made *layer.Layer, size int64) Stored {
	return Stored{
		Key: BlobKey(diffID), DiffID: diffID, Size: size, Bytes: made.Stats.Bytes, Entries: made.Stats.Entries,
	}
}

// AddDir stores the changes in dir, the upper directory of an overlay, as layer key, which holder holds. It does
// nothing if the layer is stored already.
func (s *Store) AddDir(ctx context.Context, holder, key, dir string) error {
	unlock, err := s.layers.lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.addDir(ctx, holder, key, dir); err != nil {
		return err
	}
	return s.holdLayer(key, Blob{Holder: holder})
}

// addDir stores the changes in dir unless the layer is stored. Preconditions: the layer is locked.
func (s *Store) addDir(ctx context.Context, holder, key, dir string) error {
	if _, _, err := s.load(key); err == nil {
		return nil
	}
	return s.readTree(ctx, holder, key,
		func(ctx context.Context, to layer.Store, lim layer.Limits) (*layer.Layer, error) {
			return layer.FromUpper(ctx, dir, to, lim)
		})
}

// treeReader reads a tree as one layer.
type treeReader func(ctx context.Context, to layer.Store, lim layer.Limits) (*layer.Layer, error)

// addTree stores what read reads as layer key, which is new and which holder holds.
func (s *Store) addTree(ctx context.Context, holder, key string, read treeReader) error {
	unlock, err := s.layers.lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.readTree(ctx, holder, key, read); err != nil {
		return err
	}
	return s.holdLayer(key, Blob{Holder: holder})
}

// readTree stores what read reads. Preconditions: the layer is locked.
func (s *Store) readTree(ctx context.Context, holder, key string, read treeReader) error {
	began := time.Now()
	b := s.pool.Begin()
	defer b.Discard()
	made, err := read(ctx, b, s.cfg.Limits)
	if err != nil {
		return err
	}
	return s.commit(ctx, b, key, made, 0, Blob{Holder: holder}, began)
}

// commit makes a layer of a batch, in the place of one that cannot be read: another version of the program may have
// stored it, or it is damaged. Of the blob that it was read from its record has the digest and the holder. The payload
// is the size of the layer's tar, then the layer. Reading it began at began. Preconditions: the layer is locked, or not
// known yet.
func (s *Store) commit(ctx context.Context, b *pool.Batch, key string, made *layer.Layer, size int64, of Blob,
	began time.Time,
) error {
	encode, large := made.AppendBinary, made.Cost() > maxCached
	if large { // the cache keeps none that large
		encode = made.DrainBinary
		debug.FreeOSMemory() // the index copies the payload, in one piece
	}
	payload, err := encode(binary.AppendUvarint(nil, uint64(size)))
	if err != nil {
		return err
	}
	if _, _, err := s.load(key); errors.Is(err, pool.ErrCorrupt) {
		log.G(ctx).WithError(err).Warn("replacing a layer that cannot be read")
		if err := s.pool.RemoveLayer(ctx, key); err != nil && !errors.Is(err, pool.ErrNotFound) {
			return err
		}
	}
	if err := s.noteLayer(key, of); err != nil {
		return err
	}
	existed := s.pool.HasLayer(key)
	if err := b.CommitLayer(ctx, key, payload); err != nil {
		return err
	}
	if large {
		debug.FreeOSMemory() // all that was in memory at once
	}
	if !existed {
		if err := s.noteBrought(key, began); err != nil {
			return err
		}
	}
	if locked := of.DiffID != "" || !strings.HasPrefix(key, blobPrefix); locked && !existed && !large {
		s.decoded.add(key, made, size)
	} else {
		s.decoded.drop(key) // a layer that was there already stays as it is
	}
	return nil
}

// load returns a stored layer and the size of its tar.
func (s *Store) load(key string) (*layer.Layer, int64, error) {
	if !s.pool.HasLayer(key) {
		s.decoded.drop(key)
		return nil, 0, fmt.Errorf("layer %q: %w", key, pool.ErrNotFound)
	}
	if s.pool.LayerDamaged(key) {
		s.decoded.drop(key)
		return nil, 0, fmt.Errorf("layer %q: its contents were found to be damaged: %w", key, pool.ErrCorrupt)
	}
	if made, size, ok := s.decoded.get(key); ok {
		return made, size, nil
	}
	raw, err := s.pool.Layer(key)
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
	s.decoded.add(key, made, int64(size))
	return made, int64(size), nil
}

// AddBlob stores an OCI layer. The layer survives a reboot when AddBlob returns.
//
// A layer that is stored already is not read again if the store once read it from the blob with the same digest, and
// the caller can open that blob. That the caller expects its diff ID is no reason: it would give him bytes that he
// may not have.
func (s *Store) AddBlob(ctx context.Context, b Blob) (Stored, error) {
	if b.DiffID != "" {
		// Others that stream the same layer wait here, and then find it.
		unlock, err := s.layers.lock(ctx, BlobKey(b.DiffID))
		if err != nil {
			return Stored{}, err
		}
		defer unlock()
		b.Pin(BlobKey(b.DiffID))
		if st, ok := s.find(ctx, b); ok {
			return st, s.holdLayer(st.Key, b)
		}
	}
	st, err := s.stream(ctx, b, s.packs)
	if err != nil {
		return st, err
	}
	return st, s.holdLayer(st.Key, b)
}

// noteLayer notes who holds a layer, and which blob it was read from.
func (s *Store) noteLayer(key string, b Blob) error {
	return s.amendLayer(key, func(r *layerRecord) {
		r.Holders = add(r.Holders, b.Holder)
		r.Blobs = add(r.Blobs, b.Digest)
	})
}

// holdLayer is noteLayer whose result is durable.
func (s *Store) holdLayer(key string, b Blob) error {
	return errors.Join(s.noteLayer(key, b), s.pool.FlushRecords())
}

// find returns a layer that is stored, durably, and of which the caller has the blob. Preconditions: the layer is
// locked.
func (s *Store) find(ctx context.Context, b Blob) (Stored, bool) {
	if b.Digest == "" || b.Digest != b.DiffID && s.provenLayer(b.Digest) != BlobKey(b.DiffID) {
		return Stored{}, false
	}
	if s.packs != nil && !s.packs.has(b.DiffID) {
		return Stored{}, false
	}
	made, size, err := s.load(BlobKey(b.DiffID))
	if err != nil {
		return Stored{}, false
	}
	rc, err := b.Open(ctx)
	if err != nil {
		return Stored{}, false // reading it fails in the same way, and says so
	}
	rc.Close()
	return stored(b.DiffID, made, size), true
}

// stream reads a blob into the pool, and into a pack if packs are to be kept.
func (s *Store) stream(ctx context.Context, b Blob, keep *packs) (st Stored, err error) {
	began := time.Now()
	rc, err := b.Open(ctx)
	if err != nil {
		return st, err
	}
	var copied *pack
	if keep != nil {
		if copied, err = keep.copyOf(rc); err != nil {
			return st, errors.Join(err, rc.Close())
		}
		defer copied.drop()
		rc = copied
	}
	batch := s.pool.Begin()
	defer batch.Discard()
	made, err := s.read(ctx, rc, b, batch)
	if err != nil {
		return st, err
	}
	st = stored(made.DiffID, made.Layer, made.Size)
	b.Pin(st.Key)
	// The pack first: a layer in the pool is taken to have one.
	if copied != nil {
		if err := copied.keep(st.DiffID); err != nil {
			return st, err
		}
	}
	return st, s.commit(ctx, batch, st.Key, made.Layer, st.Size, b, began)
}

// read reads and verifies a blob, and puts the contents of its files into to.
func (s *Store) read(ctx context.Context, rc io.ReadCloser, b Blob, to layer.Store) (*layer.Blob, error) {
	spec := blob.Spec{MediaType: b.MediaType, Size: b.Size, DiffID: b.DiffID, MaxSize: s.maxTar()}
	if b.Verify {
		spec.Digest = b.Digest
	}
	return layer.FromBlob(ctx, rc, spec, to, s.cfg.Limits)
}

// maxTar bounds a tar by what its contents may be, with room for headers.
func (s *Store) maxTar() int64 {
	if s.cfg.Limits.MaxBytes <= 0 {
		return 0
	}
	return s.cfg.Limits.MaxBytes + 4096*max(s.cfg.Limits.MaxEntries, 1)
}
