package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	bolt "go.etcd.io/bbolt"
)

// Options configures a Snapshotter. The zero value is usable.
type Options struct {
	// MountOptions are added to every overlay mount, before the options that the kernel needs anyway.
	MountOptions []string
	// RemapIDs turns the labels of user namespace mappings into uidmap and gidmap options. Set it exactly
	// when containerd's configuration gives the snapshotter the capability remap-ids. Without the
	// capability its client changes owners itself, but still sends the labels.
	RemapIDs bool
	// Durable says that layers stored in Lowers survive a reboot. The directory of an unpacked layer is
	// then removed once Lowers has the layer.
	Durable bool
	// Shared finds images in pools of other owners; nil if there are none.
	Shared Shared
	// Workers is the number of snapshots stored and built concurrently in the background. 0 means 2.
	Workers int
	// Remotes, if set, pulls layers before containerd fetches their blobs.
	Remotes Remotes
	// Observe, if set, gets the duration of each "ingest", "stream", "pull", "prepare" and "sweep", concurrently.
	Observe func(phase string, took time.Duration, err error)
	// Fallback, if set, gets the reason each time the shared image was not used. It may be called concurrently.
	Fallback func(reason string)
}

// Snapshotter implements snapshots.Snapshotter and snapshots.Cleaner. It is safe for concurrent use.
type Snapshotter struct {
	root   string
	st     *store
	lowers Lowers
	opts   Options
	pins   pins
	work   *worker

	// ahead has the directories of the next snapshot, if they are made: see makeAhead.
	ahead chan string

	overlayOptions []string

	// sweeping is held by the current sweep.
	sweeping sync.Mutex
	// trials is held while the kernel is asked which removed snapshots are still mounted: see forgetDead.
	trials sync.Mutex

	closeOnce sync.Once
	closeErr  error
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// New opens the snapshotter below root, a directory of its own on a file system that can be an
// overlay's upper layer. It completes or forgets the unfinished work of a previous process. The caller
// closes the snapshotter; lowers stays the caller's and must outlive it.
func New(ctx context.Context, root string, lowers Lowers, opts Options) (*Snapshotter, error) {
	if opts.Workers == 0 {
		opts.Workers = 2
	}
	if opts.Observe == nil {
		opts.Observe = func(string, time.Duration, error) {}
	}
	if opts.Fallback == nil {
		opts.Fallback = func(string) {}
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(root, "snapshots"), 0o700); err != nil {
		return nil, err
	}
	if ok, err := fs.SupportsDType(root); err != nil {
		return nil, err
	} else if !ok {
		return nil, fmt.Errorf(
			"root %q: its file system has no d_type, which overlayfs needs (xfs: format with ftype=1)", root)
	}
	overlayOptions, err := overlayDefaults(ctx, root, opts.MountOptions)
	if err != nil {
		return nil, err
	}
	s := &Snapshotter{
		root: root, lowers: lowers, opts: opts, overlayOptions: overlayOptions, ahead: make(chan string, 1),
	}
	err = errors.Join(os.MkdirAll(s.emptyDir(), 0o700), os.RemoveAll(s.aheadDir()), os.Mkdir(s.aheadDir(), 0o700))
	if err != nil {
		return nil, err
	}
	if err := s.tryOptions(); err != nil {
		return nil, err
	}
	if s.st, err = openStore(ctx, filepath.Join(root, "metadata.db"), s.migrate); err != nil {
		return nil, err
	}
	s.st.reserve()
	s.work = newWorker(s)
	if err := s.recover(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Close stops background work and closes the metadata. Mounts stay. Further calls do nothing.
func (s *Snapshotter) Close() error {
	s.closeOnce.Do(func() {
		s.work.stop()
		os.RemoveAll(s.aheadDir()) // the next process does it, too
		s.closeErr = s.st.ms.Close()
	})
	return s.closeErr
}

// Stat returns the metadata of a snapshot.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.st.view(ctx, func(ctx context.Context, _ *bolt.Tx) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update changes the labels of a snapshot.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info,
	fieldpaths ...string,
) (updated snapshots.Info, err error) {
	err = s.st.update(ctx, func(ctx context.Context, _ *bolt.Tx) error {
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return updated, err
}

// Usage returns the space that a snapshot adds to its parent. For a committed snapshot it is on
// record; for an active one its directory is scanned.
func (s *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	var (
		id   string
		info snapshots.Info
		rec  record
	)
	err = s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		if id, info, usage, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		if info.Kind == snapshots.KindActive {
			rec, err = getRecord(tx, id)
		}
		return err
	})
	if err != nil || info.Kind != snapshots.KindActive {
		return usage, err
	}
	du, err := fs.DiskUsage(ctx, s.upper(id))
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("snapshot %q: %w", key, err)
	}
	usage = rec.StreamedUsage
	usage.Add(snapshots.Usage(du))
	return usage, nil
}

// Mounts returns the mounts of an active snapshot or a view, after it made the recorded lower available.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var (
		snap  storage.Snapshot
		info  snapshots.Info
		rec   record
		links []link
	)
	err := s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) (err error) {
		if snap, err = storage.GetSnapshot(ctx, key); err != nil {
			return err
		}
		if _, info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		if rec, err = getRecord(tx, snap.ID); err != nil {
			return err
		}
		links, err = chain(ctx, tx, info.Parent)
		return err
	})
	if err != nil {
		return nil, err
	}
	return s.mountsOf(ctx, snap.ID, info, rec, links)
}

func (s *Snapshotter) dir(id string) string   { return filepath.Join(s.root, "snapshots", id) }
func (s *Snapshotter) upper(id string) string { return filepath.Join(s.dir(id), "fs") }
func (s *Snapshotter) workdir(id string) string {
	return filepath.Join(s.dir(id), "work")
}
