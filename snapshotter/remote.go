package snapshotter

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// Remotes pulls layers from registries before containerd fetches their blobs.
type Remotes interface {
	// Pull stores a layer and proves that it has its diff ID. The layer survives a reboot when Pull
	// returns. After an error containerd fetches the blob as usual, so errors do no harm.
	// ErrNotImplemented says that Pull does not handle this layer; it is not logged.
	Pull(ctx context.Context, layer Remote) (Pulled, error)
}

// Remote is a layer of an image in a registry, named by the labels of a snapshot. The labels are not proven.
type Remote struct {
	Namespace string
	// Image is the reference of the image, Manifest the digest of its manifest, and Blob the digest of the
	// layer's blob. All three are empty if the client does not name the image.
	Image          string
	Manifest, Blob digest.Digest
	// ChainID names the layer together with those below it.
	ChainID digest.Digest
	// HasParent says that the snapshot is prepared on the layer below; else Commit names it, if there is one.
	HasParent bool
	// Pin must be called with the key of the layer before the layer is stored.
	Pin func(key string)
}

// Pulled is the result of Pull.
type Pulled struct {
	Streamed
	// Staged selects how containerd learns that it need not fetch the blob: by read-only mounts, after
	// which it commits the snapshot, or otherwise by a committed snapshot.
	Staged bool
}

// labelManifest names the manifest of the image being unpacked.
const labelManifest = "containerd.io/snapshot/cri.manifest-digest"

// pulledPrefix follows the namespace in the names of snapshots that this package committed instead of
// containerd. containerd has a number in place of the 0, which is never 0.
const pulledPrefix = "/0/pulled-"

// remoteOf returns the layer for which a snapshot is prepared, if its labels name one.
func remoteOf(want snapshots.Info) (Remote, bool) {
	ns, _ := splitName(want.Name)
	r := Remote{
		Namespace: ns, ChainID: digest.Digest(want.Labels[snapshots.LabelSnapshotRef]), HasParent: want.Parent != "",
	}
	image := want.Labels[labelImageRef]
	manifest, blob := digest.Digest(want.Labels[labelManifest]), digest.Digest(want.Labels[labelLayerDigest])
	if image != "" && manifest.Validate() == nil && blob.Validate() == nil {
		r.Image, r.Manifest, r.Blob = image, manifest, blob
	}
	return r, ns != "" && isExtract(want.Name, want.Labels) && r.ChainID.Validate() == nil
}

// pull creates a snapshot of a layer that Remotes pulls. If done is false it created nothing, and the
// snapshot has to be prepared for containerd to unpack into.
func (s *Snapshotter) pull(ctx context.Context, want snapshots.Info,
	opts []snapshots.Opt,
) (_ []mount.Mount, done bool, _ error) {
	remote, ok := remoteOf(want)
	if !ok || s.opts.Remotes == nil {
		return nil, false, nil
	}
	began := time.Now()
	mounts, err := s.tryPull(ctx, want, remote, opts)
	if errdefs.IsNotImplemented(err) {
		log.G(ctx).WithError(err).WithField("layer", remote.Blob).Debug("the layer is left to containerd")
		return nil, false, nil
	}
	if errdefs.IsAlreadyExists(err) {
		s.opts.Observe("pull", time.Since(began), nil)
		return nil, true, err
	}
	s.opts.Observe("pull", time.Since(began), err)
	if err == nil {
		return mounts, true, nil
	}
	if ctx.Err() != nil {
		return nil, true, err
	}
	log.G(ctx).WithError(err).WithField("image", remote.Image).WithField("layer", remote.Blob).
		Info("the layer is not pulled by its files; containerd pulls it as a whole")
	return nil, false, nil
}

// tryPull returns the mounts of a staged snapshot, or ErrAlreadyExists for a committed one.
func (s *Snapshotter) tryPull(ctx context.Context, want snapshots.Info, remote Remote,
	opts []snapshots.Opt,
) ([]mount.Mount, error) {
	var links []link
	found := false
	err := s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		if found, err = s.hasPulled(ctx, want, remote); err != nil || found {
			return err
		}
		if links, err = chain(ctx, tx, want.Parent); err != nil {
			return err
		}
		onShared, err := overShared(ctx, tx, want.Labels[labelParentChainID])
		if err != nil {
			return err
		}
		if onShared || slices.ContainsFunc(links, func(l link) bool { return l.rec.Shared != "" }) {
			return fmt.Errorf("layers above an image of a shared pool are directories: %w", errdefs.ErrNotImplemented)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	exists := fmt.Errorf("layer %s: %w", remote.ChainID, errdefs.ErrAlreadyExists)
	if found { // by a call whose caller gave up before the answer
		return nil, exists
	}
	var unpins []func()
	defer func() {
		for _, unpin := range unpins {
			unpin()
		}
	}()
	for _, l := range links {
		unpins = append(unpins, s.pins.pin(l.rec.Image))
	}
	remote.Pin = func(key string) { unpins = append(unpins, s.pins.pin(key)) }
	pulled, err := s.opts.Remotes.Pull(ctx, remote)
	if err != nil {
		return nil, err
	}
	id, err := s.recordPulled(ctx, want, pulled, opts)
	if err != nil {
		return nil, err
	}
	if pulled.Staged {
		return []mount.Mount{{Type: "bind", Source: s.upper(id), Options: []string{"ro", "rbind"}}}, nil
	}
	var random [8]byte
	rand.Read(random[:])
	name := remote.Namespace + pulledPrefix + hex.EncodeToString(random[:]) + " " + remote.ChainID.String()
	if err := s.Commit(ctx, name, want.Name, opts...); err != nil {
		return nil, errors.Join(err, s.Remove(context.WithoutCancel(ctx), want.Name))
	}
	return nil, exists
}

// recordPulled creates an active snapshot that holds a layer.
func (s *Snapshotter) recordPulled(ctx context.Context, want snapshots.Info, pulled Pulled,
	opts []snapshots.Opt,
) (string, error) {
	root, err := s.upperRoot(want.Labels, nil)
	if err != nil {
		return "", err
	}
	id, _, err := s.record(ctx, want, &lower{Blind: true, Streaming: want.Parent != ""}, root, opts)
	if err != nil {
		return "", err
	}
	err = s.amendActive(ctx, want.Name, id, func(_ *bolt.Tx, r *record) error {
		r.Streamed, r.StreamedUsage = []string{pulled.Key}, pulled.Usage
		return nil
	})
	if err != nil {
		err = errors.Join(err, s.Remove(context.WithoutCancel(ctx), want.Name))
	}
	return id, err
}
