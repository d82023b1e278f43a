package snapshotter

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	bolt "go.etcd.io/bbolt"
)

// Standing is a snapshot that can be mounted over a lower, and a description of that lower.
type Standing struct {
	// Namespace is the containerd namespace, and Name the key of the snapshot in it.
	Namespace, Name string
	// View says that the snapshot is read-only.
	View bool
	// Since is the time when the snapshot was created. Its lower never changes.
	Since time.Time
	// Image is the key of the image below; empty if there is none. Plain says that it is a copy on disk.
	Image string
	Plain bool
	// Dirs is the number of directories above the image.
	Dirs int
	// Why explains why the lower is not the shared image; empty if it is, or if the reason is not known.
	Why string
}

// Standing returns the active snapshots and views that stand on an image or on directories, by
// namespace and name. It leaves out layers being unpacked, because nothing runs in them.
func (s *Snapshotter) Standing(ctx context.Context) ([]Standing, error) {
	var list []Standing
	err := s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		all, err := all(ctx, tx)
		if err != nil {
			return err
		}
		for name, l := range all {
			low := l.rec.Lower
			if l.info.Kind == snapshots.KindCommitted || !low.stands() || isExtract(name, l.info.Labels) {
				continue
			}
			st := Standing{
				View: l.info.Kind == snapshots.KindView, Since: l.info.Created, Image: low.Image, Plain: low.Plain,
				Dirs: len(low.Dirs), Why: low.Why,
			}
			st.Namespace, st.Name = splitName(name)
			list = append(list, st)
		}
		return nil
	})
	slices.SortFunc(list, func(a, b Standing) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return list, err
}
