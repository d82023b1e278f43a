package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/lease"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Config is the configuration of a store.
type Config struct {
	// Root is the directory of the store's own state.
	Root string
	// Pool names the pool.
	Pool Pool
	// Drivers mount the pool; the first that can does. Mounts of the drivers in Adopt are only taken over.
	Drivers, Adopt []mount.Driver
	// Limits apply to each layer.
	Limits layer.Limits
	// Packs keeps a copy of each streamed blob if the pool does not survive a reboot.
	Packs bool
	// Blobs is containerd's content store, from which layers are restored; nil if there is none.
	Blobs Blobs
	// Observe, if set, receives the time it took to make an image: "build" in the pool, "plain" as a copy
	// in a directory. It is not called for a build that lacked room: the caller makes room and tries
	// again, or gives up. Calls may be concurrent.
	Observe func(phase string, took time.Duration, err error)
	// Evicted, if set, is called with "image" or "layer" each time that a needed one leaves the pool to
	// make room. Calls may be concurrent.
	Evicted func(what string)
	// Registry finds images to restore layers that nothing on this machine has; nil asks no registry.
	Registry Registry
	// Readers says who else reads the pool; nil keeps the last configured value.
	Readers *Readers
}

// Blobs finds blobs in containerd.
type Blobs interface {
	// Find returns the blobs whose label says that they have a diff ID when uncompressed. It looks in one
	// namespace or, if namespace is empty, in all. The caller verifies what it reads.
	Find(ctx context.Context, namespace string, diffID digest.Digest) ([]Found, error)
	// Open opens a blob of a namespace.
	Open(ctx context.Context, namespace string, desc ocispec.Descriptor) (io.ReadCloser, error)
}

// Found is a blob and a namespace that has it.
type Found struct {
	Namespace string
	Desc      ocispec.Descriptor
}

// Store is an open store. It is safe for concurrent use.
//
// Lock order: the lock of an image, epoch, the lock of a layer, locks inside pool and table, mu.
type Store struct {
	cfg    Config
	region region.Region
	pool   *pool.Pool
	packs  *packs // nil if streamed layers need none, or containerd keeps the blobs
	// private says that only root can have written to the region, so its bytes are as we wrote them.
	private bool

	images, layers keyLock
	decoded        cache
	sweeping       sync.Mutex // held by the one running Sweep or Reclaim
	publishing     sync.Mutex // held by the one running Publish
	puts           atomic.Uint64

	readers Readers
	leases  *lease.Regions // nil without lease regions

	// epoch is held for reading while an image is added or mounted, and for writing while the pool begins
	// a new epoch. It guards table, which belongs to one epoch.
	epoch sync.RWMutex
	table *mount.Table

	mu      sync.Mutex
	records records
	damaged time.Time                // when damage was last found
	lost    map[string]error         // images with damaged contents that could not be rebuilt
	reading map[string]time.Duration // read times of layers that belong to no image yet
	old     *oldPool                 // remains of version 1, or nil
}

func (c Config) withDefaults() Config {
	if c.Observe == nil {
		c.Observe = func(string, time.Duration, error) {}
	}
	if c.Evicted == nil {
		c.Evicted = func(string) {}
	}
	return c
}

// Open opens the store below a root directory, and makes its pool if there is none. It waits only for
// the disk. The caller closes the store.
func Open(ctx context.Context, c Config) (_ *Store, err error) {
	s := &Store{cfg: c.withDefaults(), reading: map[string]time.Duration{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.old, err = findOldPool(c.Root, c.Pool); err != nil {
		return nil, err
	}
	if s.region, s.pool, err = openPool(ctx, c); err != nil {
		return nil, err
	}
	if err := s.open(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// New opens the store of an open pool. The store closes the pool and its region, even if New fails.
// New ignores Config.Pool and leaves remains of earlier versions alone.
func New(ctx context.Context, c Config, r region.Region, p *pool.Pool) (*Store, error) {
	s := &Store{cfg: c.withDefaults(), region: r, pool: p, reading: map[string]time.Duration{}}
	if err := s.open(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// open opens everything that belongs to the pool.
func (s *Store) open(ctx context.Context) (err error) {
	s.private = !s.region.Info().Traits().ByAddress
	if err := errors.Join(s.loadRecords(), s.loadReaders()); err != nil {
		return err
	}
	if s.cfg.Packs && !s.Durable() {
		if s.packs, err = openPacks(filepath.Join(s.cfg.Root, "packs")); err != nil {
			return err
		}
	}
	if err := s.openPlain(); err != nil {
		return err
	}
	if err := s.openTable(ctx); err != nil {
		return err
	}
	if err := s.turn(ctx); err != nil {
		return err
	}
	if err := s.retire(ctx); err != nil {
		log.G(ctx).WithError(err).Warn("cannot clean up the mounts of earlier pools")
	}
	return nil
}

// openTable opens the table of the pool's epoch. Preconditions: epoch is held, or s is not shared yet.
func (s *Store) openTable(ctx context.Context) error {
	table, err := mount.Open(ctx, s.cfg.Root, s.cfg.Drivers, mount.Pool{
		Region: s.region.Info(), Size: s.region.Size(), UUID: s.pool.UUID(),
	}, mount.Options{
		Check: s.checkSource,
		Adopt: s.cfg.Adopt,
		Warn:  func(format string, args ...any) { log.L.Warnf(format, args...) },
	})
	if err == nil {
		s.table = table
	}
	return err
}

// Close closes the pool and its region. Mounts stay.
func (s *Store) Close() error {
	var errs []error
	if s.pool != nil {
		errs = append(errs, s.pool.Close())
	}
	if s.region != nil {
		errs = append(errs, s.region.Close())
	}
	return errors.Join(errs...)
}

// Durable reports whether the pool survives a reboot.
func (s *Store) Durable() bool { return s.region.Info().Persistent >= region.PersistsReboot }

// Region describes the memory of the pool.
func (s *Store) Region() region.Info { return s.region.Info() }

// Pool returns the pool, for reading.
func (s *Store) Pool() *pool.Pool { return s.pool }

// Healthy returns nil if the mounts answer and no image is damaged for good.
func (s *Store) Healthy(ctx context.Context) error {
	s.epoch.RLock()
	defer s.epoch.RUnlock()
	return errors.Join(s.table.Healthy(ctx), s.unhealed())
}

// checkSource verifies bytes that others can have written, before the kernel parses them.
func (s *Store) checkSource(ctx context.Context, src mount.Source) error {
	if s.private {
		return nil
	}
	if src.Key != "" { // the window of an image
		return mount.CheckImage(ctx, src)
	}
	var first error
	n, contents := 0, false
	err := s.pool.Check(ctx, func(f pool.Finding) bool {
		switch f.Rule {
		case "pool.sum", "pool.tail", "pool.document": // nobody has to get damaged contents
			contents = contents || !f.Known
			return true
		}
		if n++; first == nil {
			first = errors.New(f.String())
		}
		return n < 100
	})
	if err == nil && first != nil {
		err = fmt.Errorf("%w: pool %s: %w (%d findings; `daxfs pool check` prints all)",
			mount.ErrCheck, src.Where(), first, n)
	}
	if err == nil && contents {
		_, err = s.Scrub(ctx, 0)
	}
	return err
}
