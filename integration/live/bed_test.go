package live

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/fusefs"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// place is the place of a test's pool, and its driver.
type place struct {
	fs     string // "ext4", "xfs", "btrfs" or "tmpfs"
	driver string
	size   int64 // of the pool
	disk   int64 // of the file system
	slots  int
	shape  string
}

func (p place) String() string { return p.driver + " on " + p.fs }

func driverOf(name string) mount.Driver {
	switch name {
	case "erofs-file":
		return &erofs.File{}
	case "erofs-loop":
		return erofs.Loop{}
	}
	cmd := command("serve")
	return fusefs.Driver{Command: []string{cmd.Path}, Env: cmd.Env}
}

// bed is a pool and a table that mounts it, like those of one daemon.
type bed struct {
	place
	dir  string // of the pool
	root string // of the table
	seed uint64

	r   region.Region
	p   *pool.Pool
	tab *mount.Table
}

// newBed makes a file system, and a pool in it.
func newBed(t *testing.T, pl place, seed uint64) *bed {
	t.Helper()
	needRoot(t)
	b := &bed{place: pl, dir: t.TempDir(), root: t.TempDir(), seed: seed}
	b.makeFS(t)
	if err := os.Mkdir(b.index(), 0o700); err != nil {
		t.Fatal(err)
	}
	var err error
	c := b.config()
	c.Size, c.Create = pl.size, true
	if b.r, err = region.Open(c); err != nil {
		t.Fatal(err)
	}
	d := driverOf(pl.driver)
	if err := d.Probe(t.Context(), b.r.Info()); errors.Is(err, mount.ErrUnsupported) {
		b.r.Close()
		t.Skip(err)
	}
	opt := b.options(t)
	opt.Slots = pl.slots
	if pl.driver == "erofs-loop" {
		opt.Device = pool.Yes
	}
	if b.p, err = pool.Create(b.r, b.indexFile(), opt); err != nil {
		t.Fatal(err)
	}
	b.openTable(t)
	t.Cleanup(func() {
		b.detach()
		b.close(t)
	})
	return b
}

// makeFS mounts a file system on the directory of the pool. It is in memory, whatever its kind, so syncing is cheap.
func (b *bed) makeFS(t *testing.T) {
	t.Helper()
	if b.fs == "tmpfs" {
		mustMountFS(t, "tmpfs", b.dir)
		return
	}
	mkfs, err := exec.LookPath("mkfs." + b.fs)
	if err != nil {
		t.Skipf("there is no mkfs.%s", b.fs)
	}
	ram := t.TempDir()
	mustMountFS(t, "tmpfs", ram)
	img := filepath.Join(ram, "disk")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, b.disk); err != nil {
		t.Fatal(err)
	}
	args := []string{img}
	if b.fs == "ext4" { // page-sized blocks also on a small disk, and none reserved
		args = []string{"-q", "-b", "4096", "-m", "0", img}
	}
	if out, err := exec.Command(mkfs, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", mkfs, err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", img, b.dir).CombinedOutput(); err != nil {
		t.Skipf("this kernel mounts no %s through a loop device: %v: %s", b.fs, err, out)
	}
	t.Cleanup(func() { unix.Unmount(b.dir, unix.MNT_DETACH) })
}

func mustMountFS(t *testing.T, kind, dir string) {
	t.Helper()
	if err := unix.Mount(kind, dir, kind, 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

func (b *bed) index() string     { return filepath.Join(b.dir, "index") }
func (b *bed) indexFile() string { return filepath.Join(b.index(), "pool.db") }

func (b *bed) config() region.Config {
	c := region.Config{Kind: region.KindFile, Path: filepath.Join(b.dir, "pool")}
	if b.fs == "tmpfs" {
		c.Kind = region.KindTmpfs
	}
	return c
}

func (b *bed) options(t *testing.T) pool.Options {
	return pool.Options{Warn: func(err error) { t.Logf("pool: %v", err) }}
}

func (b *bed) openTable(t *testing.T) {
	t.Helper()
	if err := b.tryOpenTable(t.Context(), t.Logf); err != nil {
		t.Fatal(err)
	}
}

func (b *bed) tryOpenTable(ctx context.Context, warn mount.Warning) (err error) {
	p := mount.Pool{Region: b.r.Info(), Size: b.r.Size(), UUID: b.p.UUID()}
	b.tab, err = mount.Open(ctx, b.root, []mount.Driver{driverOf(b.driver)}, p, mount.Options{Warn: warn})
	return err
}

// open reopens the pool after close, or after another process had it.
func (b *bed) open(t *testing.T) {
	t.Helper()
	if err := b.tryOpen(t.Context(), b.options(t), t.Logf); err != nil {
		t.Fatal(err)
	}
}

func (b *bed) tryOpen(ctx context.Context, o pool.Options, warn mount.Warning) (err error) {
	if b.r, err = region.Open(b.config()); err != nil {
		return err
	}
	if b.p, err = pool.Open(b.r, b.indexFile(), o); err != nil {
		return err
	}
	return b.tryOpenTable(ctx, warn)
}

func (b *bed) close(t *testing.T) {
	t.Helper()
	if b.p == nil {
		return
	}
	if err := errors.Join(b.p.Close(), b.r.Close()); err != nil {
		t.Error(err)
	}
	b.p, b.r, b.tab = nil, nil, nil
}

// detach removes all mounts of the table: a failed test may have left some.
func (b *bed) detach() {
	for _, kind := range []string{"images", "live"} {
		dirs, _ := filepath.Glob(filepath.Join(b.root, kind, "*", "mnt"))
		for _, dir := range dirs {
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	}
}

func key(n int) string { return "image/" + strconv.Itoa(n) }

func (b *bed) want(n int) map[string]entry { return image(shapes[b.shape], b.seed, n) }

func (b *bed) add(ctx context.Context, n int) (pool.Image, error) {
	batch := b.p.Begin()
	defer batch.Discard()
	root, err := tree(ctx, batch, b.want(n))
	if err != nil {
		return pool.Image{}, err
	}
	return b.p.AddImage(ctx, key(n), root, daxfs.Options{})
}

// tree puts the contents of an image, and returns its nodes.
func tree(ctx context.Context, batch *pool.Batch, want map[string]entry) (*daxfs.Node, error) {
	nodes := map[string]*daxfs.Node{}
	var names []string
	for name := range want {
		names = append(names, name)
	}
	slices.Sort(names) // directories come before their entries
	for _, name := range names {
		e := want[name]
		n := nodes[e.first]
		if n == nil || e.first == "" {
			n = &daxfs.Node{Mode: e.mode, UID: e.uid, Mtime: e.mtime, Target: e.link, Rdev: e.rdev}
			for k, v := range e.xattrs {
				n.Xattrs = append(n.Xattrs, daxfs.Xattr{Name: k, Value: []byte(v)})
			}
			if e.regular() {
				var err error
				if n.Data, err = batch.Put(ctx, int64(e.size), bytes.NewReader(contents(e.id, e.size))); err != nil {
					return nil, err
				}
			}
			if e.first != "" {
				nodes[e.first] = n
			}
		}
		nodes[name] = n
		if name == "" {
			continue
		}
		parent := path.Dir(name)
		if parent == "." {
			parent = ""
		}
		if nodes[parent].Entries == nil {
			nodes[parent].Entries = map[string]*daxfs.Node{}
		}
		nodes[parent].Entries[path.Base(name)] = n
	}
	return nodes[""], nil
}

// publish adds an image and mounts it.
func (b *bed) publish(ctx context.Context, n int) (string, error) {
	m, err := b.add(ctx, n)
	if err != nil {
		return "", err
	}
	return b.mount(ctx, m)
}

func (b *bed) mount(ctx context.Context, m pool.Image) (string, error) {
	got, err := b.tab.Mount(ctx, mount.Image{
		Key: m.Key, Name: m.Name(), Nid: b.p.Geometry().SlotNid(m.Slot), UUID: m.UUID, Created: m.Created,
	})
	return got.Dir, err
}

// remove removes an image in the same order as package store, once the overlays of its containers are
// dead. It returns false while something stands on the image. found is called if mount tables show a user.
func (b *bed) remove(ctx context.Context, n int, found func()) (bool, error) {
	used, err := b.tab.UsedBy(ctx, key(n))
	if err != nil {
		return false, err
	}
	if used != "" {
		found()
		return false, nil
	}
	err = b.tab.Unmount(ctx, key(n))
	if errors.Is(err, mount.ErrBusy) {
		return false, nil
	}
	if err != nil && !errors.Is(err, mount.ErrNotFound) {
		return false, err
	}
	return true, b.p.RemoveImage(ctx, key(n))
}

// reclaim frees contents that nobody can read any more, and returns the numbers of freed and of waiting extents.
func (b *bed) reclaim(ctx context.Context, evicted bool) (freed, waiting int, err error) {
	dead := b.p.Dead()
	if len(dead) == 0 {
		return 0, 0, nil
	}
	freed, err = store.Free(ctx, b.p, b.tab, dead, evicted)
	return freed, len(dead) - freed, err
}

// emptied fails the test unless the pool holds nothing.
func (b *bed) emptied(t *testing.T) {
	t.Helper()
	if u := b.p.Usage(); u.Images != 0 || u.Extents != 0 || u.Dead != 0 || u.ExtentCount != 0 {
		t.Errorf("the pool holds %+v, expected nothing", u)
	}
	b.check(t)
}

func (b *bed) check(t *testing.T) {
	t.Helper()
	err := b.p.Check(t.Context(), func(f pool.Finding) bool {
		t.Errorf("check: %v", f)
		return true
	})
	if err != nil {
		t.Errorf("check: %v", err)
	}
}
