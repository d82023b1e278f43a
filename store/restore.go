package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// ErrLost reports a layer that is no longer in the pool and cannot be restored. Pulling the OCI image
// again brings it back.
var ErrLost = errors.New("the layer is lost; pull the image again")

// ErrDamaged reports a layer whose only copy is damaged. It is also an ErrLost.
var ErrDamaged = fmt.Errorf("a copy is damaged: %w", ErrLost)

// IsFull reports whether an error means a full pool or a full disk.
func IsFull(err error) bool {
	return errors.Is(err, pool.ErrFull) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// ensure returns a layer of the pool, and restores it if necessary.
func (s *Store) ensure(ctx context.Context, f Layer) (*layer.Layer, error) {
	parsed, _, err := s.load(f.Key)
	if !errors.Is(err, pool.ErrNotFound) && !errors.Is(err, pool.ErrCorrupt) {
		return parsed, err
	}
	unlock, err := s.layers.lock(ctx, f.Key)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if parsed, _, err := s.load(f.Key); err == nil {
		return parsed, nil
	}
	if err := s.restore(ctx, f); err != nil {
		return nil, err
	}
	parsed, _, err = s.load(f.Key)
	return parsed, err
}

// restore stores a layer again. Preconditions: the layer is locked.
func (s *Store) restore(ctx context.Context, f Layer) error {
	if f.Dir != "" {
		return s.addDir(ctx, "", f.Key, f.Dir)
	}
	return s.eachSource(ctx, f, func(rc io.ReadCloser, spec Blob, keep *packs) error {
		return s.restoreFrom(ctx, f.Key, rc, spec, keep)
	})
}

// restoreFrom stores a layer under key from an unverified blob.
func (s *Store) restoreFrom(ctx context.Context, key string, rc io.ReadCloser, spec Blob, keep *packs) error {
	began := time.Now()
	var copied *pack
	if keep != nil {
		var err error
		if copied, err = keep.copyOf(rc); err != nil {
			return errors.Join(err, rc.Close())
		}
		defer copied.drop()
		rc = copied
	}
	batch := s.pool.Begin()
	defer batch.Discard()
	parsed, err := s.read(ctx, rc, spec, batch)
	if err != nil {
		return err
	}
	if copied != nil {
		if err := copied.keep(parsed.DiffID); err != nil {
			return err
		}
	}
	return s.commit(ctx, batch, key, parsed.Layer, parsed.Size, Blob{DiffID: parsed.DiffID}, began)
}

// eachSource calls use with blobs that may be a layer, until one call succeeds: its pack, then blobs
// in containerd, then those in registries. keep is nil if use should make no pack of the blob.
func (s *Store) eachSource(ctx context.Context, f Layer,
	use func(rc io.ReadCloser, spec Blob, keep *packs) error,
) error {
	// If this store computed the diff ID, anybody's blob may restore the layer: the bytes prove
	// themselves. If only its owner claims the diff ID, the blob must be the owner's, and no registry is
	// asked, because that would use this machine's credentials.
	id, namespace, keep := f.Claim.DiffID, f.Claim.Namespace, (*packs)(nil)
	name, isBlob := strings.CutPrefix(f.Key, blobPrefix)
	if isBlob {
		id, namespace, keep = digest.Digest(name), "", s.packs
	}
	if err := id.Validate(); err != nil {
		return fmt.Errorf("layer %q is neither in the pool nor in a directory, and nothing tells its diff ID: %w",
			f.Key, ErrLost)
	}
	spec := Blob{DiffID: id}
	perr := error(os.ErrNotExist)
	if keep != nil {
		rc, err := keep.open(id)
		if err == nil {
			err = use(rc, spec, nil)
		}
		if perr = err; perr == nil || ctx.Err() != nil || IsFull(perr) {
			return perr
		}
	}
	verified := func(rc io.ReadCloser) error { return use(rc, spec, keep) }
	berr := s.fromBlobs(ctx, namespace, id, verified)
	if berr == nil {
		log.G(ctx).WithField("layer", f.Key).Info("restored a layer from the blob in containerd")
	} else if isBlob && ctx.Err() == nil && !IsFull(berr) {
		rerr := s.fromRegistry(ctx, f.Key, id, verified)
		if rerr != nil {
			rerr = fmt.Errorf("%w; %w", berr, rerr)
		}
		berr = rerr
	}
	switch {
	case berr == nil, ctx.Err() != nil, IsFull(berr):
		return berr
	case errors.Is(perr, os.ErrNotExist):
		return fmt.Errorf("layer %s is no longer in the pool, it has no layer pack, and its blob is not available "+
			"(%v): %w", id, berr, ErrLost)
	}
	// The pack was good when it was written.
	return fmt.Errorf("layer pack %q is damaged: %w, and the blob is not available (%v): %w",
		s.packs.path(id), perr, berr, ErrDamaged)
}

// fromBlobs calls use with the blobs that containerd labels with a diff ID, until one call succeeds.
func (s *Store) fromBlobs(ctx context.Context, namespace string, id digest.Digest,
	use func(io.ReadCloser) error,
) error {
	if s.cfg.Blobs == nil {
		return errors.New("containerd is not asked")
	}
	found, err := s.cfg.Blobs.Find(ctx, namespace, id)
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("containerd has no blob of layer %s", id)
	}
	errs := []error{err}
	for _, f := range found {
		rc, err := s.cfg.Blobs.Open(ctx, f.Namespace, f.Desc)
		if err == nil {
			err = use(rc)
		}
		if err == nil || ctx.Err() != nil || IsFull(err) {
			return err
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// AddClaimed stores an OCI layer of which only a claim is known, from a blob in the claim's namespace.
func (s *Store) AddClaimed(ctx context.Context, claim Claim) (Stored, error) {
	if s.cfg.Blobs == nil {
		return Stored{}, fmt.Errorf("layer %s: containerd is not asked: %w", claim.DiffID, ErrLost)
	}
	found, err := s.cfg.Blobs.Find(ctx, claim.Namespace, claim.DiffID)
	if claim.Blob != "" {
		hint := Found{Namespace: claim.Namespace, Desc: ocispec.Descriptor{Digest: claim.Blob}}
		found = append([]Found{hint}, found...)
	}
	errs := []error{err}
	for _, f := range found {
		st, err := s.AddBlob(ctx, Blob{
			Digest: f.Desc.Digest, DiffID: claim.DiffID, Size: f.Desc.Size,
			Open: func(ctx context.Context) (io.ReadCloser, error) {
				return s.cfg.Blobs.Open(ctx, f.Namespace, f.Desc)
			},
			Pin:    func(string) {}, // the caller's snapshot names the layer
			Holder: ContainerdHolder(claim.Namespace),
		})
		if err == nil || ctx.Err() != nil || IsFull(err) {
			return st, err
		}
		errs = append(errs, err)
	}
	return Stored{}, fmt.Errorf("namespace %q has no blob of layer %s in containerd (%w): %w",
		claim.Namespace, claim.DiffID, errors.Join(errs...), ErrLost)
}
