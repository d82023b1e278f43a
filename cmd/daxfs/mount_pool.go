package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/drivers"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// mountFromPool implements mount --pool. The owner of the pool mounts, so that it knows the image is in use.
func (e *env) mountFromPool(c *cli.Context) error {
	for _, flag := range []string{"offset", "size", "foreground", "root-hash"} {
		if c.IsSet(flag) {
			return wrongUse(c, "--%s does not go with --pool: the pool is mounted as a whole", flag)
		}
	}
	dir, err := drivers.Resolve(c.Args().Get(1))
	if err != nil {
		return err
	}
	if err := isDir(dir); err != nil {
		return err
	}
	if _, _, err := drivers.Of(dir); err == nil {
		return fmt.Errorf("%q is mounted already: %w", dir, mount.ErrBusy)
	}
	rec := mountRecord{poolArgs: poolArgs{Pool: c.String("pool"), Index: c.String("index")}, Dir: dir}
	if err := rec.absolute(); err != nil {
		return err
	}
	k, err := e.openMounter(c, rec.poolArgs)
	if errors.Is(err, errNoIndex) {
		rec.Reader = true
		k, err = e.openReader(c, rec.poolArgs)
	}
	if err != nil {
		return err
	}
	// Write the record first: umount then knows the owner, whatever happens in between.
	if err := rec.write(); err != nil {
		return errors.Join(err, k.Close())
	}
	how, err := k.Mount(c.Context, c.Args().First(), dir, c.Bool("suid"))
	if err != nil {
		return errors.Join(err, rec.remove(), k.Close())
	}
	fmt.Fprintf(e.stderr, "mounted on %s %s\n", dir, how)
	return k.Close()
}

// umountFromPool unmounts a mount of mountFromPool. It returns false if dir has none.
func (e *env) umountFromPool(c *cli.Context, dir string) (bool, error) {
	rec, err := readMountRecord(dir)
	if errors.Is(err, fs.ErrNotExist) {
		d := dialControl(c.String("control"))
		if !d.mounted(c.Context, dir) {
			return false, nil
		}
		return true, d.Unmount(c.Context, dir)
	}
	if err != nil {
		return true, err
	}
	if _, _, err := drivers.Of(dir); errors.Is(err, mount.ErrNotFound) {
		// Somebody else unmounted it. The owner finds out by itself.
		return true, errors.Join(err, rec.remove())
	}
	open := e.openMounter
	if rec.Reader {
		open = e.openReader
	}
	k, err := open(c, rec.poolArgs)
	if err != nil {
		return true, err
	}
	if err = k.Unmount(c.Context, dir); err == nil {
		err = rec.remove()
	}
	return true, errors.Join(err, k.Close())
}

// mountRecord records which pool is mounted on a directory.
type mountRecord struct {
	poolArgs
	Dir    string `json:"dir"`
	Reader bool   `json:"reader,omitempty"` // this machine has no index of the pool
}

// absolute makes the paths of the record absolute, for processes with another working directory.
func (r *mountRecord) absolute() error {
	if rc, err := r.region(true); err != nil {
		return err
	} else if rc.Path == "" {
		return nil // a physical range
	}
	for _, path := range []*string{&r.Pool, &r.Index} {
		if *path == "" {
			continue
		}
		full, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = full
	}
	return nil
}

func mountRecordPath(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return filepath.Join(stateDir(), "mounts", hex.EncodeToString(sum[:12])+".json")
}

func readMountRecord(dir string) (r mountRecord, err error) {
	b, err := os.ReadFile(mountRecordPath(dir))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil || r.Dir != dir {
		return r, fmt.Errorf("record of the mount on %q: names %q: %w", dir, r.Dir, err)
	}
	return r, nil
}

func (r mountRecord) write() error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := mountRecordPath(r.Dir)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return renameio.WriteFile(path, b, 0o600)
}

func (r mountRecord) remove() error {
	path := mountRecordPath(r.Dir)
	err := os.Remove(path)
	_ = os.Remove(filepath.Dir(path)) // fails if there are other records
	return err
}

func (e *env) openMounter(c *cli.Context, a poolArgs) (mounter, error) {
	return e.openKeeper(c, a, c.String("driver"))
}

// reader mounts images of a pool with an owner elsewhere. The owner does not learn of the mounts.
type reader struct {
	cat   *pool.Catalogue
	mem   region.Region
	table *mount.Table
	lock  *os.File // of the table
}

func (e *env) openReader(c *cli.Context, a poolArgs) (_ mounter, err error) {
	k := &reader{}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.Close())
		}
	}()
	if k.mem, k.cat, err = a.open(); err != nil {
		return nil, err
	}
	list, err := mount.Select(drivers.All(), c.String("driver"))
	if err != nil {
		return nil, wrongUse(c, "%v", err)
	}
	root := filepath.Join(stateDir(), hex.EncodeToString(k.cat.PoolID[:]))
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	if k.lock, err = os.OpenFile(filepath.Join(root, "lock"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	if err := unix.Flock(int(k.lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock %q: %w", k.lock.Name(), err)
	}
	o := mount.Options{Adopt: drivers.All(), Warn: e.warn}
	if !c.Bool("no-check") {
		o.Check = k.check
	}
	p := mount.Pool{Region: k.mem.Info(), Size: k.cat.Size, UUID: k.cat.Geometry.UUID}
	k.table, err = mount.Open(c.Context, root, list, p, o)
	return k, err
}

func (e *env) warn(format string, args ...any) {
	fmt.Fprintf(e.stderr, "daxfs: warning: %s\n", message(fmt.Errorf(format, args...)))
}

// check verifies data of another machine before this kernel parses it.
func (k *reader) check(ctx context.Context, src mount.Source) error {
	if src.Key != "" {
		return mount.CheckImage(ctx, src)
	}
	published := map[int]bool{}
	for _, m := range k.cat.Images {
		published[m.Slot] = true
	}
	o := daxfs.LiveCheckOptions{OneInode: k.cat.DAX, Slots: func(slot int) bool { return published[slot] }}
	r := io.NewSectionReader(k.mem, 0, k.cat.Size)
	err := daxfs.CheckLive(r, k.cat.Size, o, func(daxfs.Finding) bool { return false })
	if err != nil {
		return fmt.Errorf("%w: pool %s: %w", mount.ErrCheck, src.Where(), err)
	}
	return nil
}

func (k *reader) Mount(ctx context.Context, name, dir string, suid bool) (string, error) {
	var infos []store.Info
	for _, m := range k.cat.Images {
		infos = append(infos, store.Info{Image: m})
	}
	m, err := store.Match(infos, name)
	if err != nil {
		return "",
			fmt.Errorf("%w: names are in the index, which is not on this machine; keys are what pool ls shows", err)
	}
	mounted, err := k.table.Mount(ctx, mount.Image{
		Key: m.Key, Name: m.Name(), Nid: k.cat.Geometry.SlotNid(m.Slot), Window: m.Window, WindowSize: m.WindowSize,
		UUID: m.UUID, Created: m.Created,
	})
	if err == nil {
		err = k.table.Bind(ctx, m.Key, dir, !suid)
	}
	if err != nil {
		return "", errors.Join(err, k.rest(context.WithoutCancel(ctx)))
	}
	const note = "The owner of the pool is elsewhere and does not know of it"
	return fmt.Sprintf("with %s: %s. %s", mounted.Driver, mounted.Sharing, note), nil
}

func (k *reader) Unmount(ctx context.Context, dir string) error {
	if err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW); err != nil {
		return &os.PathError{Op: "unmount", Path: dir, Err: err}
	}
	return k.rest(ctx)
}

// rest unmounts what nobody uses.
func (k *reader) rest(ctx context.Context) error {
	used, err := k.table.UsedByAll(ctx)
	if err != nil {
		return err
	}
	for _, m := range k.table.List() {
		if used[m.Key] == "" {
			err = errors.Join(err, k.table.Unmount(ctx, m.Key))
		}
	}
	if err != nil || len(k.table.List()) > 0 {
		return err
	}
	if err := k.table.UnmountPool(ctx); !errors.Is(err, mount.ErrNotFound) {
		return err
	}
	return nil
}

func (k *reader) Close() error {
	var errs []error
	if k.mem != nil {
		errs = append(errs, k.mem.Close())
	}
	if k.lock != nil {
		errs = append(errs, k.lock.Close())
	}
	return errors.Join(errs...)
}
