package shared

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/log"
	"github.com/google/renameio/v2"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/mount"
)

// readers maps each pool to the member that reads it: two members would share its directory.
type readers struct {
	mu sync.Mutex
	by map[[16]byte]*member
}

// take makes a member the reader of a pool. Errors: ErrTwice.
func (r *readers) take(id [16]byte, m *member) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if other := r.by[id]; other != nil && other != m {
		return fmt.Errorf("%w: pool %x is read as %q: take one of both out of shared.pools", ErrTwice,
			id, other.src.Name)
	}
	r.by[id] = m
	return nil
}

// leave ends the reading by a member of all pools but one.
func (r *readers) leave(m *member, but [16]byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, by := range r.by {
		if by == m && id != but {
			delete(r.by, id)
		}
	}
}

func (r *readers) has(id [16]byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.by[id] != nil
}

// earlier is a former pool of a member's name that still has claims.
type earlier struct {
	id     [16]byte
	claims map[digest.Digest]claim
}

// sourceFile holds the name under which a pool was last found.
const sourceFile = "source"

// findEarlier reads the claims of unread former pools of this name. Preconditions: mu is held.
func (m *member) findEarlier() error {
	m.earlier = nil
	list, err := os.ReadDir(m.cfg.Root)
	if err != nil {
		return err
	}
	for _, de := range list {
		e := &earlier{}
		id, err := hex.DecodeString(de.Name())
		if err != nil || len(id) != len(e.id) {
			continue
		}
		copy(e.id[:], id)
		name, err := os.ReadFile(filepath.Join(m.dir(e.id), sourceFile))
		if err != nil || strings.TrimSuffix(string(name), "\n") != m.src.Name || m.readers.has(e.id) {
			continue
		}
		if e.claims, err = readClaims(m.dir(e.id)); err != nil {
			return err
		}
		m.earlier = append(m.earlier, e)
	}
	return nil
}

// replaced checks former pools of this name, from before this process started: nothing of them may be
// mounted. Preconditions: mu is held.
func (m *member) replaced(ctx context.Context, now mount.Pool) error {
	for _, e := range m.earlier {
		t, err := mount.Open(ctx, m.dir(e.id), m.cfg.Drivers, now, mount.Options{Adopt: m.cfg.Adopt, Warn: m.warn(ctx)})
		if err != nil {
			return err
		}
		if err := unmountStale(ctx, t); err != nil {
			return fmt.Errorf("expected pool %x: %w", e.id, err)
		}
	}
	return nil
}

// unmountStale unmounts the mounts of earlier pools and epochs.
func unmountStale(ctx context.Context, t *mount.Table) error {
	left, err := t.RemoveStale(ctx, func(string) bool { return false })
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("%w: %q is still in use (%s): stop the containers that run from it", ErrReset, left[0].Dir,
			left[0].UsedBy)
	}
	return nil
}

// noteSource records the name under which a pool was found.
func (m *member) noteSource(id [16]byte) error {
	path, want := filepath.Join(m.dir(id), sourceFile), m.src.Name+"\n"
	if have, err := os.ReadFile(path); err == nil && string(have) == want {
		return nil
	}
	return renameio.WriteFile(path, []byte(want), 0o600)
}

// sweepEarlier ends the claims of unneeded chains in earlier pools. Preconditions: mu is held, and the
// table is open, so nothing of those pools is mounted.
func (m *member) sweepEarlier(needed func(digest.Digest) bool) error {
	var errs []error
	for _, e := range slices.Clone(m.earlier) {
		for chain := range e.claims {
			if !needed(chain) {
				errs = append(errs, m.releaseEarlier(e, chain))
			}
		}
	}
	return errors.Join(errs...)
}

// superseded ends the claims of a chain in earlier pools, because the current pool has it.
// Preconditions are those of sweepEarlier.
func (m *member) superseded(chain digest.Digest) error {
	var errs []error
	for _, e := range slices.Clone(m.earlier) {
		if _, ok := e.claims[chain]; ok {
			errs = append(errs, m.releaseEarlier(e, chain))
		}
	}
	return errors.Join(errs...)
}

// releaseEarlier ends a claim in an earlier pool. The last one removes the directory of the pool.
func (m *member) releaseEarlier(e *earlier, chain digest.Digest) error {
	if err := m.unlease(e.id, e.claims[chain].image()); err != nil {
		return err
	}
	delete(e.claims, chain)
	dir := m.dir(e.id)
	if len(e.claims) > 0 {
		return writeClaims(dir, e.claims)
	}
	m.earlier = slices.DeleteFunc(m.earlier, func(o *earlier) bool { return o == e })
	for _, name := range []string{claimsFile, sourceFile, "images", "live"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err // something is mounted there
		}
	}
	return os.Remove(dir)
}

// lost describes the claimed images that no container can start from any more, and the remedy; "" if
// there are none. Preconditions: mu is held.
func (m *member) lost() string {
	if m.view == nil {
		return ""
	}
	chains, names, from := map[digest.Digest]bool{}, map[string]bool{}, map[string]bool{}
	add := func(chain digest.Digest, c claim, where string) {
		if _, listed := m.view.chains[chain]; listed {
			return
		}
		chains[chain], from[where] = true, true
		if c.Name != "" {
			names[c.Name] = true
		}
	}
	now := m.view.cat.Geometry.UUID
	for chain, c := range m.claims {
		if c.Epoch != hex.EncodeToString(now[:]) {
			add(chain, c, "its epoch "+c.Epoch)
		}
	}
	for _, e := range m.earlier {
		for chain, c := range e.claims {
			add(chain, c, fmt.Sprintf("pool %x", e.id))
		}
	}
	if len(chains) == 0 {
		return ""
	}
	text := fmt.Sprintf("no container starts from %d images that were in use here", len(chains))
	if len(names) > 0 {
		text += " (" + list(names, 3) + ")"
	}
	return text +
		fmt.Sprintf(": expected %s, found pool %x of epoch %x, which lacks them. A pool in memory is made anew when "+
			"its owner reboots. Remove these OCI images and pull them, or attach what the pool has now", list(from, 3),
			m.view.cat.PoolID, now)
}

// list returns up to most elements of a set as text.
func list(set map[string]bool, most int) string {
	var all []string
	for s := range set {
		all = append(all, s)
	}
	slices.Sort(all)
	if len(all) > most {
		all = append(all[:most], fmt.Sprintf("and %d more", len(all)-most))
	}
	return strings.Join(all, ", ")
}

// logLost logs the lost images, once until they change. Preconditions: mu is held.
func (m *member) logLost(ctx context.Context) {
	if text := m.lost(); text != m.loggedLost {
		m.loggedLost = text
		if text != "" {
			log.G(ctx).WithField("pool", m.src.Name).Error("images of a shared pool are lost: " + text)
		}
	}
}
