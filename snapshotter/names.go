package snapshotter

import (
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
)

// Labels that containerd's unpacker puts on the snapshots that it prepares and commits. It has no constants for them.
const (
	labelDiffID        = "containerd.io/snapshot/diff-id"
	labelParentChainID = "containerd.io/snapshot/parent-chain-id"
	labelImageRef      = "containerd.io/snapshot/cri.image-ref"
	labelLayerDigest   = "containerd.io/snapshot/cri.layer-digest"
	labelImageLayers   = "containerd.io/snapshot/cri.image-layers"
)

// splitName takes the name apart that a proxied snapshotter sees: "<namespace>/<n>/<name of the client>". A name of
// another form has no namespace.
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

// isExtract reports whether an active snapshot is a layer being unpacked: nothing runs in it and, one layer per
// snapshot, nothing ever mounts what it stands on.
func isExtract(key string, labels map[string]string) bool {
	_, client := splitName(key)
	return labels[snapshots.LabelSnapshotRef] != "" || strings.HasPrefix(client, snapshots.UnpackKeyPrefix+"-")
}

// claimOf returns what the labels of a snapshot claim about its layer.
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

// isTop reports whether the labels say that a layer is the last one of its image. containerd adds them for remote
// snapshotters: the label of the remaining layers names the layer alone if it is the last one.
func isTop(labels map[string]string) bool {
	layer := labels[labelLayerDigest]
	return layer != "" && layer == labels[labelImageLayers]
}
