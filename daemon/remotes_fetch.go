package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
	"github.com/daxfs/daxfs-snapshotter/converter/source/remote"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// counts is the cost of one layer.
type counts struct {
	fetched, ranges atomic.Int64 // bytes and answered requests
	have, missing   int64        // bytes of distinct contents
}

// fetch stores a layer from contents in the pool and contents that it fetches.
func (r *remotes) fetch(ctx context.Context, l snapshotter.Remote, w wanted, c *counts) (store.Stored, error) {
	repo, err := r.repository(l.Image)
	if err != nil {
		return store.Stored{}, err
	}
	parts, err := repo.Parts(ctx, w.desc)
	if err != nil {
		return store.Stored{}, err
	}
	src := &counted{parts, c}
	tables, err := r.tables(ctx, src, w.layout)
	if err != nil {
		return store.Stored{}, err
	}
	// The batch adds nothing. It only protects the contents that it finds until the layer holds them.
	found := r.d.store.Pool().Begin()
	defer found.Discard()
	plan := chunked.NewPlan(tables, found)
	c.have, c.missing = plan.Have, plan.Missing
	if !plan.Pays(w.desc.Size) {
		return store.Stored{}, notFor("%d of its %d bytes are missing", plan.Fetch, w.desc.Size)
	}
	if free := r.d.store.Pool().Usage().Free; plan.Missing > free {
		return store.Stored{}, fmt.Errorf("%d bytes are missing: %w", plan.Missing,
			&pool.FullError{What: "extent", Need: plan.Missing, Free: free})
	}
	// The registry's claim that this is the blob is not proven, so the store must not learn the blob's
	// digest: it would record it as the digest of a blob with this diff ID.
	return r.d.store.AddBlob(ctx, store.Blob{
		MediaType: ocispec.MediaTypeImageLayer, DiffID: w.diffID, Pin: l.Pin,
		Holder: store.ContainerdHolder(l.Namespace),
		Open: func(ctx context.Context) (io.ReadCloser, error) {
			return plan.Tar(ctx, src, chunked.Options{Parallel: r.conf.Requests, SpoolDir: r.d.cfg.Root})
		},
	})
}

// tables fetches the tables of a layer, with a short timeout.
func (r *remotes) tables(ctx context.Context, src chunked.Source, l chunked.Layout) (*chunked.Tables, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(r.conf.AnswerTimeout))
	defer cancel()
	return chunked.ReadTables(ctx, src, l)
}

// counted counts the fetched bytes and requests.
type counted struct {
	chunked.Source
	c *counts
}

func (s *counted) Part(ctx context.Context, from, to int64) ([]byte, error) {
	b, err := s.Source.Part(ctx, from, to)
	s.c.fetched.Add(int64(len(b)))
	s.c.ranges.Add(1)
	return b, err
}

// repositories caches recently used repositories, with their connections and tokens. The zero value is empty.
type repositories struct {
	hostDirs []string

	mu   sync.Mutex
	open map[string]*openRepository
}

type openRepository struct {
	repo *remote.Repository
	used time.Time
}

// repositoryIdle is how long connections are kept after the last layer.
const repositoryIdle = 2 * time.Minute

func (r *repositories) repository(image string) (*remote.Repository, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, o := range r.open {
		if time.Since(o.used) > repositoryIdle {
			o.repo.Close()
			delete(r.open, name)
		}
	}
	o := r.open[image]
	if o == nil {
		repo, err := remote.New(image, remote.Config{HostDirs: r.hostDirs})
		if err != nil {
			return nil, err
		}
		if r.open == nil {
			r.open = map[string]*openRepository{}
		}
		o = &openRepository{repo: repo}
		r.open[image] = o
	}
	o.used = time.Now()
	return o.repo, nil
}

// refusals are images with a layer that could not be pulled file by file, so that their other layers
// are not tried in vain. The zero value is empty.
type refusals struct {
	mu    sync.Mutex
	until map[digest.Digest]time.Time
}

// refusalTime is how long a refused image is not tried again.
const refusalTime = 5 * time.Minute

func (r *refusals) refuse(manifest digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.until == nil {
		r.until = map[digest.Digest]time.Time{}
	}
	for d, t := range r.until {
		if time.Now().After(t) {
			delete(r.until, d)
		}
	}
	r.until[manifest] = time.Now().Add(refusalTime)
}

func (r *refusals) refused(manifest digest.Digest) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Now().Before(r.until[manifest])
}

// blamesRegistry reports whether an error concerns the registry or the whole image, and not just one layer.
func blamesRegistry(err error) bool {
	if _, ok := errors.AsType[*remote.Error](err); ok {
		return true
	}
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, chunked.ErrInvalid) ||
		errors.Is(err, blob.ErrMismatch)
}
