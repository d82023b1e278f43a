package daemon

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
)

// benchLayers are three layers of this machine's files, similar to an image of a scripting language.
var benchLayers = sync.OnceValue(func() [][]byte {
	tb := &testing.B{}
	var layers [][]byte
	for _, l := range []struct {
		max int64
		dir string
	}{{125 << 20, "/usr/lib/x86_64-linux-gnu"}, {100 << 20, "/usr/lib"}, {2 << 20, "/etc"}} {
		layers = append(layers, ocitest.TarTree(tb, l.max, l.dir))
	}
	return layers
})

// BenchmarkPull prepares, applies and commits the layers of a fetched image concurrently, as
// containerd does, until a container could start. The time of containerd itself is not included.
func BenchmarkPull(b *testing.B) {
	needRoot(b)
	for _, f := range flavours[:2] {
		for _, compression := range []struct {
			name, mediaType string
			c               ocitest.Compression
		}{
			{"gzip", ocispec.MediaTypeImageLayerGzip, ocitest.Gzip},
			{"plain", ocispec.MediaTypeImageLayer, ocitest.None},
		} {
			b.Run(f.name+"/"+compression.name, func(b *testing.B) {
				ctx := namespaces.WithNamespace(b.Context(), "bench")
				store, err := local.NewStore(b.TempDir())
				if err != nil {
					b.Fatal(err)
				}
				var blobs []ocispec.Descriptor
				var diffIDs []digest.Digest
				total := int64(0)
				for _, tar := range benchLayers() {
					raw := ocitest.Pack(b, tar, compression.c)
					desc := ocispec.Descriptor{
						MediaType: compression.mediaType, Digest: digest.FromBytes(raw),
						Size: int64(len(raw)),
					}
					if err := content.WriteBlob(ctx, store, desc.Digest.String(), bytes.NewReader(raw),
						desc); err != nil {
						b.Fatal(err)
					}
					blobs, diffIDs = append(blobs, desc), append(diffIDs, digest.FromBytes(tar))
					total += int64(len(tar))
				}
				b.SetBytes(total)
				for b.Loop() {
					b.StopTimer()
					root, err := os.MkdirTemp(b.TempDir(), "")
					if err != nil {
						b.Fatal(err)
					}
					c := f.config(root)
					cl, err := start(ctx, c, store)
					if err != nil {
						b.Fatal(err)
					}
					unix.Sync()
					b.StartTimer()
					if err := cl.pull(ctx, blobs, diffIDs); err != nil {
						b.Fatal(err)
					}
					b.StopTimer()
					if err := cl.purge(ctx); err != nil {
						b.Fatal(err)
					}
					if err := cl.end(); err != nil {
						b.Fatal(err)
					}
					if err := removePool(c); err != nil {
						b.Fatal(err)
					}
					os.RemoveAll(filepath.Dir(c.Address))
					b.StartTimer()
				}
			})
		}
	}
}

// pull unpacks layers like containerd's unpacker in parallel mode.
func (c *client) pull(ctx context.Context, blobs []ocispec.Descriptor, diffIDs []digest.Digest) error {
	applied := make([]chan struct{}, len(blobs))
	labels := make([]snapshots.Opt, len(blobs))
	keys := make([]string, len(blobs))
	names := make([]string, len(blobs))
	g, gctx := errgroup.WithContext(ctx)
	for i := range blobs {
		applied[i] = make(chan struct{})
		names[i] = identity.ChainID(diffIDs[:i+1]).String()
		keys[i] = fmt.Sprintf(snapshots.UnpackKeyFormat, "1-bench", names[i])
		l := map[string]string{snapshots.LabelSnapshotRef: names[i], labelDiff: diffIDs[i].String()}
		if i > 0 {
			l["containerd.io/snapshot/parent-chain-id"] = names[i-1]
		}
		labels[i] = snapshots.WithLabels(l)
		g.Go(func() error {
			defer close(applied[i])
			mounts, err := c.remote.Prepare(gctx, keys[i], "", labels[i])
			if err != nil {
				return err
			}
			_, err = c.applier.Apply(gctx, blobs[i], mounts)
			return err
		})
	}
	for i := range blobs {
		<-applied[i]
		if gctx.Err() != nil {
			break
		}
		opts := []snapshots.Opt{labels[i]}
		if i > 0 {
			opts = append(opts, snapshots.WithParent(names[i-1]))
		}
		if err := c.remote.Commit(ctx, names[i], keys[i], opts...); err != nil {
			return err
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	_, err := c.remote.Prepare(ctx, "container", names[len(names)-1])
	return err
}

const labelDiff = "containerd.io/snapshot/diff-id"
