package snapshotter

import (
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
)

// Labels of containerd's unpacker on the snapshots that it prepares. It exports no constants for them.
const (
	labelDiffID        = "containerd.io/snapshot/diff-id"
	labelParentChainID = "containerd.io/snapshot/parent-chain-id"
	labelImageRef      = "containerd.io/snapshot/cri.image-ref"
	labelLayerDigest   = "containerd.io/snapshot/cri.layer-digest"
	labelImageLayers   = "containerd.io/snapshot/cri.image-layers"
)

// splitName splits the name that a proxied snapshotter gets, "<namespace>/<n>/<name of the client>". A
// name of another form has no namespace.
func splitName(name string) (namespace, client string) {
	ns, rest, ok := strings.Cut(name, "/")
	if !ok || ns == "" {
		return "", name
	}
	seq, client, ok := strings.Cut(rest, "/")
	if !ok || seq == "" || strings.Trim(seq, "0123456789") != "" {
		return "", name
	}
	return ns, client
}

// isExtract reports whether an active snapshot is a layer being unpacked. Nothing runs in such a
// snapshot, and nothing mounts its lower.
func isExtract(key string, labels map[string]string) bool {
	_, client := splitName(key)
	return labels[snapshots.LabelSnapshotRef] != "" || strings.HasPrefix(client, snapshots.UnpackKeyPrefix+"-")
}

// claimOf returns the claim about a layer in the labels of its snapshot.
func claimOf(name string, labels map[string]string) Claim {
	diffID, err := digest.Parse(labels[labelDiffID])
	if err != nil {
		return Claim{}
	}
	ns, _ := splitName(name)
	claim := Claim{Namespace: ns, DiffID: diffID}
	if blob, err := digest.Parse(labels[labelLayerDigest]); err == nil {
		claim.Blob = blob
	}
	return claim
}

// isTop reports whether the labels mark the last layer of an image. containerd adds them for remote
// snapshotters: the list of the remaining layers contains only the layer itself if it is the last one.
func isTop(labels map[string]string) bool {
	layer := labels[labelLayerDigest]
	return layer != "" && layer == labels[labelImageLayers]
}
