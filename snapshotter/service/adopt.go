package service

import (
	"context"

	"github.com/containerd/log"
)

// adopt goes through the mounts of an earlier process. Those whose image is still the one that was mounted are taken over;
// those of a pool that was lost show bytes that are nobody's, and go. What is busy goes when its image is mounted again.
func (l *lowers) adopt(ctx context.Context) error {
	for _, m := range l.table.List() {
		img, err := l.pool.Image(m.Key)
		if err == nil && img.Off == m.Source.Off && img.Size == m.Source.Size && version(img) == m.Source.Version {
			if _, err = l.table.Mount(ctx, m.Source, holder); err == nil {
				continue
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		logger := log.G(ctx).WithField("chain", m.Key)
		logger.WithError(err).Warn("unmounting an image that the pool does not hold")
		if err := l.table.Unmount(ctx, m.Key); err != nil {
			logger.WithError(err).Warn("an image that the pool does not hold stays mounted")
		}
	}
	return nil
}
