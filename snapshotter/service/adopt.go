package service

import (
	"context"

	"github.com/containerd/log"
)

// adopt goes through the mounts of an earlier process. Those whose image is still where it was are taken over; those of
// a pool that was lost show bytes that are nobody's, and go.
func (l *lowers) adopt(ctx context.Context) error {
	for _, m := range l.table.List() {
		img, err := l.pool.Image(m.Key)
		if err == nil && img.Off == m.Source.Off && img.Size == m.Source.Size {
			if _, err = l.table.Mount(ctx, m.Source, holder); err == nil {
				continue
			}
		}
		log.G(ctx).WithError(err).WithField("chain", m.Key).Warn("unmounting an image that the pool does not hold")
		if err := l.table.Unmount(ctx, m.Key); err != nil {
			return err
		}
	}
	return nil
}
