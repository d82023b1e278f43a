package pool

import (
	"context"
	"errors"
	"fmt"
)

// Leases tells what readers of the pool use: machines or processes that only read it. The pool asks
// after the catalogue has durably stopped listing the image. A reader claims first and reads the
// catalogue afterwards, so at least one side sees the other.
type Leases interface {
	// Users names the readers that use an image of a pool. After an error the pool frees nothing.
	Users(poolID [16]byte, m Image) ([]string, error)
	// Any names the readers that use any image of a pool.
	Any(poolID [16]byte) ([]string, error)
}

// SetLeases sets whom the pool asks before it frees space that readers may use; nil means nobody.
func (p *Pool) SetLeases(l Leases) {
	p.commit.Lock()
	defer p.commit.Unlock()
	p.leases = l
}

// Generation returns the generation of the catalogue. It rises with every change that readers can see.
func (p *Pool) Generation() uint64 {
	p.commit.Lock()
	defer p.commit.Unlock()
	return p.header.generation
}

// Unlisted reports whether an image was removed while readers used it: the catalogue does not list it,
// so no further reader starts to use it. RemoveImage removes it once they have released it.
func (p *Pool) Unlisted(key string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.images[key]
	return m != nil && m.unlisted
}

// Relist cancels the removal of an image that readers use. Errors: ErrNotFound.
func (p *Pool) Relist(ctx context.Context, key string) error {
	p.commit.Lock()
	defer p.commit.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	p.mu.Lock()
	m := p.images[key]
	p.mu.Unlock()
	err := ErrNotFound
	if m != nil {
		err = p.setUnlisted(m, false)
	}
	if err != nil {
		return fmt.Errorf("pool: list image %q again: %w", key, err)
	}
	return nil
}

// setUnlisted durably takes an image out of the catalogue or back in. Preconditions: commit is held.
func (p *Pool) setUnlisted(m *image, unlisted bool) error {
	if m.unlisted == unlisted && p.stale[m.Slot] == nil && !p.unannounced {
		return nil
	}
	now := *m.storedImage
	now.unlisted = unlisted
	if err := p.index.putStored(&now, p.header.generation+1); err != nil {
		return err
	}
	p.mu.Lock()
	m.storedImage = &now
	p.mu.Unlock()
	p.stale[m.Slot], p.unannounced = m.slot, true
	return p.publish(m)
}

// unleased unlists an image and returns nil if no reader uses it. Preconditions: commit is held.
func (p *Pool) unleased(m *image) error {
	if p.leases == nil {
		return nil
	}
	if err := p.setUnlisted(m, true); err != nil {
		return err
	}
	users, err := p.leases.Users(p.header.id, m.Image)
	if err != nil {
		return fmt.Errorf("find out which readers use it: %w", err)
	}
	if len(users) > 0 {
		return &LeasedError{What: "the image", Users: users}
	}
	return nil
}

// unleasedPool returns nil and leaves the catalogue empty, so that no reader begins, if none uses the
// pool. Otherwise it lists the images again. Preconditions: commit is held.
func (p *Pool) unleasedPool() error {
	if p.leases == nil {
		return nil
	}
	if err := p.anyLease(); err != nil { // before images disappear for a moment
		return err
	}
	err := p.hide(true)
	if err == nil {
		err = p.anyLease()
	}
	if err != nil {
		return errors.Join(err, p.hide(false))
	}
	return nil
}

func (p *Pool) anyLease() error {
	users, err := p.leases.Any(p.header.id)
	if err != nil {
		return fmt.Errorf("find out which readers use the pool: %w", err)
	}
	if len(users) > 0 {
		return &LeasedError{What: "the pool", Users: users}
	}
	return nil
}

// hide takes all images out of the catalogue, or lists them again. If this process dies in between,
// the next opening lists them. Preconditions: commit is held.
func (p *Pool) hide(hidden bool) error {
	p.hidden = hidden
	gen := p.header.generation + 1
	if err := p.index.setGeneration(gen); err != nil {
		return err
	}
	w := window{p, 0, p.header.size}
	for _, m := range p.images {
		if p.stale[m.Slot] != nil {
			continue
		}
		if _, err := w.WriteAt(p.entry(m), entryOff(m.Slot)); err != nil {
			return err
		}
	}
	if err := p.region.Sync(tableOff, int64(p.header.geo.Slots)*entrySize); err != nil {
		return err
	}
	return p.writeHeader(gen)
}
