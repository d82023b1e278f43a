package snapshotter

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	bolt "go.etcd.io/bbolt"
)

// Walk calls fn for each snapshot that matches a filter.
//
// containerd uses Walk to find the snapshot that a Prepare reported as existing: in all namespaces, by
// a label that anybody may set. It takes the first match, so Walk then shows only snapshots pulled for
// the asking namespace, and those that stand for an image of a shared pool.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	ns, _ := namespaces.Namespace(ctx)
	seeks := seeksRef(filters)
	return s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		return storage.WalkInfo(ctx, func(wctx context.Context, info snapshots.Info) error {
			if seeks && !isPulled(ns, info) {
				if claimed, err := isClaimed(ctx, tx, info.Name); err != nil || !claimed {
					return err
				}
			}
			return fn(wctx, info)
		}, filters...)
	})
}

// seeksRef reports whether all filters ask for snapshots by their future name.
func seeksRef(filters []string) bool {
	for _, f := range filters {
		if !strings.HasPrefix(f, fmt.Sprintf("labels.%q==", snapshots.LabelSnapshotRef)) {
			return false
		}
	}
	return len(filters) > 0
}

// isPulled reports whether this package committed a snapshot for a namespace.
func isPulled(namespace string, info snapshots.Info) bool {
	return info.Kind == snapshots.KindCommitted && strings.HasPrefix(info.Name, namespace+pulledPrefix)
}

// hasPulled reports whether a pulled snapshot of the same layer and parent exists already.
func (s *Snapshotter) hasPulled(ctx context.Context, want snapshots.Info, remote Remote) (found bool, err error) {
	filter := fmt.Sprintf("labels.%q==%s,parent==%q", snapshots.LabelSnapshotRef, remote.ChainID, want.Parent)
	err = storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
		found = found || isPulled(remote.Namespace, info) && info.Parent == want.Parent
		return nil
	}, filter)
	return found, err
}
