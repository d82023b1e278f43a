package daemon

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// labelConfig is a label that containerd sets on image manifests, and on nothing else.
const labelConfig = "containerd.io/gc.ref.content.config"

// manifests caches the manifests read to find the image of a layer. The zero value is empty.
type manifests struct {
	mu   sync.Mutex
	read map[digest.Digest]imageLayers
}

// imageLayers maps chain IDs to blob digests, for the layers of an image that can be pulled file by file.
type imageLayers map[digest.Digest]digest.Digest

// maxImages bounds how many images are cached.
const maxImages = 1024

// name finds the image of a layer whose client does not name it, such as nerdctl and "ctr image pull
// --local". containerd has the manifest by then, with a label that names its repository.
func (r *remotes) name(ctx context.Context, l snapshotter.Remote) (snapshotter.Remote, error) {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, l.Namespace), time.Duration(r.conf.AnswerTimeout))
	defer cancel()
	var found []content.Info
	err := r.d.blobs.store.Walk(ctx, func(info content.Info) error {
		if sourceOf(info) != "" {
			found = append(found, info)
		}
		return nil
	}, `labels."`+labelConfig+`"`)
	if err != nil {
		return l, notFor("images of containerd: %v", err)
	}
	// The image that is being pulled was labelled last.
	slices.SortFunc(found, func(a, b content.Info) int {
		return cmp.Or(b.UpdatedAt.Compare(a.UpdatedAt), cmp.Compare(a.Digest, b.Digest))
	})
	for _, info := range found {
		if blob, ok := r.layersOf(ctx, info.Digest)[l.ChainID]; ok {
			l.Image, l.Manifest, l.Blob = sourceOf(info)+"@"+info.Digest.String(), info.Digest, blob
			return l, nil
		}
	}
	return l, notFor("no image of containerd has a layer in zstd:chunked with chain ID %s", l.ChainID)
}

// sourceOf returns the repository of a blob from containerd's label, or "" if there is none. The label has no port.
func sourceOf(info content.Info) string {
	for _, key := range slices.Sorted(maps.Keys(info.Labels)) {
		if host, ok := strings.CutPrefix(key, labels.LabelDistributionSource+"."); ok && host != "" {
			repo, _, _ := strings.Cut(info.Labels[key], ",")
			return host + "/" + repo
		}
	}
	return ""
}

// layersOf reads a manifest and its configuration. An unreadable one has no layers until containerd has it.
func (r *remotes) layersOf(ctx context.Context, manifest digest.Digest) imageLayers {
	r.manifests.mu.Lock()
	layers, ok := r.manifests.read[manifest]
	r.manifests.mu.Unlock()
	if ok {
		return layers
	}
	var m ocispec.Manifest
	var c ocispec.Image
	if r.d.blobs.document(ctx, manifest, &m) != nil || r.d.blobs.document(ctx, m.Config.Digest, &c) != nil {
		return nil
	}
	layers = imageLayers{}
	if len(c.RootFS.DiffIDs) == len(m.Layers) {
		for i, id := range identity.ChainIDs(slices.Clone(c.RootFS.DiffIDs)) {
			if _, err := chunked.ParseLayout(m.Layers[i]); err == nil {
				layers[id] = m.Layers[i].Digest
			}
		}
	}
	r.manifests.mu.Lock()
	defer r.manifests.mu.Unlock()
	if r.manifests.read == nil || len(r.manifests.read) >= maxImages {
		r.manifests.read = map[digest.Digest]imageLayers{}
	}
	r.manifests.read[manifest] = layers
	return layers
}
