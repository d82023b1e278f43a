package mount

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Pool is what a table mounts: one epoch of a pool.
type Pool struct {
	// Region is the memory. If it is a file, Region.FD must be the only descriptor of this process for it:
	// Alive asks the kernel whether there are others.
	Region region.Info
	// Size is the size of the region in bytes.
	Size int64
	// UUID is that of the superblock, and so of the epoch.
	UUID [16]byte
}

func (p Pool) uuid() string   { return hex.EncodeToString(p.UUID[:]) }
func (p Pool) source() Source { return Source{Region: p.Region, Size: p.Size} }

// Image is an image published in the pool.
type Image struct {
	// Key names the image. Any non-empty string.
	Key string
	// Name and Nid are the slot: a name in the root directory of the pool, and its inode number.
	Name string
	Nid  uint64
	// Window and WindowSize are the range that the daxfs driver mounts; both are 0 without a window.
	Window, WindowSize int64
	// Tree are the used ranges of the pool's tree area, which hold all metadata of the image.
	Tree []Range
	// UUID and Created tell apart successive images with the same key.
	UUID    [16]byte
	Created time.Time
}

func (img Image) same(o Image) bool {
	return img.Key == o.Key && img.Name == o.Name && img.Nid == o.Nid && img.Window == o.Window &&
		img.WindowSize == o.WindowSize && img.UUID == o.UUID && img.Created.Equal(o.Created)
}

func (img Image) validate() error {
	switch {
	case img.Key == "":
		return errors.New("mount: image without a key")
	case img.Name == "" || img.Name == "." || img.Name == ".." || filepath.Base(img.Name) != img.Name:
		return fmt.Errorf("mount image %q: slot %q, expected one name in the root directory of the pool",
			img.Key, img.Name)
	case img.Nid == 0:
		return fmt.Errorf("mount image %q: slot %q without an inode number", img.Key, img.Name)
	}
	return nil
}

// Mounted is one mounted image.
type Mounted struct {
	Image
	// Dir is the absolute directory. It is the same for a key and a pool as long as the root is.
	Dir     string
	Driver  string
	Sharing string
}

// Table mounts a pool once, and binds its images to directories. It is safe for concurrent use. The
// lock of the pool makes sure that only one process uses a root.
type Table struct {
	root    string
	drivers []Driver
	pool    Pool
	opts    Options

	// poolWork is held (one token) while the pool is mounted or unmounted. Waiting for it can be cancelled.
	poolWork chan struct{}

	// mu guards the fields below and the marked fields of entries. It is never held during a system call
	// on a mount. Lock order: entry.work, poolWork, mu.
	mu      sync.Mutex
	entries map[string]*entry
	live    *live // nil if the pool is not mounted
}

// Options of a Table. The zero value is ready to use.
type Options struct {
	// Check verifies bytes that others may have written, before the kernel sees them: the pool, or a
	// window, before it is mounted. Nil checks nothing.
	Check func(ctx context.Context, src Source) error
	// Adopt lists drivers of an earlier configuration, whose mounts are adopted; they make no new ones.
	Adopt []Driver
	// Warn receives messages for the operator that no caller can act upon. Nil drops them.
	Warn Warning
}

type entry struct {
	// work is held (one token) while the image is mounted or unmounted.
	work chan struct{}
	dir  string // <root>/images/<id>

	// Guarded by Table.mu:
	users  int    // goroutines that hold or wait for work; an entry with users stays in the table
	driver Driver // nil if it is not mounted
	// windowed is true if driver mounted the window of the image; false for a bind of the slot.
	windowed bool
	img      Image

	// left is the file system of a window that was unmounted and still lives. work guards it.
	left sys.Root
}

// Open returns the table of a root directory, which it creates if needed. It adopts mounts of an
// earlier process if they belong to the same pool, match their record and answer. Mounts of other
// pools, and of another version of the program, stay as they are: see Stale.
func Open(ctx context.Context, root string, drivers []Driver, p Pool, opts Options) (*Table, error) {
	if len(drivers) == 0 {
		return nil, errors.New("mount table: no drivers given")
	}
	if p.UUID == [16]byte{} {
		return nil, errors.New("mount table: the pool has no UUID")
	}
	if opts.Check == nil {
		opts.Check = func(context.Context, Source) error { return nil }
	}
	if opts.Warn == nil {
		opts.Warn = func(string, ...any) {}
	}
	for _, dir := range []string{"images", "live"} {
		dir = filepath.Join(root, dir)
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.Chmod(dir, 0o700)); err != nil {
			return nil, fmt.Errorf("mount table: %w", err)
		}
	}
	root, err := sys.Real(root)
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	t := &Table{
		root: root, drivers: drivers, pool: p, opts: opts,
		poolWork: make(chan struct{}, 1), entries: map[string]*entry{},
	}
	if err := t.adopt(ctx); err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	return t, nil
}

// id is the directory name of a key or UUID: a hash, because keys have slashes, colons and any length,
// and some file systems fold case. It depends on the pool, so pools and epochs never share a
// directory.
func (p Pool) id(key string) string {
	h := sha256.New()
	h.Write(p.UUID[:])
	h.Write([]byte(key))
	return hex.EncodeToString(h.Sum(nil))[:idLen]
}

const idLen = 24

func (t *Table) imageDir(key string) string { return filepath.Join(t.root, "images", t.pool.id(key)) }
func (t *Table) liveDir() string            { return filepath.Join(t.root, "live", t.pool.id("")) }

// mountDir is the mount point in a directory of the table.
func mountDir(dir string) string { return filepath.Join(dir, "mnt") }

// Dir returns the directory where the image with that key is or would be mounted.
func (t *Table) Dir(key string) string { return mountDir(t.imageDir(key)) }

// acquire returns the entry of key with its work token taken.
func (t *Table) acquire(ctx context.Context, key string) (*entry, error) {
	if err := ctx.Err(); err != nil { // select takes either if both are ready
		return nil, err
	}
	t.mu.Lock()
	e := t.entries[key]
	if e == nil {
		e = &entry{work: make(chan struct{}, 1), dir: t.imageDir(key)}
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

func (t *Table) release(key string, e *entry) {
	<-e.work
	t.leave(key, e)
}

// leave removes an entry that is neither mounted nor in use.
func (t *Table) leave(key string, e *entry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e.users--
	if e.users == 0 && e.driver == nil && t.entries[key] == e {
		delete(t.entries, key)
	}
}

// Mount mounts the image unless it is mounted. Of concurrent calls for one key, one does the work. A
// mount that no longer answers (its FUSE server died) is replaced: files opened through the old one
// keep failing, new containers work.
//
// If another image with the same key is mounted, Mount unmounts that first, or fails with ErrBusy.
func (t *Table) Mount(ctx context.Context, img Image) (Mounted, error) {
	if err := img.validate(); err != nil {
		return Mounted{}, err
	}
	e, err := t.acquire(ctx, img.Key)
	if err != nil {
		return Mounted{}, err
	}
	defer t.release(img.Key, e)
	if err := t.ensure(ctx, e, img); err != nil {
		return Mounted{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return e.mounted(), nil
}

// state returns the mount that e describes. The caller holds work.
func (t *Table) state(e *entry) (d Driver, windowed bool, img Image) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return e.driver, e.windowed, e.img
}

// set changes the mount that e describes; a nil driver means none. The caller holds work.
func (t *Table) set(e *entry, d Driver, windowed bool, img Image) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e.driver, e.windowed, e.img = d, windowed, img
}

// ensure makes e a mount of img. The caller holds work.
func (t *Table) ensure(ctx context.Context, e *entry, img Image) error {
	driver, windowed, old := t.state(e)
	switch {
	case driver != nil && !old.same(img):
		if err := t.unmount(ctx, e); err != nil {
			return fmt.Errorf("image %q is not the mounted one: %w", img.Key, err)
		}
	case driver != nil:
		err := t.match(ctx, e, windowed, img)
		if err == nil {
			return nil
		}
		if hangs(ctx, err) {
			return fmt.Errorf("image %q: %w", img.Key, err)
		}
		t.opts.Warn("image %q has to be mounted again: %v", img.Key, err)
	}
	// Anything on the mount point now is dead, or was not adopted.
	if err := sys.Detach(mountDir(e.dir)); err != nil {
		return err
	}
	t.set(e, nil, false, Image{})
	d, windowed, err := t.mountImage(ctx, e.dir, img)
	if err != nil {
		removeDir(e.dir)
		return err
	}
	t.set(e, d, windowed, img)
	return nil
}

// hangs tells whether err only means that an answer did not come in time. A slow server must not be
// replaced: its containers would stay on it, and everything would be cached twice.
func hangs(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded)
}

// match returns nil if the mount is one of img, and answers.
func (t *Table) match(ctx context.Context, e *entry, windowed bool, img Image) error {
	dir := mountDir(e.dir)
	if windowed {
		t.mu.Lock()
		d := e.driver
		t.mu.Unlock()
		return d.Match(ctx, t.window(img), dir)
	}
	t.mu.Lock()
	l := t.live
	t.mu.Unlock()
	if l == nil {
		return errors.New("the pool is not mounted")
	}
	if err := t.answers(ctx, l); err != nil {
		return err
	}
	return l.matchBind(dir, img)
}

// window is the source of an image for a driver that mounts windows.
func (t *Table) window(img Image) Source {
	return Source{Key: img.Key, Region: t.pool.Region, Off: img.Window, Size: img.WindowSize}
}

// mountImage mounts img below dir with the first driver that can.
func (t *Table) mountImage(ctx context.Context, dir string, img Image) (d Driver, windowed bool, err error) {
	if err := os.MkdirAll(mountDir(dir), 0o755); err != nil {
		return nil, false, fmt.Errorf("mount image %q: %w", img.Key, err)
	}
	var why reasons
	for _, d := range t.drivers {
		if d.Windows() {
			err = t.mountWindow(ctx, d, dir, img)
			windowed = true
		} else {
			d, err = t.bind(ctx, d, dir, img)
			windowed = false
		}
		if err == nil {
			return d, windowed, nil
		}
		if !errors.Is(err, ErrUnsupported) {
			return nil, false, fmt.Errorf("mount image %q: %w", img.Key, err)
		}
		why.add(d, err)
	}
	return nil, false, fmt.Errorf("no mount driver can show image %q of %s: %w", img.Key, t.pool.source(), why.err())
}

// mountWindow mounts the window of img with d.
func (t *Table) mountWindow(ctx context.Context, d Driver, dir string, img Image) error {
	if img.WindowSize == 0 {
		return fmt.Errorf("the pool has no window for the image (see pool.windows): %w", ErrUnsupported)
	}
	if err := d.Probe(ctx, t.pool.Region); err != nil {
		return err
	}
	src := t.window(img)
	if err := t.opts.Check(ctx, src); err != nil {
		return err
	}
	// The record comes first: after a crash, the next process knows what may be mounted there.
	if err := writeRecord(dir, recordName, img.record(t.pool, d.Name(), true)); err != nil {
		return err
	}
	return d.Mount(ctx, src, mountDir(dir))
}

// bind mounts the pool with d if necessary, binds the slot of img, and returns the pool's driver.
func (t *Table) bind(ctx context.Context, d Driver, dir string, img Image) (Driver, error) {
	l, err := t.ensurePool(ctx, d, img.Tree)
	if err != nil {
		return d, err
	}
	if err := writeRecord(dir, recordName, img.record(t.pool, l.driver.Name(), false)); err != nil {
		return l.driver, err
	}
	return l.driver, l.bind(ctx, img, mountDir(dir))
}

// Bind also shows a mounted image on dir, which a user chose; restrict adds nosuid and nodev. The
// result is an ordinary mount, which umount(8) removes. UsedBy reports it.
func (t *Table) Bind(ctx context.Context, key, dir string, restrict bool) error {
	return t.withMounted(ctx, key, func(e *entry) error {
		c, err := sys.OpenClone(mountDir(e.dir))
		if err != nil {
			return err
		}
		defer c.Close()
		return c.Attach(dir, restrict)
	})
}

// withMounted calls do with the locked entry of a mounted image, or returns ErrNotFound.
func (t *Table) withMounted(ctx context.Context, key string, do func(e *entry) error) error {
	e, err := t.acquire(ctx, key)
	if err != nil {
		return err
	}
	defer t.release(key, e)
	if d, _, _ := t.state(e); d == nil {
		return fmt.Errorf("image %q: %w", key, ErrNotFound)
	}
	return do(e)
}

// Unmount unmounts an image. It fails with ErrBusy while anything in any mount namespace uses the
// mount, and with ErrNotFound if it is not mounted.
//
// It also unmounts the copies of the mount that other mount namespaces got when they were made. If a
// copy is in use, the image is still unmounted here, and another Unmount tries the copy again.
func (t *Table) Unmount(ctx context.Context, key string) error {
	return t.withMounted(ctx, key, func(e *entry) error { return t.unmount(ctx, e) })
}

// unmount is Unmount for an entry. The caller holds work.
func (t *Table) unmount(ctx context.Context, e *entry) error {
	driver, windowed, img := t.state(e)
	dir := mountDir(e.dir)
	root, mounted, err := sys.MountRoot(dir)
	if err != nil && !errors.Is(err, unix.ENOTCONN) {
		return fmt.Errorf("image %q: %w", img.Key, err)
	}
	if windowed {
		err = driver.Unmount(ctx, dir)
	} else {
		err = sys.Unmount(ctx, dir)
	}
	if err != nil {
		return fmt.Errorf("image %q: %w", img.Key, err)
	}
	if err := t.removeCopies(ctx, "images/"+filepath.Base(e.dir)+"/mnt"); err != nil {
		return fmt.Errorf("image %q: %w", img.Key, err)
	}
	if windowed && mounted {
		e.left = root
	}
	if e.left != (sys.Root{}) {
		// No mount table shows it any more, but a lazily unmounted overlay would still keep the superblock.
		if free, err := sys.DeviceNumberFree(e.left.Major, e.left.Minor); err != nil || !free {
			return fmt.Errorf("image %q: the file system %d:%d is still in use: %w",
				img.Key, e.left.Major, e.left.Minor, cmp.Or(err, ErrBusy))
		}
		e.left = sys.Root{}
	}
	t.set(e, nil, false, Image{})
	removeDir(e.dir)
	return nil
}

// Get returns the image with that key if it is mounted. It does not access the file system.
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
	slices.SortFunc(out, func(a, b Mounted) int { return cmp.Compare(a.Key, b.Key) })
	return out
}

// mounted needs Table.mu.
func (e *entry) mounted() Mounted {
	return Mounted{Image: e.img, Dir: mountDir(e.dir), Driver: e.driver.Name(), Sharing: e.driver.Sharing()}
}
