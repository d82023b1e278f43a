package remote

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrNoRanges reports that a host answers a request for a part of a blob with something else.
var ErrNoRanges = errors.New("it does not serve parts of blobs (byte ranges)")

// Parts gives random access to a blob. Its methods may be called concurrently.
type Parts struct {
	repo *Repository
	want ocispec.Descriptor

	mu    sync.Mutex
	hosts []*endpoint // the one that answered last comes first
}

// Parts returns the parts of a blob of known size. It sends no request.
func (r *Repository) Parts(ctx context.Context, d ocispec.Descriptor) (*Parts, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", d.Digest, err)
	}
	hosts, err := r.able(ctx, docker.HostCapabilityPull)
	if err != nil {
		return nil, err
	}
	return &Parts{repo: r, want: d, hosts: slices.Clone(hosts)}, nil
}

// Part returns the bytes [from, to) in memory, unverified. Errors are those of Open, and ErrNoRanges;
// it never reads the whole blob instead.
func (p *Parts) Part(ctx context.Context, from, to int64) ([]byte, error) {
	if from < 0 || from >= to || to > p.want.Size {
		return nil, fmt.Errorf("blob %s: bytes %d to %d of %d", p.want.Digest, from, to, p.want.Size)
	}
	p.mu.Lock()
	hosts := slices.Clone(p.hosts)
	p.mu.Unlock()
	var b []byte
	what := fmt.Sprintf("blob %s, bytes %d to %d", p.want.Digest, from, to)
	err := p.repo.try(ctx, what, hosts, &budget{}, func(ctx context.Context, e *endpoint) (err error) {
		if b, err = e.bytes(ctx, e.url(p.repo.path, "blobs", p.want.Digest.String()), from, to,
			p.want.Size); err == nil {
			p.prefer(e)
		}
		return err
	})
	return b, err
}

// prefer makes e the first host for later requests.
func (p *Parts) prefer(e *endpoint) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(p.hosts, e); i > 0 {
		p.hosts = slices.Insert(slices.Delete(p.hosts, i, i+1), 0, e)
	}
}
