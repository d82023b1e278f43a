package daemon

import (
	"context"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/snapshotter"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// lowers implements snapshotter.Lowers with the store. It converts types, and errors to containerd's kinds.
type lowers struct{ store *store.Store }

var _ snapshotter.Lowers = lowers{}

func (l lowers) BlobKey(diffID digest.Digest) string { return store.BlobKey(diffID) }

func (l lowers) ImageKey(layers []string) string { return store.ImageKey(layers) }

func (l lowers) AddDir(ctx context.Context, namespace, key, dir string) error {
	return toErrdefs(l.store.AddDir(ctx, store.ContainerdHolder(namespace), key, dir))
}

func (l lowers) AddBlob(ctx context.Context, b snapshotter.Blob) (snapshotter.Streamed, error) {
	st, err := l.store.AddBlob(ctx, store.Blob{
		Digest: b.Digest, MediaType: b.MediaType, DiffID: b.DiffID, Size: b.Size, Open: b.Open, Pin: b.Pin,
		Holder: store.ContainerdHolder(b.Namespace),
	})
	return streamed(st), toErrdefs(err)
}

func (l lowers) AddClaimed(ctx context.Context, claim snapshotter.Claim) (snapshotter.Streamed, error) {
	st, err := l.store.AddClaimed(ctx, store.Claim(claim))
	return streamed(st), toErrdefs(err)
}

func streamed(st store.Stored) snapshotter.Streamed {
	return snapshotter.Streamed{
		Key: st.Key, DiffID: st.DiffID, Size: st.Size, Usage: snapshots.Usage{Size: st.Bytes, Inodes: st.Entries},
	}
}

func (l lowers) Lower(ctx context.Context, img snapshotter.Image) (string, error) {
	dir, err := l.store.Lower(ctx, imageOf(img))
	return dir, toErrdefs(err)
}

func (l lowers) Plain(ctx context.Context, img snapshotter.Image) (string, error) {
	dir, err := l.store.Plain(ctx, imageOf(img))
	return dir, toErrdefs(err)
}

func imageOf(img snapshotter.Image) store.Image {
	out := store.Image{Key: img.Key, Holder: store.ContainerdHolder(img.Namespace), Name: img.Name}
	out.Layers = layersOf(img.Layers)
	return out
}

func layersOf(list []snapshotter.Layer) (out []store.Layer) {
	for _, f := range list {
		out = append(out, store.Layer{Key: f.Key, Dir: f.Dir, Claim: store.Claim(f.Claim)})
	}
	return out
}

func (l lowers) Sweep(ctx context.Context, use snapshotter.Uses, short bool) error {
	return toErrdefs(l.store.Sweep(ctx, uses{use}, short))
}

// uses adapts snapshotter.Uses to the store.
type uses struct{ snapshotter.Uses }

// needs maps the snapshotter's degrees of need to the store's.
var needs = map[snapshotter.Use]store.Use{
	snapshotter.Unused: store.Unused, snapshotter.Stored: store.Kept, snapshotter.Ready: store.Ready,
	snapshotter.InUse: store.InUse,
}

func (u uses) Image(key string) store.Use { return needs[u.Uses.Image(key)] }
func (u uses) Layer(key string) store.Use { return needs[u.Uses.Layer(key)] }
