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
	labelLayerDigest   = "containerd.io/snapshot/cri.layer-digest"
	labelImageLayers   = "containerd.io/snapshot/cri.image-layers"
)

// clientName returns the name that the client of containerd gave. A proxied snapshotter sees "<namespace>/<n>/<name>".
func clientName(name string) string {
	ns, rest, ok := strings.Cut(name, "/")
	if !ok || ns == "" {
		return name
	}
	seq, client, ok := strings.Cut(rest, "/")
	if !ok || seq == "" || strings.Trim(seq, "0123456789") != "" {
		return name
	}
	return client
}

// chainID returns the chain ID that the name of a committed snapshot carries, or "". The name is the only place that
// always has it: Image.Unpack sets no labels.
func chainID(name string) digest.Digest {
	d, err := digest.Parse(clientName(name))
	if err != nil {
		return ""
	}
	return d
}

// isExtract reports whether an active snapshot is a layer being unpacked: nothing runs in it and, one layer per
// snapshot, nothing ever mounts what it stands on.
func isExtract(key string, labels map[string]string) bool {
	return labels[snapshots.LabelSnapshotRef] != "" || strings.HasPrefix(clientName(key), snapshots.UnpackKeyPrefix+"-")
}

// position is where a layer is in its image, as far as the labels tell.
type position int

const (
	positionUnknown position = iota
	positionInner
	positionTop
)

// positionOf reads the position of a layer from the labels that containerd adds for remote snapshotters: the label of
// the remaining layers names the layer alone if it is the last one.
func positionOf(labels map[string]string) position {
	layer, rest := labels[labelLayerDigest], labels[labelImageLayers]
	switch {
	case layer == "" || rest == "":
		return positionUnknown
	case layer == rest:
		return positionTop
	default:
		return positionInner
	}
}
