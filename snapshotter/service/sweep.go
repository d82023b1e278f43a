package service

import (
	"context"
	"errors"
	"strings"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// Sweep implements snapshotter.Lowers. What is busy stays, for the next sweep.
func (l *lowers) Sweep(ctx context.Context, use snapshotter.Uses, short bool) error {
	var errs []error
	chains := map[string]bool{}
	for _, img := range l.pool.Images() {
		chains[img.Key] = true
	}
	for _, m := range l.table.List() {
		chains[m.Key] = true
	}
	for chain := range chains {
		errs = append(errs, l.sweepImage(ctx, chain, use, short))
	}
	for _, key := range l.pool.Layers() {
		errs = append(errs, l.sweepLayer(ctx, key, use, short))
	}
	if l.packs != nil {
		ids, err := l.packs.list()
		errs = append(errs, err)
		for _, id := range ids {
			errs = append(errs, l.sweepPack(ctx, id, use))
		}
	}
	return toErrdefs(errors.Join(errs...))
}

func (l *lowers) sweepImage(ctx context.Context, chain string, use snapshotter.Uses, short bool) error {
	if use.Image(chain) == snapshotter.InUse {
		return nil // and it may be in the making: do not wait for that
	}
	unlock, err := l.chains.lock(ctx, chain)
	if err != nil {
		return err
	}
	defer unlock()
	u := use.Image(chain)
	if u == snapshotter.InUse || u == snapshotter.Ready && !short {
		return nil
	}
	_, mounted := l.table.Get(chain)
	if !mounted && u == snapshotter.Stored && !short {
		return nil // as it should be
	}
	// Not only if the table has it: containers may outlive a mount that was replaced, or that the table did not adopt.
	if where, err := usedElsewhere(l.table.Dir(chain)); err != nil || where != "" {
		// No snapshot stands on it, but something that was mounted from it does. Its pages must not be given away.
		log.G(ctx).WithError(err).WithField("chain", chain).WithField("user", where).Warn("the image of a removed snapshot is still mounted somewhere, keeping it")
		return nil
	}
	if mounted {
		l.table.Release(chain, holder)
		err := l.table.Unmount(ctx, chain)
		if errors.Is(err, mount.ErrBusy) {
			log.G(ctx).WithError(err).WithField("chain", chain).Debug("image is busy, keeping it")
			return nil
		}
		if err != nil && !errors.Is(err, mount.ErrNotFound) {
			return err
		}
	}
	if u == snapshotter.Stored && !short {
		return nil
	}
	if err := l.pool.RemoveImage(ctx, chain); err != nil && !errors.Is(err, pool.ErrNotFound) && !errors.Is(err, pool.ErrBusy) {
		return err
	}
	return nil
}

func (l *lowers) sweepLayer(ctx context.Context, key string, use snapshotter.Uses, short bool) error {
	if use.Layer(key) == snapshotter.InUse {
		return nil
	}
	unlock, err := l.layers.lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	u := use.Layer(key)
	if u == snapshotter.Unused || short && u == snapshotter.Stored && l.restorable(key) {
		if err := l.pool.RemoveLayer(ctx, key); err != nil && !errors.Is(err, pool.ErrNotFound) {
			return err
		}
	}
	return nil
}

// restorable tells whether a layer can be stored again: from its directory, or from its pack.
func (l *lowers) restorable(key string) bool {
	id, isBlob := strings.CutPrefix(key, blobPrefix)
	return !isBlob || l.packs != nil && l.packs.has(digest.Digest(id))
}

func (l *lowers) sweepPack(ctx context.Context, id digest.Digest, use snapshotter.Uses) error {
	key := blobPrefix + id.String()
	unlock, err := l.layers.lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	if use.Layer(key) != snapshotter.Unused {
		return nil
	}
	return l.packs.remove(id)
}
