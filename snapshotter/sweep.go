package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// Cleanup frees what removed snapshots held: directories, mounts, images and layers.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	defer s.st.reserve()
	return errors.Join(s.forgetDead(ctx), s.removeDirs(ctx), s.dropDirs(ctx), s.sweep(ctx, false))
}

// doomed begins the names of directories that are being removed.
const doomed = "removed-"

// removeDirs removes the directories that belong to no snapshot. One that cannot be removed does not keep the others.
func (s *Snapshotter) removeDirs(ctx context.Context) error {
	var dirs, committed []string
	var errs []error
	// A write transaction, because snapshots are created in one: no directory is seen without its record.
	err := s.st.update(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		ids, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		for _, id := range recordIDs(tx) {
			rec, err := getRecord(tx, id)
			if err != nil {
				return err
			}
			switch {
			case ids[id] == "":
				if err := deleteRecord(tx, id); err != nil {
					return err
				}
			case rec.Image != "" && !rec.hasDir():
				if _, err := os.Lstat(s.upper(id)); err == nil {
					committed = append(committed, ids[id])
				}
			}
		}
		strays, err := s.strayDirs(tx, ids)
		if err != nil {
			return err
		}
		for _, id := range strays {
			if s.pins.has(s.dirKey(id)) {
				continue // being read: see hold
			}
			// Renamed within the transaction: if the removal fails, the id is given out again, and a directory that is
			// removed by that name later may be another snapshot's.
			dir, err := s.doom(s.dir(id), id)
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
	for _, name := range committed {
		errs = append(errs, s.removeDropped(ctx, name))
	}
	return errors.Join(append(errs, err)...)
}

// doom gives a directory a name that no snapshot ever has, and returns the new path. It needs no space on the disk.
func (s *Snapshotter) doom(dir, name string) (string, error) {
	if strings.HasPrefix(name, doomed) {
		return dir, nil
	}
	for n := 0; ; n++ {
		to := s.dir(fmt.Sprintf("%s%s-%d", doomed, name, n))
		err := unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EEXIST) {
			continue
		}
		if err != nil {
			return "", &os.LinkError{Op: "rename", Old: dir, New: to, Err: err}
		}
		return to, nil
	}
}

// sweep lets Lowers free what no record and no operation needs.
func (s *Snapshotter) sweep(ctx context.Context, short bool) (err error) {
	began := time.Now()
	defer func() { s.opts.Observe("sweep", time.Since(began), err) }()
	if short {
		// What a removed snapshot stood on is in use until its overlay is known to be dead.
		if err := s.forgetDead(ctx); err != nil {
			log.G(ctx).WithError(err).Warn("what removed snapshots stood on stays in use")
		}
	}
	s.sweeping.Lock()
	defer s.sweeping.Unlock()
	defer s.pins.watch()()
	u, err := s.uses(ctx)
	if err != nil {
		return err
	}
	err = s.lowers.Sweep(ctx, u, short)
	if s.opts.Shared != nil {
		needed := func(chain digest.Digest) bool { return u.Image(sharedKey(chain)) != Unused }
		err = errors.Join(err, s.opts.Shared.Sweep(ctx, needed))
	}
	return err
}

// pins are the images and layers that operations under way need, although no record says so yet. The zero value is
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

// strayDirs lists the directories, by id, that belong to no snapshot of ids and that no mount has left.
func (s *Snapshotter) strayDirs(tx *bolt.Tx, ids map[string]string) ([]string, error) {
	gone, err := goneLowers(tx)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(filepath.Join(s.root, "snapshots"))
	var strays []string
	for _, e := range entries {
		if id := e.Name(); ids[id] == "" && gone[id] == nil {
			strays = append(strays, id)
		}
	}
	return strays, err
}
