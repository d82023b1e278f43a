package daemon

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// streaming is a snapshotter that commits like a pull: containerd's own code makes a layer blob from
// the active snapshot's changes, the snapshot is dropped, and our differ applies the blob to a new snapshot.
type streaming struct {
	snapshots.Snapshotter
	applier diff.Applier
	store   content.Store
}

func (s *streaming) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	info, err := s.Stat(ctx, key)
	if err != nil {
		return err
	}
	if info.Kind != snapshots.KindActive {
		return s.Snapshotter.Commit(ctx, name, key, opts...)
	}
	if _, err := s.Stat(ctx, name); err == nil {
		return s.Snapshotter.Commit(ctx, name, key, opts...)
	}
	var blob bytes.Buffer
	if err := s.diff(ctx, &blob, key, info.Parent); err != nil {
		return fmt.Errorf("diff of %q: %w", key, err)
	}
	desc, diffID, err := s.put(ctx, blob.Bytes())
	if err != nil {
		return err
	}
	if err := s.Remove(ctx, key); err != nil {
		return err
	}
	return s.unpack(ctx, desc, diffID, name, key, info.Parent, opts...)
}

// diff writes the changes of key over parent as a tar.
func (s *streaming) diff(ctx context.Context, w *bytes.Buffer, key, parent string) error {
	upper, err := s.Mounts(ctx, key)
	if err != nil {
		return err
	}
	view := fmt.Sprintf("view-%s", key)
	lower, err := s.View(ctx, view, parent)
	if err != nil {
		return err
	}
	err = mount.WithReadonlyTempMount(ctx, lower, func(a string) error {
		return mount.WithTempMount(ctx, upper, func(b string) error {
			return archive.WriteDiff(ctx, w, a, b)
		})
	})
	return errors.Join(err, s.Remove(ctx, view))
}

// put compresses and stores a tar.
func (s *streaming) put(ctx context.Context, tar []byte) (ocispec.Descriptor, digest.Digest, error) {
	var b bytes.Buffer
	// The race detector makes compressing so slow that it takes most of the time of these tests.
	z, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	if _, err := z.Write(tar); err != nil {
		return ocispec.Descriptor{}, "", err
	}
	if err := z.Close(); err != nil {
		return ocispec.Descriptor{}, "", err
	}
	desc := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(b.Bytes()),
		Size: int64(b.Len()),
	}
	return desc, digest.FromBytes(tar), content.WriteBlob(ctx, s.store, desc.Digest.String(), &b, desc)
}

// unpack unpacks one layer like containerd's unpacker.
func (s *streaming) unpack(ctx context.Context, desc ocispec.Descriptor, diffID digest.Digest, name, key, parent string,
	opts ...snapshots.Opt,
) error {
	labels := snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef:       name,
		"containerd.io/snapshot/diff-id": diffID.String(),
	})
	mounts, err := s.Prepare(ctx, key, parent, labels)
	if err != nil {
		return err
	}
	got, err := s.applier.Apply(ctx, desc, mounts)
	if err != nil {
		return err
	}
	if got.Digest != diffID {
		return fmt.Errorf("the differ says %s, the layer is %s", got.Digest, diffID)
	}
	return s.Snapshotter.Commit(ctx, name, key, opts...)
}

// TestSuiteStreaming runs containerd's conformance tests with every commit streamed.
func TestSuiteStreaming(t *testing.T) {
	slow.Skip(t, "mounts hundreds of layers")
	for _, f := range fewFlavours(3) {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			f.need(t)
			suite(t, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				c := f.config(root)
				store, err := local.NewStore(filepath.Join(root, "content"))
				if err != nil {
					return nil, nil, err
				}
				cl, err := start(ctx, c, store)
				if err != nil {
					return nil, nil, err
				}
				return &streaming{cl.remote, cl.applier, store}, func() error {
					err := errors.Join(cl.settle(ctx), cl.purge(ctx), cl.end(), removePool(c))
					// The suite's directories must not be below a mount that a failure left behind.
					return errors.Join(err, os.RemoveAll(filepath.Join(root, "content")))
				}, nil
			})
		})
	}
}
