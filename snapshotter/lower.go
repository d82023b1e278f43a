package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
)

// chooseLower chooses the lower of a new snapshot and makes it available.
func (s *Snapshotter) chooseLower(ctx context.Context, want snapshots.Info, links []link) (*lower, []string, error) {
	if len(links) == 0 {
		// When layers are unpacked in parallel, only Commit names the parent.
		low := &lower{Blind: want.Labels[labelParentChainID] != ""}
		err := s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
			low.OverShared, err = overShared(ctx, tx, want.Labels[labelParentChainID])
			return err
		})
		return low, nil, err
	}
	if want.Kind == snapshots.KindActive && isExtract(want.Name, want.Labels) {
		return s.chooseForUnpack(ctx, want, links)
	}
	if mixed(links) {
		low := directories(links)
		dirs, err := s.directoriesOf(ctx, low, links)
		return low, dirs, err
	}
	dir, err := s.image(ctx, links)
	if err == nil {
		return &lower{Image: links[0].rec.Image}, []string{dir}, nil
	}
	if ctx.Err() != nil || links[0].rec.Shared != "" {
		return nil, nil, err
	}
	low := directories(links)
	dirs, ferr := s.directoriesOf(ctx, low, links)
	if ferr != nil {
		return nil, nil, fmt.Errorf("%w; and no fallback: %w", err, ferr)
	}
	log.G(ctx).WithError(err).WithField("snapshot", want.Name).
		Warn("the shared image is not available, using plain directories, which share less memory")
	s.opts.Fallback(reason(err))
	low.Why = shortened(err.Error())
	return low, dirs, nil
}

// maxWhy bounds a recorded reason, in bytes.
const maxWhy = 1000

func shortened(text string) string {
	if len(text) <= maxWhy {
		return text
	}
	return strings.ToValidUTF8(text[:maxWhy], "") + "…"
}

// reason names the cause of a fallback for the metrics.
func reason(err error) string {
	if errdefs.IsResourceExhausted(err) {
		return "full"
	}
	return "error"
}

// chooseForUnpack chooses the lower of a layer that is being unpacked. A walking unpacker looks up the
// attributes of directories that the layer does not list; a streaming one does not read the lower.
func (s *Snapshotter) chooseForUnpack(ctx context.Context, want snapshots.Info,
	links []link,
) (*lower, []string, error) {
	parent := links[0].rec
	streamed := len(parent.Streamed) > 0 && parent.Claim == nil
	if streamed && !parent.Built && claimOf(want.Name, want.Labels).DiffID != "" {
		// The parent was streamed, so this layer probably will be, too. An image for each prefix of the chain
		// would waste room for metadata. A layer that is walked after all is restored from the claimed blob.
		return &lower{Blind: true, Streaming: true}, nil, nil
	}
	low := directories(links)
	dirs, err := s.directoriesOf(ctx, low, links)
	return low, dirs, err
}

// directories returns the lower that needs the smallest image: the directories from the top down to
// the first snapshot that has none. Only an image can show the chain of that snapshot.
func directories(links []link) *lower {
	low := &lower{}
	for _, l := range links {
		if len(l.rec.Streamed) > 0 || !l.rec.hasDir() {
			low.Image = l.rec.Image
			break
		}
		low.Dirs = append(low.Dirs, l.id)
	}
	return low
}

// directoriesOf returns the directories of low, which is not recorded yet, top first. Without room for
// the image in low, it switches low to a plain copy.
func (s *Snapshotter) directoriesOf(ctx context.Context, low *lower, links []link) ([]string, error) {
	dirs, err := s.lowerdirs(ctx, low, links)
	if low.Image == "" || low.onShared() || !errdefs.IsResourceExhausted(err) {
		return dirs, err
	}
	low.Plain = true
	dirs, perr := s.lowerdirs(ctx, low, links)
	if perr != nil {
		return nil, fmt.Errorf("%w; and no plain copy: %w", err, perr)
	}
	return dirs, nil
}

// lowerdirs returns the directories that low names, top first.
func (s *Snapshotter) lowerdirs(ctx context.Context, low *lower, links []link) ([]string, error) {
	var dirs []string
	for _, id := range low.Dirs {
		dirs = append(dirs, s.upper(id))
	}
	if low.Image == "" {
		return dirs, nil
	}
	for i, l := range links {
		if l.rec.Image != low.Image {
			continue
		}
		get := s.image
		if low.Plain {
			get = s.plain
		}
		dir, err := get(ctx, links[i:])
		if err != nil {
			return nil, err
		}
		return append(dirs, dir), nil
	}
	return nil, fmt.Errorf("image %q is not one of the parents: %w", low.Image, errdefs.ErrDataLoss)
}

// image makes the image of the chain links (top first) available and returns its mount point. The work
// continues if the caller gives up, so a caller that retries after its deadline finds it done or further on.
func (s *Snapshotter) image(ctx context.Context, links []link) (string, error) {
	if links[0].rec.Shared != "" {
		return s.sharedLower(ctx, links[0])
	}
	type result struct {
		dir string
		err error
	}
	done := make(chan result, 1)
	err := s.work.detach(func(ctx context.Context) {
		dir, err := s.build(ctx, links, s.lowers.Lower)
		done <- result{dir, err}
	})
	if err != nil {
		return "", err
	}
	select {
	case r := <-done:
		return r.dir, r.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// plain writes the image of the chain links (top first) to a directory on disk and returns the directory.
func (s *Snapshotter) plain(ctx context.Context, links []link) (string, error) {
	return s.build(ctx, links, s.lowers.Plain)
}

func (s *Snapshotter) build(ctx context.Context, links []link,
	get func(context.Context, Image) (string, error),
) (dir string, err error) {
	links, release, err := s.hold(ctx, links)
	if err != nil {
		return "", err
	}
	defer release()
	for _, l := range links {
		if err := s.prove(ctx, l); err != nil {
			return "", err
		}
	}
	top := links[0]
	ns, _ := splitName(top.info.Name)
	img := Image{Key: top.rec.Image, Layers: s.layers(links), Namespace: ns}
	if isTop(top.info.Labels) {
		img.Name = top.info.Labels[labelImageRef]
	}
	err = s.withEviction(ctx, func() error {
		dir, err = get(ctx, img)
		return err
	})
	return dir, err
}

// hold keeps the image and the layers of a chain from being swept, and their directories from being
// removed, until release is called. It returns the current chain, and fails if its top is gone.
// Reading a directory during its removal would make a layer, and then an image, that lacks files.
func (s *Snapshotter) hold(ctx context.Context, links []link) (now []link, release func(), err error) {
	top := links[0]
	unpins := []func(){s.pins.pin(top.rec.Image)}
	release = func() {
		for _, unpin := range unpins {
			unpin()
		}
	}
	for _, l := range s.layers(links) {
		unpins = append(unpins, s.pins.pin(l.Key))
	}
	// Look after pinning: removals that begin from now on see the pins. Parents cannot be removed before the top.
	err = s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		now, err = chain(ctx, tx, top.info.Name)
		return err
	})
	if err == nil && now[0].id != top.id {
		err = fmt.Errorf("snapshot %q was removed and made again: %w", top.info.Name, errdefs.ErrNotFound)
	}
	if err != nil {
		release()
		return nil, nil, err
	}
	return now, release, nil
}

// layers returns the layers of a chain, bottom first.
func (s *Snapshotter) layers(links []link) []Layer {
	var layers []Layer
	for i := len(links) - 1; i >= 0; i-- {
		l := links[i]
		for _, key := range l.rec.Streamed {
			layers = append(layers, Layer{Key: key})
		}
		if !l.rec.Dir {
			continue
		}
		layer := Layer{Key: s.dirKey(l.id)}
		if l.rec.hasDir() {
			layer.Dir = s.upper(l.id)
		} else {
			layer.Claim = claimOf(l.info.Name, l.info.Labels)
		}
		layers = append(layers, layer)
	}
	return layers
}

// dirKey returns the key of the layer in the directory of a snapshot.
func (s *Snapshotter) dirKey(id string) string { return dirKey(s.st, id) }

func dirKey(st *store, id string) string { return "dir/" + st.id + "/" + id }

// imageKey returns the key of the image of the chain links (top first); empty if no pool can hold it as a whole.
func (s *Snapshotter) imageKey(st *store, links []link) string {
	if len(links) > 0 && links[0].rec.Shared != "" {
		return sharedKey(links[0].rec.Shared)
	}
	if mixed(links) {
		return ""
	}
	var keys []string
	for i := len(links) - 1; i >= 0; i-- {
		l := links[i]
		keys = append(keys, l.rec.Streamed...)
		if l.rec.Dir {
			keys = append(keys, dirKey(st, l.id))
		}
	}
	return s.lowers.ImageKey(keys)
}

// withEviction runs fn. If fn finds no room, it frees what is not in use and runs fn once more.
func (s *Snapshotter) withEviction(ctx context.Context, fn func() error) error {
	err := fn()
	if !errdefs.IsResourceExhausted(err) {
		return err
	}
	log.G(ctx).WithError(err).Info("no room, freeing what is not in use")
	if serr := s.sweep(ctx, true); serr != nil {
		return errors.Join(err, serr)
	}
	return fn()
}
