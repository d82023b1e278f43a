package snapshotter

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	bolt "go.etcd.io/bbolt"
)

// Cleanup frees what removed snapshots held: directories, mounts, images and layers.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	return errors.Join(s.removeDirs(ctx), s.sweep(ctx, false))
}

// doomed begins the names of directories that are being removed.
const doomed = "removed-"

// removeDirs removes the directories that belong to no snapshot. One that cannot be removed does not keep the others.
func (s *Snapshotter) removeDirs(ctx context.Context) error {
	var dirs []string
	var errs []error
	// A write transaction, because snapshots are created in one: no directory is seen without its record.
	err := s.st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		ids, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		for _, id := range recordIDs(tx) {
			if ids[id] == "" {
				if err := deleteRecord(tx, id); err != nil {
					return err
				}
			}
		}
		entries, err := os.ReadDir(filepath.Join(s.root, "snapshots"))
		if err != nil {
			return err
		}
		for _, e := range entries {
			id := e.Name()
			if ids[id] != "" || s.pins.has(s.dirKey(id)) {
				continue // in use, or being read: see hold
			}
			// Renamed within the transaction: if one fails, the id that it took is given out again, and a directory that
			// is removed by that name later may be another snapshot's.
			dir, err := s.doom(id)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			dirs = append(dirs, dir)
		}
		return nil
	})
	for _, dir := range dirs {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(append(errs, err)...)
}

// doom gives a directory a name that no snapshot ever has, and returns its path.
func (s *Snapshotter) doom(name string) (string, error) {
	if strings.HasPrefix(name, doomed) {
		return s.dir(name), nil
	}
	dir, err := os.MkdirTemp(filepath.Join(s.root, "snapshots"), doomed)
	if err != nil {
		return "", err
	}
	return dir, os.Rename(s.dir(name), filepath.Join(dir, name))
}

// sweep lets Lowers free what no record and no operation needs.
func (s *Snapshotter) sweep(ctx context.Context, short bool) (err error) {
	began := time.Now()
	defer func() { s.opts.Observe("sweep", time.Since(began), err) }()
	s.sweeping.Lock()
	defer s.sweeping.Unlock()
	defer s.pins.watch()()
	u, err := s.uses(ctx)
	if err != nil {
		return err
	}
	return s.lowers.Sweep(ctx, u, short)
}

// uses reads from the records what is needed. Only while pins are watched is the result good for a sweep.
func (s *Snapshotter) uses(ctx context.Context) (*uses, error) {
	u := &uses{pins: &s.pins, images: map[string]Use{}, layers: map[string]Use{}}
	err := s.st.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		hasChild := map[string]bool{}
		committed := map[string]record{}
		err := storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			id, _, _, err := storage.GetInfo(ctx, info.Name)
			if err != nil {
				return err
			}
			rec, err := getRecord(tx, id)
			if err != nil {
				return err
			}
			for _, key := range rec.Streamed {
				raise(u.layers, key, Stored)
			}
			if rec.Lower != nil && rec.Lower.Chain != "" {
				raise(u.images, rec.Lower.Chain, InUse)
			}
			if info.Kind == snapshots.KindCommitted {
				hasChild[info.Parent] = true
				committed[info.Name] = rec
				if rec.Dir {
					raise(u.layers, s.dirKey(id), Stored)
				}
			}
			return nil
		})
		for name, rec := range committed {
			if rec.Top || !hasChild[name] {
				raise(u.images, rec.Chain, Ready)
			} else {
				raise(u.images, rec.Chain, Stored)
			}
		}
		return err
	})
	return u, err
}

func raise(m map[string]Use, key string, u Use) {
	if u > m[key] {
		m[key] = u
	}
}

// uses implements Uses.
type uses struct {
	pins           *pins
	images, layers map[string]Use
}

func (u *uses) Image(chain string) Use {
	if u.pins.has(chain) {
		return InUse
	}
	return u.images[chain]
}

func (u *uses) Layer(key string) Use {
	if u.pins.has(key) {
		return InUse
	}
	return u.layers[key]
}

// pins are the chains and layers that operations under way need, although no record says so yet. The zero value is
// ready to use.
type pins struct {
	mu   sync.Mutex
	held map[string]int
	// seen, while a sweep watches, also holds what was released since the watch began: what the sweep read from the
	// records before that moment does not have it.
	seen map[string]bool
}

// pin holds key until the function that it returns is called.
func (p *pins) pin(key string) (unpin func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held == nil {
		p.held = map[string]int{}
	}
	p.held[key]++
	if p.seen != nil {
		p.seen[key] = true
	}
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.held[key]--; p.held[key] == 0 {
			delete(p.held, key)
		}
	}
}

// watch makes has report what is held at any moment from now until the function that it returns is called. There is
// one watch at a time.
func (p *pins) watch() (end func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen = map[string]bool{}
	for key := range p.held {
		p.seen[key] = true
	}
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.seen = nil
	}
}

func (p *pins) has(key string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen[key] || p.held[key] > 0
}

// recent remembers the chains that were streamed a short while ago. The zero value is ready to use.
type recent struct {
	mu         sync.Mutex
	until      map[string]time.Time
	distrusted bool
}

// recentFor is how long the next layer of a pull may take to be downloaded and prepared.
const recentFor = time.Minute

func (r *recent) add(chain string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if r.until == nil {
		r.until = map[string]time.Time{}
	}
	for c, t := range r.until {
		if now.After(t) {
			delete(r.until, c)
		}
	}
	r.until[chain] = now.Add(recentFor)
}

func (r *recent) has(chain string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.distrusted && time.Now().Before(r.until[chain])
}

// distrust ends all guessing for the life of the process: both kinds of differ are at work here.
func (r *recent) distrust() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.distrusted = true
}
