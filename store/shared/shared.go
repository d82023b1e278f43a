package shared

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/mount"
)

// Source names a pool of another owner.
type Source struct {
	// Name is a file, a device, or a physical range as ADDRESS+SIZE.
	Name string
	// Lease is the file, device or range in which the pool's owner looks for claims. Without one the owner
	// learns of no use and must be configured to keep all images.
	Lease string
}

// Config lists the pools and says how to use them.
type Config struct {
	// Root is this package's own directory. Mounts are below it, in a directory for each pool.
	Root string
	// Pools are searched in this order.
	Pools []Source
	// Own is the ID of the pool that this process owns.
	Own [16]byte
	// Drivers mount a pool; the first that can does. Mounts of the drivers in Adopt are only taken over.
	Drivers, Adopt []mount.Driver
}

// Pools are pools of other owners. They are safe for concurrent use. Only one process may use a root.
type Pools struct {
	members []*member
}

// Open prepares the pools. It fails only if its own directory does. A pool that cannot be used is
// reported in the log, by Status, and by requests for its images.
func Open(ctx context.Context, c Config) (*Pools, error) {
	if err := os.MkdirAll(c.Root, 0o700); err != nil {
		return nil, fmt.Errorf("shared pools: %w", err)
	}
	p := &Pools{}
	all := &readers{by: map[[16]byte]*member{}}
	for _, src := range c.Pools {
		m := &member{cfg: &c, src: src, readers: all, checked: map[imageID][]mount.Range{}}
		if err := m.findEarlier(); err != nil { // claims must be known even while the pool cannot be read
			m.complain(ctx, err)
		}
		p.members = append(p.members, m)
	}
	p.Refresh(ctx)
	return p, nil
}

// Close closes the memory of the pools. Mounts and claims stay.
func (p *Pools) Close() error {
	var errs []error
	for _, m := range p.members {
		errs = append(errs, m.close())
	}
	return errors.Join(errs...)
}

// Refresh reports whether owners published anything new. Without news it reads 8 KiB of each pool.
func (p *Pools) Refresh(ctx context.Context) (changed bool) {
	for _, m := range p.members {
		m.mu.Lock()
		before := m.view
		if err := m.refresh(ctx); err != nil {
			m.complain(ctx, err)
		}
		changed = changed || m.view != before
		m.mu.Unlock()
	}
	return changed
}

// Claim makes the owner of a pool keep the image of a chain until Sweep finds that it is not needed.
// Errors: ErrNotFound if no pool has it, joined with the errors of unusable pools.
func (p *Pools) Claim(ctx context.Context, chain digest.Digest) error {
	return p.claim(ctx, chain, func(*member) error { return nil })
}

// claim claims an image and calls then with its pool, locked.
func (p *Pools) claim(ctx context.Context, chain digest.Digest, then func(m *member) error) error {
	errs := []error{ErrNotFound}
	for _, m := range p.inOrder(chain) {
		var failed error
		err := m.lockedClaim(ctx, chain, func() { failed = then(m) })
		if err == nil {
			p.superseded(ctx, chain, m)
			return failed
		}
		if !errors.Is(err, ErrNotFound) {
			errs = append(errs, fmt.Errorf("shared pool %q: %w", m.src.Name, err))
		}
		if errors.Is(err, mount.ErrCheck) { // the pool has the image, but it must not be used
			errs = errs[1:]
			break
		}
	}
	return fmt.Errorf("chain %s: %w", chain, errors.Join(errs...))
}

// superseded ends the claims of a chain in former pools of all names but by, which has the chain.
func (p *Pools) superseded(ctx context.Context, chain digest.Digest, by *member) {
	for _, m := range p.members {
		if m == by {
			continue
		}
		m.mu.Lock()
		if m.table != nil {
			if err := m.superseded(chain); err != nil {
				m.complain(ctx, err)
			}
		}
		m.mu.Unlock()
	}
}

// inOrder returns the pools, first the one with a claim of the chain: its pages are already in use.
func (p *Pools) inOrder(chain digest.Digest) []*member {
	first, rest := []*member{}, []*member{}
	for _, m := range p.members {
		m.mu.Lock()
		_, claimed := m.claims[chain]
		m.mu.Unlock()
		if claimed {
			first = append(first, m)
		} else {
			rest = append(rest, m)
		}
	}
	return append(first, rest...)
}

// Lower claims and mounts the image of a chain. Errors are those of Claim and of package mount.
func (p *Pools) Lower(ctx context.Context, chain digest.Digest) (dir string, err error) {
	err = p.claim(ctx, chain, func(m *member) (err error) {
		if dir, err = m.lower(ctx, chain); err != nil {
			err = fmt.Errorf("shared pool %q: chain %s: %w", m.src.Name, chain, err)
		}
		return err
	})
	return dir, err
}

// Sweep unmounts the images of unneeded chains and ends their claims. An image that is still in use
// keeps both. needed is called while Claim and Lower wait.
func (p *Pools) Sweep(ctx context.Context, needed func(chain digest.Digest) bool) error {
	var errs []error
	for _, m := range p.members {
		m.mu.Lock()
		if err := m.sweep(ctx, needed); err != nil {
			errs = append(errs, fmt.Errorf("shared pool %q: %w", m.src.Name, err))
		}
		m.mu.Unlock()
	}
	return errors.Join(errs...)
}

// Status describes a pool.
type Status struct {
	Name       string `json:"name"`
	ID         string `json:"id,omitempty"` // empty if it was never read
	Generation uint64 `json:"generation,omitempty"`
	Images     int    `json:"images"` // images with a chain ID
	Claimed    int    `json:"claimed"`
	Mounted    int    `json:"mounted"`
	Driver     string `json:"driver,omitempty"`
	Leased     bool   `json:"leased"`          // the owner learns of uses here
	Lease      string `json:"lease,omitempty"` // the lease region of this reader, as configured
	Error      string `json:"error,omitempty"` // why the pool cannot be used now
	// Lost lists images in use here that disappeared with a former pool of this name, and the remedy.
	Lost string `json:"lost,omitempty"`
}

// Status describes each pool, in the order of the configuration.
func (p *Pools) Status() []Status {
	var out []Status
	for _, m := range p.members {
		m.mu.Lock()
		out = append(out, m.status())
		m.mu.Unlock()
	}
	return out
}

// complain logs what is wrong with a pool, once until it changes. Preconditions: mu is held.
func (m *member) complain(ctx context.Context, err error) {
	if text := err.Error(); text != m.loggedError {
		m.loggedError = text
		log.G(ctx).WithError(err).WithField("pool", m.src.Name).Error("shared pool can not be used")
	}
}
