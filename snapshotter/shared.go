package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// Shared finds images in pools of other owners. A committed snapshot that stands for such an image is
// called claimed: nothing was fetched for it, and this machine stores nothing of it. All methods may
// be called concurrently. Errors are of an errdefs kind.
type Shared interface {
	// Claim makes the owner keep the image of a chain until Sweep finds that nothing needs it. It is
	// idempotent. It fails with ErrNotFound if no pool has an image of exactly this chain.
	Claim(ctx context.Context, chain digest.Digest) error
	// Lower claims the image of a chain and returns the directory at which it is mounted.
	Lower(ctx context.Context, chain digest.Digest) (string, error)
	// Sweep unmounts the images that are not needed and ends their claims. needed is cheap; call it under
	// the lock that excludes Claim and Lower of the same chain.
	Sweep(ctx context.Context, needed func(chain digest.Digest) bool) error
}

// sharedPrefix begins the keys of images in pools of other owners. The chain ID follows it.
const sharedPrefix = "shared/"

func sharedKey(chain digest.Digest) string { return sharedPrefix + chain.String() }

// mixed reports whether a chain, top first, has a claimed snapshot below its top. The layers above
// that snapshot are plain directories: no pool holds the whole chain.
func mixed(links []link) bool {
	return len(links) > 0 && links[0].rec.Shared == "" &&
		slices.ContainsFunc(links[1:], func(l link) bool { return l.rec.Shared != "" })
}

// claim creates a committed snapshot of the chain that a client is about to unpack, if a pool of
// another owner has its image. It reports whether such a snapshot exists. containerd's unpacker
// computed the name of the chain from the configuration of the OCI image.
func (s *Snapshotter) claim(ctx context.Context, want snapshots.Info, opts []snapshots.Opt) (bool, error) {
	chain, err := digest.Parse(want.Labels[snapshots.LabelSnapshotRef])
	if s.opts.Shared == nil || want.Kind != snapshots.KindActive || err != nil {
		return false, nil
	}
	defer s.pins.pin(sharedKey(chain))()
	if err := s.opts.Shared.Claim(ctx, chain); err != nil {
		if ctx.Err() != nil {
			return false, err
		}
		if !errdefs.IsNotFound(err) {
			log.G(ctx).WithError(err).WithField("chain",
				chain).Warn("a shared image cannot be used, pulling it instead")
		}
		return false, nil
	}
	return true, s.st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		found, err := findClaimed(ctx, tx, chain, want.Parent)
		if err != nil || found {
			return err
		}
		snap, err := storage.CreateSnapshot(ctx, snapshots.KindActive, want.Name, want.Parent, opts...)
		if err != nil {
			return err
		}
		// Remote snapshotters use this name. One chain may be claimed over several parents, because containerd
		// names a parent by the namespace's own snapshot of it.
		name := chain.String()
		if _, _, _, err := storage.GetInfo(ctx, name); err == nil {
			name = want.Name + " " + name
		} else if !errdefs.IsNotFound(err) {
			return err
		}
		if _, err := storage.CommitActive(ctx, want.Name, name, snapshots.Usage{}, opts...); err != nil {
			return err
		}
		return putRecord(tx, snap.ID, record{
			Shared: chain, Image: sharedKey(chain), Top: isTop(want.Labels), Built: true,
		})
	})
}

// findClaimed reports whether a chain was claimed before over the same parent.
func findClaimed(ctx context.Context, tx *bolt.Tx, chain digest.Digest, parent string) (found bool, err error) {
	filter := fmt.Sprintf("kind==committed,labels.%q==%s,parent==%q", snapshots.LabelSnapshotRef, chain, parent)
	err = storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
		claimed, err := isClaimed(ctx, tx, info.Name)
		found = found || claimed
		return err
	}, filter)
	return found, err
}

func isClaimed(ctx context.Context, tx *bolt.Tx, name string) (bool, error) {
	id, _, _, err := storage.GetInfo(ctx, name)
	if err != nil {
		return false, err
	}
	rec, err := getRecord(tx, id)
	return rec.Shared != "", err
}

// overShared reports whether a layer that is unpacked out of order will be committed on a chain with a
// claimed snapshot. A label names the chain; the layers of an image are prepared in order.
func overShared(ctx context.Context, tx *bolt.Tx, parentChain string) (bool, error) {
	if parentChain == "" {
		return false, nil
	}
	all, err := all(ctx, tx)
	if err != nil {
		return false, err
	}
	for name, l := range all {
		_, client := splitName(name)
		if client != parentChain && l.info.Labels[snapshots.LabelSnapshotRef] != parentChain {
			continue
		}
		if l.rec.Shared != "" || l.rec.Lower.onShared() || mixed(all.chain(name)) {
			return true, nil
		}
	}
	return false, nil
}

// reclaim renews the claims of all snapshots: the memory of the claims may have been lost while this
// process did not run. A missing image is reported when it is used.
func (s *Snapshotter) reclaim(ctx context.Context) error {
	if s.opts.Shared == nil {
		return nil
	}
	chains := map[digest.Digest]bool{}
	err := s.st.view(ctx, func(_ context.Context, tx *bolt.Tx) error {
		for _, id := range recordIDs(tx) {
			rec, err := getRecord(tx, id)
			if err != nil {
				return err
			}
			if rec.Shared != "" {
				chains[rec.Shared] = true
			}
		}
		return nil
	})
	if err != nil || len(chains) == 0 {
		return err
	}
	return s.work.detach(func(ctx context.Context) {
		for chain := range chains {
			unpin := s.pins.pin(sharedKey(chain))
			if err := s.opts.Shared.Claim(ctx, chain); err != nil && !errors.Is(err, context.Canceled) {
				log.G(ctx).WithError(err).WithField("chain",
					chain).Warn("a snapshot stands for an image that no shared pool has now")
			}
			unpin()
		}
	})
}

// sharedLower returns the directory of the image for which a claimed snapshot stands.
func (s *Snapshotter) sharedLower(ctx context.Context, l link) (string, error) {
	if s.opts.Shared == nil {
		return "", fmt.Errorf("snapshot %q stands for an image of a shared pool, and none is configured: add it to "+
			"shared.pools again, or remove the OCI image and pull it: %w", l.info.Name, errdefs.ErrFailedPrecondition)
	}
	defer s.pins.pin(l.rec.Image)()
	dir, err := s.opts.Shared.Lower(ctx, l.rec.Shared)
	if errdefs.IsNotFound(err) {
		err = fmt.Errorf("%w; remove the OCI image and pull it", err)
	}
	return dir, err
}
