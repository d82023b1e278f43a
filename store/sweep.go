package store

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// Use says how urgently an image or layer is needed.
type Use int

// The degrees of need, lowest first.
const (
	// Unused things are freed, together with everything from which they could be restored.
	Unused Use = iota
	// Kept things stay in the pool, unmounted.
	Kept
	// Ready things stay mounted: a container may start from them at any moment.
	Ready
	// InUse things must stay: something uses them, an operation is running, or there is no other copy.
	InUse
)

// Uses tells Sweep what containerd needs. Its methods must be cheap. They are called at the moment of
// freeing, under the lock that excludes Lower and AddBlob for the same key.
type Uses interface {
	Image(key string) Use
	Layer(key string) Use
	// Plain reports whether the plain copy of an image is needed.
	Plain(key string) bool
	// Namespaces returns the namespaces that have snapshots of an image or a layer.
	Namespaces(key string) []string
}

// Sweep frees what nobody holds. use tells what containerd needs; without it, containerd's namespaces
// hold what the index says. With short set memory is needed: Sweep also frees Kept and Ready things
// that can be made again. Busy things stay until the next sweep.
func (s *Store) Sweep(ctx context.Context, use Uses, short bool) error {
	s.sweeping.Lock()
	defer s.sweeping.Unlock()
	w := &sweep{Store: s, use: use, short: short}
	var errs []error
	errs = append(errs, s.dropMounts(ctx), w.reconcile())
	w.findPrefixes()
	images := map[string]bool{}
	for key := range s.imageRecords() {
		images[key] = true
	}
	for _, m := range s.pool.Images() {
		images[m.Key] = true
	}
	for _, m := range s.Mounted() {
		images[m.Key] = true
	}
	for key := range images {
		errs = append(errs, w.image(ctx, key))
	}
	w.findHeld()
	for _, key := range s.pool.Layers() {
		errs = append(errs, w.layer(ctx, key))
	}
	for key := range s.layerRecords() {
		errs = append(errs, w.layer(ctx, key))
	}
	if use != nil {
		errs = append(errs, w.sweepPacks(ctx), s.sweepPlain(ctx, use.Plain))
	}
	errs = append(errs, s.pool.FlushRecords(), s.reclaim(ctx), s.turn(ctx), s.rebuild(ctx), s.retire(ctx))
	return errors.Join(errs...)
}

// Mounted returns the images that are mounted now.
func (s *Store) Mounted() []mount.Mounted {
	s.epoch.RLock()
	defer s.epoch.RUnlock()
	return s.table.List()
}

// sweep is one call of Sweep.
type sweep struct {
	*Store
	use   Uses
	short bool
	held  map[string]bool // layers of images with holders outside containerd
	// prefixes are images that readers need as bases of needed ones.
	prefixes map[string]bool
}

// lasting reports whether a holder wants an image in the pool even if nothing on this host uses it.
func lasting(holder string) bool { return strings.HasPrefix(holder, holderPin) }

// needOf returns the need of holders. containerd says whether holders of containerd count.
func needOf(holders []string, containerd bool) Use {
	need := Unused
	for _, h := range holders {
		switch {
		case ofContainerd(h):
			if containerd {
				need = InUse
			}
		case lasting(h):
			need = max(need, Kept)
		default:
			need = InUse
		}
	}
	return need
}

func (w *sweep) needOfImage(key string) Use {
	if w.retired(key) {
		return Unused
	}
	return w.needOf(canonical(key))
}

// needOf returns the need of an image, whichever key it has in the pool.
func (w *sweep) needOf(key string) Use {
	need := needOf(w.imageRecord(key).Holders, w.use == nil)
	if w.use != nil {
		need = max(need, w.use.Image(key))
	}
	if w.prefixes[key] {
		need = max(need, Kept)
	}
	return need
}

func (w *sweep) needOfLayer(key string) Use {
	w.mu.Lock()
	holders := w.records.layers[key].Holders
	w.mu.Unlock()
	need := needOf(holders, w.use == nil)
	if w.held[key] || need == Kept { // a pinned layer may have no other copy
		return InUse
	}
	if w.use != nil {
		need = max(need, w.use.Layer(key))
	}
	return need
}

// reconcile updates containerd's holders in the index from the snapshotter's records.
func (w *sweep) reconcile() error {
	if w.use == nil {
		return nil
	}
	holders := func(key string, have []string) []string {
		now := without(have, ofContainerd)
		for _, ns := range w.use.Namespaces(key) {
			now = add(now, ContainerdHolder(ns))
		}
		return now
	}
	var errs []error
	for key := range w.imageRecords() {
		errs = append(errs, w.amendImage(key, func(r *imageRecord) { r.Holders = holders(key, r.Holders) }))
	}
	for key := range w.layerRecords() {
		errs = append(errs, w.amendLayer(key, func(r *layerRecord) { r.Holders = holders(key, r.Holders) }))
	}
	for _, key := range w.pool.Layers() { // layers without a record
		if w.use.Layer(key) > Unused {
			errs = append(errs, w.amendLayer(key, func(r *layerRecord) { r.Holders = holders(key, r.Holders) }))
		}
	}
	return errors.Join(errs...)
}

// findHeld finds the layers of images that containerd does not know.
func (w *sweep) findHeld() {
	w.held = map[string]bool{}
	for _, r := range w.imageRecords() {
		if slices.ContainsFunc(r.Holders, func(h string) bool { return w.use == nil || !ofContainerd(h) }) {
			for _, key := range r.Layers {
				w.held[key] = true
			}
		}
	}
}

// image unmounts an image that need not be ready, and removes one that is not needed.
func (w *sweep) image(ctx context.Context, key string) error {
	if w.needOfImage(key) == InUse {
		return nil // it may be in the making: do not wait for that
	}
	unlock, err := w.images.lock(ctx, canonical(key))
	if err != nil {
		return err
	}
	defer unlock()
	w.epoch.RLock()
	defer w.epoch.RUnlock()
	need := w.needOfImage(key)
	if need == InUse || need == Ready && !w.short {
		return nil
	}
	retired := w.retired(key)
	if retired && !w.mayRetire() && w.needOf(canonical(key)) > Unused {
		return nil
	}
	pinned := slices.ContainsFunc(w.imageRecord(canonical(key)).Holders, lasting)
	keep := need > Unused && (!w.short || pinned || w.prefixes[canonical(key)]) || w.keeps(ctx)
	if _, mounted := w.table.Get(key); mounted {
		if free, err := w.unmount(ctx, key); err != nil || !free {
			return err
		}
	}
	if keep {
		return nil
	}
	names := w.imageRecord(canonical(key)).Names
	u, _ := w.pool.ImageUsage(key)
	err = w.pool.RemoveImage(ctx, key)
	if errors.Is(err, pool.ErrLeased) {
		log.G(ctx).WithError(err).WithField("image", key).Info("an image that was removed waits for readers")
		return nil
	}
	gone := errors.Is(err, pool.ErrNotFound)
	if err != nil && !gone {
		return err
	}
	if need == Unused && !retired {
		if err := w.forgetImage(canonical(key)); err != nil {
			return err
		}
	}
	if gone {
		return nil
	}
	logger := log.G(ctx).WithField("image", key).WithField("names", names).WithField("unshared", u.Extents-u.Shared)
	if need > Unused {
		w.cfg.Evicted("image")
		logger.Info("evicted an image to make room; it is made again when it is needed")
	} else {
		logger.Info("removed an image that nothing holds")
	}
	return nil
}

// unmount unmounts an image without snapshots, unless a mount by hand uses it, and reports success.
func (w *sweep) unmount(ctx context.Context, key string) (free bool, err error) {
	logger := log.G(ctx).WithField("image", key)
	where, err := w.table.UsedBy(ctx, key)
	if err != nil || where != "" {
		logger.WithError(err).WithField("user", where).
			Warn("an image that no snapshot needs is still used by something else, keeping it")
		return false, w.noteLoose()
	}
	err = w.table.Unmount(ctx, key)
	if errors.Is(err, mount.ErrBusy) {
		logger.WithError(err).Debug("an image that no snapshot needs is busy, keeping it")
		return false, nil
	}
	if errors.Is(err, mount.ErrNotFound) {
		err = nil
	}
	return err == nil, err
}

// layer removes a layer that is not needed or, if memory is short, one that can be restored.
func (w *sweep) layer(ctx context.Context, key string) error {
	if w.needOfLayer(key) == InUse {
		return nil
	}
	unlock, err := w.layers.lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	need := w.needOfLayer(key)
	if need == InUse || need > Unused && !(w.short && w.restorable(key)) {
		return nil
	}
	if need == Unused {
		if err := w.forgetLayer(key); err != nil {
			return err
		}
	}
	w.decoded.drop(key)
	held, alone, _ := w.pool.LayerUsage(key)
	err = w.pool.RemoveLayer(ctx, key)
	if errors.Is(err, pool.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	logger := log.G(ctx).WithField("layer", key).WithField("bytes", held).WithField("unshared", alone)
	if need > Unused {
		w.cfg.Evicted("layer")
		logger.Info("evicted a layer to make room; it is restored when it is needed")
	} else {
		logger.Debug("removed a layer that nothing holds")
	}
	return nil
}

// restorable tells whether a layer that is not in use can be restored from its directory or its pack.
func (s *Store) restorable(key string) bool {
	id, isBlob := strings.CutPrefix(key, blobPrefix)
	return !isBlob || s.packs != nil && s.packs.has(digest.Digest(id))
}

// sweepPacks removes the packs of layers that are not needed.
func (w *sweep) sweepPacks(ctx context.Context) error {
	if w.packs == nil {
		return nil
	}
	ids, err := w.packs.list()
	errs := []error{err}
	for _, id := range ids {
		errs = append(errs, w.pack(ctx, id))
	}
	return errors.Join(errs...)
}

func (w *sweep) pack(ctx context.Context, id digest.Digest) error {
	unlock, err := w.layers.lock(ctx, BlobKey(id))
	if err != nil {
		return err
	}
	defer unlock()
	if w.needOfLayer(BlobKey(id)) > Unused {
		return nil
	}
	return w.packs.remove(id)
}

// dropMounts removes the holders of directories that no longer show the image. Somebody unmounted them
// without asking, so a process may still be inside.
func (s *Store) dropMounts(ctx context.Context) error {
	var errs []error
	for key, r := range s.imageRecords() {
		for _, h := range r.Holders {
			dir, isMount := strings.CutPrefix(h, holderMount)
			if !isMount {
				continue
			}
			if mounted, err := mountinfo.Mounted(dir); err == nil && mounted {
				continue
			}
			log.G(ctx).WithField("image", key).WithField("directory", dir).Info("an image is no longer mounted there")
			errs = append(errs, s.noteLoose(), s.amendImage(key, func(r *imageRecord) {
				r.Holders = without(r.Holders, func(other string) bool { return other == h })
			}))
		}
	}
	return errors.Join(errs...)
}
