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

// blobPrefix is the prefix of the keys of streamed layers; the diff ID follows.
const blobPrefix = "blob/"

// BlobKey returns the key of the streamed layer with a diff ID.
func BlobKey(diffID digest.Digest) string { return blobPrefix + diffID.String() }

// blobDiffID returns the diff ID of a streamed layer, computed by the store, if key names one.
func blobDiffID(key string) (id digest.Digest, ok bool) {
	name, ok := strings.CutPrefix(key, blobPrefix)
	return digest.Digest(name), ok
}

// Layer is one layer of a chain.
type Layer struct {
	Key string
	// Dir is the directory from which an unpacked layer can be restored while it exists.
	Dir string
	// Claim says from which blob an unpacked layer without a directory was made, according to its owner.
	Claim Claim
}

// Claim is an unproven statement about a layer.
type Claim struct {
	// Namespace is the containerd namespace whose blobs count.
	Namespace string
	// DiffID is the claimed diff ID, or empty.
	DiffID digest.Digest
	// Blob is the digest of the blob; empty if unknown.
	Blob digest.Digest
}

// Blob is an OCI layer to stream.
type Blob struct {
	// Digest and MediaType come from the descriptor. Digest is empty if unknown.
	Digest    digest.Digest
	MediaType string
	// Verify computes the digest of the blob. containerd has done that for its blobs.
	Verify bool
	// DiffID is the expected diff ID; empty if unknown.
	DiffID digest.Digest
	// Size is the number of bytes from Open.
	Size int64
	// Open starts reading the blob. If it succeeds, the caller has the blob.
	Open func(ctx context.Context) (io.ReadCloser, error)
	// Pin is called with the key of the layer before the layer is stored, or when it was found stored.
	Pin func(key string)
	// Holder will hold the layer.
	Holder string
}

// Stored is a streamed layer.
type Stored struct {
	Key    string
	DiffID digest.Digest
	// Size and Bytes are the bytes of the layer's tar and of its files, Entries the number of entries.
	Size, Bytes, Entries int64
}

func newStored(diffID digest.Digest, parsed *layer.Layer, size int64) Stored {
	return Stored{
		Key: BlobKey(diffID), DiffID: diffID, Size: size, Bytes: parsed.Stats.Bytes, Entries: parsed.Stats.Entries,
	}
}

// AddDir stores the changes in dir, the upper directory of an overlay, as layer key for holder. It
// does nothing if the layer is stored.
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

// addDir is AddDir. Preconditions: the layer is locked.
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

// addTree stores the tree from read as the new layer key for holder.
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

// readTree stores the tree from read as layer key for holder. Preconditions: the layer is locked.
func (s *Store) readTree(ctx context.Context, holder, key string, read treeReader) error {
	began := time.Now()
	b := s.pool.Begin()
	defer b.Discard()
	parsed, err := read(ctx, b, s.cfg.Limits)
	if err != nil {
		return err
	}
	return s.commit(ctx, b, key, parsed, 0, Blob{Holder: holder}, began)
}

// commit stores a batch as layer key. It replaces a layer that cannot be read because another version
// of the program stored it or it is damaged. The layer's record gets digest and holder from the blob
// of; began is when reading began. The payload is the size of the layer's tar, then the layer.
// Preconditions: the layer is locked or not known yet.
func (s *Store) commit(ctx context.Context, b *pool.Batch, key string, parsed *layer.Layer, size int64, of Blob,
	began time.Time,
) error {
	encode, large := parsed.AppendBinary, parsed.Cost() > maxCached
	if large { // the cache keeps no layers of that size
		encode = parsed.DrainBinary
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
		debug.FreeOSMemory() // frees layer, payload and copy together
	}
	if !existed {
		if err := s.noteBrought(key, began); err != nil {
			return err
		}
	}
	if locked := of.DiffID != "" || !strings.HasPrefix(key, blobPrefix); locked && !existed && !large {
		s.decoded.add(key, parsed, size)
	} else {
		s.decoded.drop(key) // an existing layer stays as it is
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
	if parsed, size, ok := s.decoded.get(key); ok {
		return parsed, size, nil
	}
	raw, err := s.pool.Layer(key)
	if err != nil {
		return nil, 0, err
	}
	size, n := binary.Uvarint(raw)
	if n <= 0 {
		return nil, 0, fmt.Errorf("layer %q: payload of %d bytes: %w", key, len(raw), pool.ErrCorrupt)
	}
	parsed := &layer.Layer{}
	if err := parsed.UnmarshalBinary(raw[n:]); err != nil {
		return nil, 0, fmt.Errorf("layer %q: %w: %w", key, err, pool.ErrCorrupt)
	}
	s.decoded.add(key, parsed, int64(size))
	return parsed, int64(size), nil
}

// AddBlob stores an OCI layer. The layer survives a reboot once AddBlob returns.
//
// A stored layer is not read again if the store once read it from a blob with the same digest, and the
// caller can open that blob. The expected diff ID alone is not enough: it would give the caller bytes
// that he may not have.
func (s *Store) AddBlob(ctx context.Context, b Blob) (Stored, error) {
	if b.DiffID != "" {
		// Other callers that stream the same layer wait here, then find it.
		unlock, err := s.layers.lock(ctx, BlobKey(b.DiffID))
		if err != nil {
			return Stored{}, err
		}
		defer unlock()
		b.Pin(BlobKey(b.DiffID))
		if st, ok := s.findStored(ctx, b); ok {
			return st, s.holdLayer(st.Key, b)
		}
	}
	st, err := s.stream(ctx, b, s.packs)
	if err != nil {
		return st, err
	}
	return st, s.holdLayer(st.Key, b)
}

// noteLayer records the holder of a layer, and the blob that it was read from.
func (s *Store) noteLayer(key string, b Blob) error {
	return s.amendLayer(key, func(r *layerRecord) {
		r.Holders = add(r.Holders, b.Holder)
		r.Blobs = add(r.Blobs, b.Digest)
	})
}

// holdLayer is noteLayer with a durable result.
func (s *Store) holdLayer(key string, b Blob) error {
	return errors.Join(s.noteLayer(key, b), s.pool.FlushRecords())
}

// findStored returns a durably stored layer if the caller has its blob. Preconditions: the layer is locked.
func (s *Store) findStored(ctx context.Context, b Blob) (Stored, bool) {
	if b.Digest == "" || b.Digest != b.DiffID && s.provenLayer(b.Digest) != BlobKey(b.DiffID) {
		return Stored{}, false
	}
	if s.packs != nil && !s.packs.has(b.DiffID) {
		return Stored{}, false
	}
	parsed, size, err := s.load(BlobKey(b.DiffID))
	if err != nil {
		return Stored{}, false
	}
	rc, err := b.Open(ctx)
	if err != nil {
		return Stored{}, false // reading it fails the same way, with an error
	}
	rc.Close()
	return newStored(b.DiffID, parsed, size), true
}

// stream reads a blob into the pool and, if keep is not nil, into a pack.
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
	parsed, err := s.read(ctx, rc, b, batch)
	if err != nil {
		return st, err
	}
	st = newStored(parsed.DiffID, parsed.Layer, parsed.Size)
	b.Pin(st.Key)
	// The pack comes first: every streamed layer in the pool must have one.
	if copied != nil {
		if err := copied.keep(st.DiffID); err != nil {
			return st, err
		}
	}
	return st, s.commit(ctx, batch, st.Key, parsed.Layer, st.Size, b, began)
}

// read reads and verifies a blob, and puts the contents of its files into to.
func (s *Store) read(ctx context.Context, rc io.ReadCloser, b Blob, to layer.Store) (*layer.Blob, error) {
	spec := blob.Spec{MediaType: b.MediaType, Size: b.Size, DiffID: b.DiffID, MaxSize: s.maxTar()}
	if b.Verify {
		spec.Digest = b.Digest
	}
	return layer.FromBlob(ctx, rc, spec, to, s.cfg.Limits)
}

// maxTar limits the length of a tar: the limit of its contents, plus room for headers.
func (s *Store) maxTar() int64 {
	if s.cfg.Limits.MaxBytes <= 0 {
		return 0
	}
	return s.cfg.Limits.MaxBytes + 4096*max(s.cfg.Limits.MaxEntries, 1)
}
