package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
)

// Prepare makes an active snapshot.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindActive, key, parent, opts)
}

// View makes a read-only snapshot.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) (_ []mount.Mount, err error) {
	began := time.Now()
	defer func() { s.opts.Observe("prepare", time.Since(began), err) }()

	want := snapshots.Info{Name: key, Kind: kind, Parent: parent}
	for _, opt := range opts {
		if err := opt(&want); err != nil {
			return nil, err
		}
	}
	var links []link
	err = s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		if _, _, _, err := storage.GetInfo(ctx, key); err == nil {
			return fmt.Errorf("snapshot %q: %w", key, errdefs.ErrAlreadyExists)
		}
		links, err = chain(ctx, tx, parent)
		if err == nil && len(links) > 0 && links[0].info.Kind != snapshots.KindCommitted {
			err = fmt.Errorf("parent %q is not a committed snapshot: %w", parent, errdefs.ErrInvalidArgument)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	// What the snapshot will stand on is in no record yet. The pins keep a sweep away from it until it is.
	for _, l := range links {
		defer s.pins.pin(l.rec.Chain)()
	}
	low, lowerdirs, err := s.chooseLower(ctx, kind, key, want.Labels, links)
	if err != nil {
		return nil, fmt.Errorf("snapshot %q on %q: %w", key, parent, err)
	}
	root, err := s.upperRoot(want.Labels, lowerdirs)
	if err != nil {
		return nil, fmt.Errorf("snapshot %q: %w", key, err)
	}
	id, info, err := s.record(ctx, kind, key, parent, low, root, opts)
	if err != nil {
		return nil, err
	}
	return s.describe(id, info, low, lowerdirs), nil
}

// record makes the directories of a snapshot and writes it down.
func (s *Snapshotter) record(ctx context.Context, kind snapshots.Kind, key, parent string, low *lower, root rootAttr, opts []snapshots.Opt) (id string, info snapshots.Info, err error) {
	temp := ""
	defer func() {
		if err == nil || temp == "" {
			return
		}
		if rerr := os.RemoveAll(temp); rerr != nil {
			err = errors.Join(err, rerr)
		}
		// If the directory got its name before the transaction failed, only a cleanup may remove it: the id is given out
		// again, perhaps at this moment.
		s.work.add(task{})
	}()
	err = s.st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		// Inside the transaction, so that Cleanup, which holds one too, never sees a directory without a record.
		snap, err := storage.CreateSnapshot(ctx, kind, key, parent, opts...)
		if err != nil {
			return err
		}
		id = snap.ID
		if _, info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		if err := putRecord(tx, id, record{Lower: low}); err != nil {
			return err
		}
		if temp, err = os.MkdirTemp(filepath.Join(s.root, "snapshots"), "new-"); err != nil {
			return err
		}
		if err := root.mkdir(filepath.Join(temp, "fs")); err != nil {
			return err
		}
		if kind == snapshots.KindActive {
			if err := os.Mkdir(filepath.Join(temp, "work"), 0o711); err != nil {
				return err
			}
		}
		// What an earlier transaction left there that failed after the rename has no record.
		if _, err := os.Lstat(s.dir(id)); err == nil {
			if _, err := s.doom(id); err != nil {
				return err
			}
		}
		return os.Rename(temp, s.dir(id))
	})
	return id, info, err
}

// chooseLower decides what a new snapshot stands on and makes it available.
func (s *Snapshotter) chooseLower(ctx context.Context, kind snapshots.Kind, key string, labels map[string]string, links []link) (*lower, []string, error) {
	if len(links) == 0 {
		// In parallel unpacking the parent is only named at Commit.
		return &lower{Blind: labels[labelParentChainID] != ""}, nil, nil
	}
	if kind == snapshots.KindActive && isExtract(key, labels) {
		return s.chooseForUnpack(ctx, labels, links)
	}
	dir, err := s.image(ctx, links)
	if err == nil {
		return &lower{Chain: links[0].rec.Chain}, []string{dir}, nil
	}
	if ctx.Err() != nil {
		return nil, nil, err
	}
	low := directories(links)
	if low.Chain == links[0].rec.Chain {
		return nil, nil, err // streamed: there are no directories to fall back to
	}
	dirs, ferr := s.lowerdirs(ctx, low, links)
	if ferr != nil {
		return nil, nil, fmt.Errorf("%w; and no fallback: %w", err, ferr)
	}
	log.G(ctx).WithError(err).WithField("snapshot", key).Warn("the shared image is not available, using plain directories, which share less memory")
	reason := "error"
	if errdefs.IsResourceExhausted(err) {
		reason = "full"
	}
	s.opts.Fallback(reason)
	return low, dirs, nil
}

// chooseForUnpack decides what a layer is unpacked over. An unpacker that walks looks up the attributes of directories
// there which the layer does not list itself; one that streams does not look at all.
func (s *Snapshotter) chooseForUnpack(ctx context.Context, labels map[string]string, links []link) (*lower, []string, error) {
	low := directories(links)
	parent := links[0].rec
	if low.Chain != "" && labels[snapshots.LabelSnapshotRef] != "" && !parent.Built && s.recent.has(parent.Chain) {
		// The parent was streamed a moment ago, in all likelihood by the same pull: Image.Unpack, which does not ask
		// our differ unless told to, sets no labels. Building the image of every prefix of the chain would cost the
		// square of its length. Commit notices if the guess was wrong.
		return &lower{Blind: true, Streaming: true}, nil, nil
	}
	dirs, err := s.lowerdirs(ctx, low, links)
	return low, dirs, err
}

// directories returns the lower that needs the least of images: the directories from the top down to the first
// snapshot that was streamed, whose chain has no other form than an image.
func directories(links []link) *lower {
	low := &lower{}
	for _, l := range links {
		if len(l.rec.Streamed) > 0 {
			low.Chain = l.rec.Chain
			break
		}
		low.Dirs = append(low.Dirs, l.id)
	}
	return low
}

// image makes the image of the chain links, top first, available and returns where it is mounted. The work goes on if the
// caller gives up: one that comes back after its deadline finds it further on, or done.
func (s *Snapshotter) image(ctx context.Context, links []link) (string, error) {
	type result struct {
		dir string
		err error
	}
	done := make(chan result, 1)
	err := s.work.detach(func(ctx context.Context) {
		dir, err := s.build(ctx, links)
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

func (s *Snapshotter) build(ctx context.Context, links []link) (dir string, err error) {
	began := time.Now()
	defer func() { s.opts.Observe("build", time.Since(began), err) }()
	top := links[0].rec
	defer s.pins.pin(top.Chain)()
	layers := s.layers(links)
	release, err := s.hold(ctx, links[0], layers)
	if err != nil {
		return "", err
	}
	defer release()
	err = s.withEviction(ctx, func() error {
		dir, err = s.lowers.Lower(ctx, top.Chain, layers)
		return err
	})
	return dir, err
}

// hold keeps the layers of the chain that ends with top from being swept, and their directories from being removed, until
// release is called. It fails if top is gone. Reading a directory while it is removed would give a layer that lacks files,
// and in the end an image that does, under a chain ID that others trust.
func (s *Snapshotter) hold(ctx context.Context, top link, layers []Layer) (release func(), err error) {
	var unpins []func()
	release = func() {
		for _, unpin := range unpins {
			unpin()
		}
	}
	for _, l := range layers {
		unpins = append(unpins, s.pins.pin(l.Key))
	}
	// After pinning: whoever removes it from now on sees the pins. Its parents cannot be removed before it.
	id, _, _, err := s.lookup(ctx, top.info.Name)
	if err == nil && id != top.id {
		err = fmt.Errorf("snapshot %q was removed and made again: %w", top.info.Name, errdefs.ErrNotFound)
	}
	if err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// layers returns the layers of a chain, bottom first.
func (s *Snapshotter) layers(links []link) []Layer {
	var layers []Layer
	for i := len(links) - 1; i >= 0; i-- {
		l := links[i]
		for _, key := range l.rec.Streamed {
			layers = append(layers, Layer{Key: key})
		}
		if l.rec.Dir {
			layers = append(layers, Layer{Key: s.dirKey(l.id), Dir: s.upper(l.id)})
		}
	}
	return layers
}

// dirKey is the key of the layer that the directory of a snapshot makes.
func (s *Snapshotter) dirKey(id string) string { return "dir/" + s.st.id + "/" + id }

// chainKey is the key of the chain that ends with a snapshot.
func (s *Snapshotter) chainKey(name, id string) string {
	if d := chainID(name); d != "" {
		return d.String()
	}
	return "snapshot/" + s.st.id + "/" + id
}

// withEviction runs fn, and once more after it freed what is not in use if fn found no room.
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

// rootAttr is what the root directory of a snapshot is made with: overlayfs shows the attributes of the upper one.
type rootAttr struct {
	mode     os.FileMode
	uid, gid int
}

func (a rootAttr) mkdir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	return a.apply(dir)
}

func (a rootAttr) apply(dir string) error {
	if err := os.Lchown(dir, a.uid, a.gid); err != nil {
		return err
	}
	return os.Chmod(dir, a.mode) // after Lchown, and regardless of the umask
}

// upperRoot returns the attributes that the root of a snapshot takes over from what it stands on, with the owner that
// the labels map root to.
func (s *Snapshotter) upperRoot(labels map[string]string, lowerdirs []string) (rootAttr, error) {
	root := rootAttr{mode: 0o755, uid: os.Geteuid(), gid: os.Getegid()}
	if len(lowerdirs) > 0 {
		st, err := os.Stat(lowerdirs[0])
		if err != nil {
			return root, err
		}
		sys := st.Sys().(*syscall.Stat_t)
		root = rootAttr{mode: st.Mode() & (os.ModePerm | os.ModeSetuid | os.ModeSetgid | os.ModeSticky), uid: int(sys.Uid), gid: int(sys.Gid)}
	}
	// With an idmapped lower the upper directory is the only part that holds mapped ids on disk.
	for _, m := range []struct {
		label string
		id    *int
	}{{snapshots.LabelSnapshotUIDMapping, &root.uid}, {snapshots.LabelSnapshotGIDMapping, &root.gid}} {
		value := labels[m.label]
		if value == "" || !s.opts.RemapIDs {
			continue
		}
		id, err := mapRoot(value)
		if err != nil {
			return root, fmt.Errorf("label %q: %w: %w", m.label, err, errdefs.ErrInvalidArgument)
		}
		*m.id = id
	}
	return root, nil
}

// mapRoot returns the id on the host that a mapping "container:host:length[,...]" gives to id 0.
func mapRoot(mapping string) (int, error) {
	for _, entry := range strings.Split(mapping, ",") {
		var n [3]uint64
		fields := strings.Split(entry, ":")
		if len(fields) != 3 {
			return 0, fmt.Errorf("mapping %q: entry %q is not container:host:length", mapping, entry)
		}
		for i, f := range fields {
			v, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				return 0, fmt.Errorf("mapping %q: %w", mapping, err)
			}
			n[i] = v
		}
		if n[0] == 0 && n[2] > 0 {
			return int(n[1]), nil
		}
	}
	return 0, fmt.Errorf("mapping %q does not map id 0", mapping)
}
