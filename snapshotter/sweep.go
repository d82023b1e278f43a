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

// Cleanup frees the directories, mounts, images and layers of removed snapshots.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	defer s.st.reserve()
	return errors.Join(s.forgetDead(ctx), s.removeDirs(ctx), s.dropDirs(ctx), s.sweep(ctx, false))
}

// doomed begins the names of directories that are being removed.
const doomed = "removed-"

// removeDirs removes the directories that belong to no snapshot. An error with one does not stop the others.
func (s *Snapshotter) removeDirs(ctx context.Context) error {
	var dirs, committed []string
	var errs []error
	// A write transaction, because snapshots are created in one: every directory seen has its record.
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
			// Rename within the transaction: if the removal fails, the id is given out again, and the directory
			// with that name may then belong to another snapshot.
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
		// The lower of a removed snapshot is in use until its overlay is known to be dead.
		if err := s.forgetDead(ctx); err != nil {
			log.G(ctx).WithError(err).Warn("the lowers of removed snapshots stay in use")
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

// pins counts the images and layers needed by operations, not yet by records. The zero value is ready.
type pins struct {
	mu   sync.Mutex
	held map[string]int
	// seen is set while a sweep watches. It holds also the keys released since the watch began: the
	// records that the sweep read before may not name them.
	seen map[string]bool
}

// pin holds key until unpin is called.
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

// watch makes has report every key that is held at any moment until end is called. Only one watch may run at a time.
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
