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
	// Lease is the file, device or range in which the owner of the pool looks for what is in use here. Without one the
	// owner learns nothing, and has to be told to keep all images.
	Lease string
}

// Config says which pools are used, and how.
type Config struct {
	// Root is a directory of this package's own. Its mounts are below it, in a directory for each pool.
	Root string
	// Pools are looked at in this order.
	Pools []Source
	// Own is the id of the pool that this process owns.
	Own [16]byte
	// Drivers mount a pool, the first that can. Adopt are further ones whose mounts may be found.
	Drivers, Adopt []mount.Driver
}

// Pools are pools of other owners. They are safe for concurrent use. One process at a time uses a root.
type Pools struct {
	members []*member
}

// Open prepares the pools. It fails only if its own directory does: a pool that can not be used is reported to the log,
// by Status, and to whoever asks for its images.
func Open(ctx context.Context, c Config) (*Pools, error) {
	if err := os.MkdirAll(c.Root, 0o700); err != nil {
		return nil, fmt.Errorf("shared pools: %w", err)
	}
	p := &Pools{}
	all := &readers{by: map[[16]byte]*member{}}
	for _, src := range c.Pools {
		m := &member{cfg: &c, src: src, readers: all, checked: map[imageID][]mount.Range{}}
		if err := m.findEarlier(); err != nil { // what is in use is known also while the pool can not be read
			m.complain(ctx, err)
		}
		p.members = append(p.members, m)
	}
	p.Refresh(ctx)
	return p, nil
}

// Close closes the memory of the pools. Mounts stay, and so do claims.
func (p *Pools) Close() error {
	var errs []error
	for _, m := range p.members {
		errs = append(errs, m.close())
	}
	return errors.Join(errs...)
}

// Refresh looks for what owners have published since the last time, and reports whether there is something new. Where
// nothing is new it costs a read of 8 KiB from each pool.
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

// Claim makes sure that the owner of a pool keeps the image of a chain, until Sweep finds that it is not needed. Errors:
// ErrNotFound if no pool has it, joined with why some could not be asked.
func (p *Pools) Claim(ctx context.Context, chain digest.Digest) error {
	return p.claim(ctx, chain, func(*member) error { return nil })
}

// claim claims an image and calls then with the pool that has it, locked.
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
		if errors.Is(err, mount.ErrCheck) { // it has the image, and it is not to be used
			errs = errs[1:]
			break
		}
	}
	return fmt.Errorf("chain %s: %w", chain, errors.Join(errs...))
}

// superseded ends claims of a chain in what was there before other pools than by: that has it.
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

// inOrder returns the pools, first the one in which a chain is claimed: what runs from it has its pages in use already.
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

// Lower claims the image of a chain and returns the directory at which it is mounted. Errors are those of Claim and of
// package mount.
func (p *Pools) Lower(ctx context.Context, chain digest.Digest) (dir string, err error) {
	err = p.claim(ctx, chain, func(m *member) (err error) {
		if dir, err = m.lower(ctx, chain); err != nil {
			err = fmt.Errorf("shared pool %q: chain %s: %w", m.src.Name, chain, err)
		}
		return err
	})
	return dir, err
}

// Sweep unmounts the images of chains that are not needed, and ends their claims. One that is in use all the same keeps
// both. needed is asked while Claim and Lower wait.
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

// Status is what is known about a pool.
type Status struct {
	Name       string `json:"name"`
	ID         string `json:"id,omitempty"` // empty if it was never read
	Generation uint64 `json:"generation,omitempty"`
	Images     int    `json:"images"` // that have a chain ID
	Claimed    int    `json:"claimed"`
	Mounted    int    `json:"mounted"`
	Driver     string `json:"driver,omitempty"`
	Leased     bool   `json:"leased"`          // the owner learns what is in use here
	Lease      string `json:"lease,omitempty"` // the lease region of this reader, as configured
	Error      string `json:"error,omitempty"` // why it can not be used now
	// Lost says which images in use here went with an earlier pool of this name, and what to do.
	Lost string `json:"lost,omitempty"`
}

// Status returns what is known about each pool, in the order of the configuration.
func (p *Pools) Status() []Status {
	var out []Status
	for _, m := range p.members {
		m.mu.Lock()
		out = append(out, m.status())
		m.mu.Unlock()
	}
	return out
}

// complain tells the log what is wrong with a pool, once until it changes. Preconditions: mu is held.
func (m *member) complain(ctx context.Context, err error) {
	if text := err.Error(); text != m.told {
		m.told = text
		log.G(ctx).WithError(err).WithField("pool", m.src.Name).Error("shared pool can not be used")
	}
}
