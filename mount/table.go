package mount

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"sync"

	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

// Table mounts images, each once, and remembers who uses them. It is safe for concurrent use. One process owns a root at
// a time; the pool's own lock sees to that.
//
// Holders live in memory only: the caller stores which snapshot uses which image, and calls Mount again for each after
// a restart, before Prune.
type Table struct {
	root    string
	drivers []Driver
	opts    Options

	// mu guards entries and the fields of an entry that are marked. It is never held during a system call on a mount.
	// Lock order: entry.work, then mu.
	mu      sync.Mutex
	entries map[string]*entry
}

// Options of a Table. The zero value is ready to use.
type Options struct {
	// Check proves an image before it is mounted; Source.Checked skips it. Nil means CheckImage.
	Check func(ctx context.Context, src Source) error
	// Adopt are drivers besides those given to Open. Images that they mounted, under an earlier configuration, are adopted
	// and unmounted when no longer used; no new mount is made with them.
	Adopt []Driver
	// Warn receives what an operator should know but no caller can act upon. Nil drops it.
	Warn Warning
}

type entry struct {
	// work is held (one token) while the image is mounted or unmounted: a channel, so that waiting can be cancelled.
	work chan struct{}
	dir  string // <root>/images/<id>

	// Guarded by Table.mu:
	users   int // goroutines that hold or wait for work; an entry with users is never forgotten
	driver  Driver
	src     Source
	file    string // fileID(src) when it was mounted
	holders map[string]struct{}
}

// Mounted is one mounted image.
type Mounted struct {
	Key string
	// Dir is the directory, absolute. It stays the same for a key as long as the root does.
	Dir     string
	Driver  string
	Sharing string
	Source  Source
	// Holders are the names given to Mount and not yet to Release, sorted.
	Holders []string
}

// Open returns the table of a root directory, which is made if it does not exist. The mounts of an earlier process are
// adopted if they are what their record says and they answer; all others that have a record are removed. Adopted images have
// no holders yet.
func Open(ctx context.Context, root string, drivers []Driver, opts Options) (*Table, error) {
	if len(drivers) == 0 {
		return nil, errors.New("mount table: no drivers given")
	}
	if opts.Check == nil {
		opts.Check = CheckImage
	}
	if opts.Warn == nil {
		opts.Warn = func(string, ...any) {}
	}
	if err := os.MkdirAll(filepath.Join(root, "images"), 0o700); err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	root, err := sys.Real(root)
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	t := &Table{root: root, drivers: drivers, opts: opts, entries: map[string]*entry{}}
	if err := os.Chmod(filepath.Join(root, "images"), 0o700); err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	if err := t.adopt(ctx); err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	return t, nil
}

// id is the directory name of a key. Keys hold slashes and colons and have any length, and some file systems fold case.
func id(key string) string {
	sum := sha256.Sum256([]byte(key))
	return hex.EncodeToString(sum[:12])
}

func (t *Table) imageDir(key string) string { return filepath.Join(t.root, "images", id(key)) }

func mountDir(imageDir string) string { return filepath.Join(imageDir, "mnt") }

// Dir returns where the image of that key is or would be mounted.
func (t *Table) Dir(key string) string { return mountDir(t.imageDir(key)) }

// acquire returns the entry of key with its work token taken.
func (t *Table) acquire(ctx context.Context, key string) (*entry, error) {
	t.mu.Lock()
	e := t.entries[key]
	if e == nil {
		e = &entry{work: make(chan struct{}, 1), dir: t.imageDir(key), holders: map[string]struct{}{}}
		t.entries[key] = e
	}
	e.users++
	t.mu.Unlock()
	select {
	case e.work <- struct{}{}:
		return e, nil
	case <-ctx.Done():
		t.leave(key, e)
		return nil, ctx.Err()
	}
}

// release gives the work token back.
func (t *Table) release(key string, e *entry) {
	<-e.work
	t.leave(key, e)
}

func (t *Table) leave(key string, e *entry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e.users--
	t.forget(key, e)
}

// forget drops an entry that stands for nothing any more. It needs Table.mu. An image that was lost and could not be mounted
// again keeps its entry as long as it has holders: they are still its users when it comes back.
func (t *Table) forget(key string, e *entry) {
	if e.users == 0 && e.driver == nil && len(e.holders) == 0 && t.entries[key] == e {
		delete(t.entries, key)
	}
}

// Mount mounts the image unless it is mounted already, and adds holder to its users; the same holder counts once. Of
// concurrent calls for one key one does the work. A mount that no longer answers (its FUSE server died) is replaced: what was
// opened through the old one keeps failing, new containers work.
//
// An image that is mounted from another window or region is unmounted and mounted anew if it has no holder, else Mount fails
// with ErrBusy.
func (t *Table) Mount(ctx context.Context, src Source, holder string) (Mounted, error) {
	if err := src.validate(); err != nil {
		return Mounted{}, err
	}
	if holder == "" {
		return Mounted{}, fmt.Errorf("mount %s: empty holder name", src)
	}
	e, err := t.acquire(ctx, src.Key)
	if err != nil {
		return Mounted{}, err
	}
	defer t.release(src.Key, e)
	if err := t.ensure(ctx, e, src); err != nil {
		return Mounted{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	e.holders[holder] = struct{}{}
	return e.mounted(), nil
}

// ensure makes e mounted from src. The caller holds the work token.
func (t *Table) ensure(ctx context.Context, e *entry, src Source) error {
	t.mu.Lock()
	driver, old, holders := e.driver, e.src, len(e.holders)
	t.mu.Unlock()
	if driver != nil {
		same := old.same(src)
		if same {
			err := e.match(ctx)
			if err == nil {
				return nil
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			t.opts.Warn("image %q has to be mounted again: %v", src.Key, err)
		} else if holders > 0 {
			return fmt.Errorf("image %q is mounted from %s+%d and has %d holders, cannot mount %s: %w",
				src.Key, old.Where(), old.Off, holders, src, ErrBusy)
		}
		if err := t.discard(ctx, e, driver); err != nil {
			return err
		}
	}
	if src.Checked == "" {
		if err := t.opts.Check(ctx, src); err != nil {
			return err
		}
	}
	dir := mountDir(e.dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("mount %s: %w", src, err)
	}
	// The record comes first: whatever happens after it, the next process knows what may be there.
	rec := newRecord("", src)
	if err := rec.write(e.dir); err != nil {
		return fmt.Errorf("mount %s: %w", src, err)
	}
	d, err := Auto(ctx, t.drivers, src, dir, t.opts.Warn)
	if err != nil {
		removeImageDir(e.dir)
		return err
	}
	rec.Driver = d.Name()
	if err := rec.write(e.dir); err != nil {
		err = fmt.Errorf("mount %s: %w", src, err)
		if uerr := d.Unmount(context.WithoutCancel(ctx), dir); uerr != nil {
			return errors.Join(err, uerr)
		}
		removeImageDir(e.dir)
		return err
	}
	t.mu.Lock()
	e.driver, e.src, e.file = d, src, rec.File
	t.mu.Unlock()
	return nil
}

// discard takes a mount away that is dead or of another window, and whoever still has files open in it keeps them.
func (t *Table) discard(ctx context.Context, e *entry, d Driver) error {
	if err := sys.Detach(mountDir(e.dir)); err != nil {
		return err
	}
	if err := d.Unmount(ctx, mountDir(e.dir)); err != nil {
		return err
	}
	t.mu.Lock()
	e.driver = nil
	t.mu.Unlock()
	return nil
}

// Release takes holder off the users of an image. It never unmounts: that may take long, and the next container of the
// image finds its pages in memory. It returns how many holders remain. Releasing what is not held is no error.
func (t *Table) Release(key, holder string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.entries[key]
	if e == nil {
		return 0
	}
	delete(e.holders, holder)
	t.forget(key, e)
	return len(e.holders)
}

// Unmount unmounts an image that has no holder. It fails with ErrBusy if it has, or if the kernel says so, and with
// ErrNotFound if it is not mounted.
func (t *Table) Unmount(ctx context.Context, key string) error {
	e, err := t.acquire(ctx, key)
	if err != nil {
		return err
	}
	defer t.release(key, e)
	t.mu.Lock()
	d, holders := e.driver, e.holderNames()
	t.mu.Unlock()
	if d == nil {
		return fmt.Errorf("image %q: %w", key, ErrNotFound)
	}
	if len(holders) > 0 {
		return fmt.Errorf("image %q: %w by %d holders: %q", key, ErrBusy, len(holders), holders)
	}
	if err := d.Unmount(ctx, mountDir(e.dir)); err != nil {
		return fmt.Errorf("image %q: %w", key, err)
	}
	t.mu.Lock()
	e.driver = nil
	t.mu.Unlock()
	removeImageDir(e.dir)
	return nil
}

// Prune unmounts every image without holders. What is busy stays and is part of the error; the others are unmounted all
// the same.
func (t *Table) Prune(ctx context.Context) error {
	var errs []error
	for _, m := range t.List() {
		if len(m.Holders) > 0 {
			continue
		}
		if err := t.Unmount(ctx, m.Key); err != nil && !errors.Is(err, ErrNotFound) {
			errs = append(errs, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

// Get returns the image of that key if it is mounted. It asks nothing of the file system.
func (t *Table) Get(key string) (Mounted, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.entries[key]
	if e == nil || e.driver == nil {
		return Mounted{}, false
	}
	return e.mounted(), true
}

// List returns all mounted images, by key.
func (t *Table) List() []Mounted {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []Mounted
	for _, e := range t.entries {
		if e.driver != nil {
			out = append(out, e.mounted())
		}
	}
	slices.SortFunc(out, func(a, b Mounted) int {
		if a.Key < b.Key {
			return -1
		}
		return 1
	})
	return out
}

// Close releases nothing and unmounts nothing: see Lifetimes in the package documentation. It exists so that owners can
// treat a Table like their other parts.
func (t *Table) Close() error { return nil }

// mounted needs Table.mu.
func (e *entry) mounted() Mounted {
	return Mounted{
		Key: e.src.Key, Dir: mountDir(e.dir), Driver: e.driver.Name(), Sharing: e.driver.Sharing(),
		Source: e.src, Holders: e.holderNames(),
	}
}

func (e *entry) holderNames() []string {
	names := make([]string, 0, len(e.holders))
	for h := range e.holders {
		names = append(names, h)
	}
	sort.Strings(names)
	return names
}

func (s Source) validate() error {
	switch {
	case s.Key == "":
		return errors.New("mount: source without a key")
	case s.Off < 0 || s.Off%4096 != 0:
		return fmt.Errorf("mount %s: the window starts at %d, expected a multiple of 4096", s, s.Off)
	case s.Size < 4096 || s.Size > 1<<62-s.Off:
		return fmt.Errorf("mount %s: the window has %d bytes, expected at least 4096", s, s.Size)
	}
	return nil
}
