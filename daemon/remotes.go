package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	containerdremotes "github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

var _ snapshotter.Remotes = (*remotes)(nil)

// remotes pulls layers file by file.
type remotes struct {
	d    *Daemon
	conf config.Partial
	repositories
	refusals
	manifests manifests
}

// newRemotes returns nil if layers are not to be pulled file by file.
func newRemotes(d *Daemon) snapshotter.Remotes {
	c := d.cfg
	// If a reboot loses the pool and containerd's blobs are the source of its layers, containerd must have the blobs.
	if !c.Partial.Enabled || c.Layers.Durability == config.DurabilityContent && !d.store.Durable() {
		return nil
	}
	return &remotes{d: d, conf: c.Partial, repositories: repositories{hostDirs: c.Registries.HostsDirs}}
}

func notFor(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrNotImplemented)...)
}

// Pull implements snapshotter.Remotes.
func (r *remotes) Pull(ctx context.Context, l snapshotter.Remote) (snapshotter.Pulled, error) {
	if r.d.store.Pool().Usage().Extents == 0 {
		return snapshotter.Pulled{}, notFor("the pool is empty: there is nothing to save")
	}
	if l.Image == "" {
		var err error
		if l, err = r.name(ctx, l); err != nil {
			return snapshotter.Pulled{}, err
		}
	}
	if err := r.worthTrying(l); err != nil {
		return snapshotter.Pulled{}, err
	}
	w, err := r.findLayer(ctx, l)
	if err != nil {
		return snapshotter.Pulled{}, err
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, time.Duration(r.conf.LayerTimeout))
	defer cancel()
	var c counts
	st, err := r.fetch(ctx, l, w, &c)
	r.d.metrics.pulled(&c, err)
	if err != nil {
		if blamesRegistry(err) {
			r.refuse(l.Manifest)
		}
		return snapshotter.Pulled{}, toErrdefs(err)
	}
	log.G(ctx).WithFields(log.Fields{
		"image": l.Image, "layer": l.Blob, "blob_bytes": w.desc.Size, "fetched_bytes": c.fetched.Load(),
		"ranges": c.ranges.Load(), "missing_bytes": c.missing, "pool_bytes": c.have,
		"took": time.Since(began).Round(time.Millisecond),
	}).Info("pulled the files of a layer that the pool did not have")
	return snapshotter.Pulled{Streamed: streamed(st), Staged: w.staged}, nil
}

// worthTrying returns an error if the name of the image rules out a pull.
func (r *remotes) worthTrying(l snapshotter.Remote) error {
	ref, err := reference.ParseDockerRef(l.Image)
	if err != nil {
		return notFor("image %q: %v", l.Image, err)
	}
	if slices.Contains(r.conf.Exclude, reference.Domain(ref)) {
		return notFor("registry %s is excluded", reference.Domain(ref))
	}
	if r.refused(l.Manifest) {
		return notFor("a layer of this image could not be pulled by its files")
	}
	return nil
}

// wanted is a layer that can be pulled file by file.
type wanted struct {
	desc   ocispec.Descriptor
	layout chunked.Layout
	diffID digest.Digest
	staged bool
}

// findLayer looks the layer up in the manifest and the configuration of the image, which containerd has already.
func (r *remotes) findLayer(ctx context.Context, l snapshotter.Remote) (wanted, error) {
	ctx = namespaces.WithNamespace(ctx, l.Namespace)
	var m ocispec.Manifest
	if err := r.d.blobs.document(ctx, l.Manifest, &m); err != nil {
		return wanted{}, err
	}
	i := slices.IndexFunc(m.Layers, func(d ocispec.Descriptor) bool { return d.Digest == l.Blob })
	if i < 0 {
		return wanted{}, notFor("manifest %s has no layer %s", l.Manifest, l.Blob)
	}
	layout, err := chunked.ParseLayout(m.Layers[i])
	if errors.Is(err, chunked.ErrNotChunked) {
		return wanted{}, notFor("%w", err)
	}
	if err != nil {
		return wanted{}, err
	}
	var c ocispec.Image
	if err := r.d.blobs.document(ctx, m.Config.Digest, &c); err != nil {
		return wanted{}, err
	}
	// A layer may occur more than once; the chain ID selects one.
	if len(c.RootFS.DiffIDs) != len(m.Layers) {
		return wanted{}, notFor("%d diff IDs for %d layers", len(c.RootFS.DiffIDs), len(m.Layers))
	}
	chain := identity.ChainIDs(slices.Clone(c.RootFS.DiffIDs))
	i = slices.Index(chain, l.ChainID)
	if i < 0 || m.Layers[i].Digest != l.Blob {
		return wanted{}, notFor("configuration %s has no layer with chain ID %s", m.Config.Digest, l.ChainID)
	}
	if r.d.blobs.knows(ctx, m.Layers[i]) {
		return wanted{}, notFor("containerd has blob %s, or is fetching it", l.Blob)
	}
	w := wanted{desc: m.Layers[i], layout: layout, diffID: c.RootFS.DiffIDs[i]}
	if i > 0 && !l.HasParent {
		// Only Commit names the parent, so the snapshot cannot be committed here.
		if w.staged = r.d.blobs.takesStaged(ctx); !w.staged {
			return wanted{}, notFor("this containerd cannot skip layers that it unpacks in parallel")
		}
	}
	return w, nil
}

// maxDocument bounds a manifest or a configuration.
const maxDocument = 8 << 20

// document reads a JSON document from containerd and verifies its digest.
func (b *blobs) document(ctx context.Context, id digest.Digest, v any) error {
	info, err := b.store.Info(ctx, id)
	if err != nil {
		return notFor("document %s: %v", id, err)
	}
	if info.Size > maxDocument {
		return notFor("document %s has %d bytes", id, info.Size)
	}
	raw, err := content.ReadBlob(ctx, b, ocispec.Descriptor{Digest: id, Size: info.Size})
	if err != nil {
		return notFor("document %s: %v", id, err)
	}
	if got := id.Algorithm().FromBytes(raw); got != id {
		return notFor("document %s: its digest is %s", id, got)
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return notFor("document %s: %v", id, err)
	}
	return nil
}

// knows reports whether containerd has a blob or is fetching it.
func (b *blobs) knows(ctx context.Context, d ocispec.Descriptor) bool {
	if _, err := b.store.Info(ctx, d.Digest); err == nil {
		return true
	}
	_, err := b.store.Status(ctx, containerdremotes.MakeRefKey(ctx, d))
	return err == nil
}

// takesStaged reports whether containerd commits a snapshot with read-only mounts without applying the
// layer. It asks containerd each time, because containerd may be upgraded while we run.
func (b *blobs) takesStaged(ctx context.Context) bool {
	v, err := b.version.Version(ctx, &emptypb.Empty{})
	return err == nil && stagesLayers(v.Version)
}

// stagesLayers reports whether a version of containerd is 2.4.0 or later. Prereleases of 2.4.0 do it only in part.
func stagesLayers(version string) bool {
	var major, minor int
	version = strings.TrimPrefix(version, "v")
	if n, err := fmt.Sscanf(version, "%d.%d.", &major, &minor); n != 2 || err != nil {
		return false
	}
	return major > 2 || major == 2 && (minor > 4 || minor == 4 && !strings.HasPrefix(version, "2.4.0-"))
}
