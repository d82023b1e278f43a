package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/drivers"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
)

type mounter interface {
	// Mount returns a description of how the image was mounted.
	Mount(ctx context.Context, name, dir string, suid bool) (how string, err error)
	Unmount(ctx context.Context, dir string) error
	Close() error
}

// keeper is the owner of a pool: this process, or the daemon on its behalf.
type keeper interface {
	mounter
	Images(ctx context.Context) ([]store.Info, error)
	Usage(ctx context.Context) (pool.Usage, error)
	Put(ctx context.Context, src putSource, name string) (store.Info, error)
	// Pin holds an image of the pool under a name until Unpin.
	Pin(ctx context.Context, image, name string) (store.Info, error)
	Unpin(ctx context.Context, name string) error
	Sweep(ctx context.Context) error
	// Readers returns the readers in other kernels. Release ends the claims of a reader that is gone.
	Readers(ctx context.Context) ([]store.LeaseUser, error)
	Release(ctx context.Context, reader string, earlier bool) (claims int, err error)
	// Scrub reads all contents. lost names the images that cannot be rebuilt.
	Scrub(ctx context.Context) (found []pool.Finding, lost string, err error)
}

// putSource is an image to put into a pool, and the user's description of it.
type putSource struct {
	image                     *source.Image
	name, platform, namespace string
	plainHTTP, overlayUpper   bool
	hostDirs                  []string
}

// keeperFlags select the owner of the pool.
func keeperFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{
			Name: "control", Value: defaultControl,
			Usage: "ask the daemon at `SOCKET` if it owns the pool; empty: never",
		},
	}
}

// errNoIndex reports that the owner of the pool is on another machine, or has its index in another directory.
var errNoIndex = errors.New("the pool's index is not on this machine, or has to be named with --index")

// openKeeper returns the owner of a pool: the daemon if it has the pool open, else this process.
func (e *env) openKeeper(c *cli.Context, a poolArgs, driver string) (keeper, error) {
	rc, err := a.region(true)
	if err != nil {
		return nil, err
	}
	cat, err := catalogue(rc)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a.Pool, err)
	}
	id := hex.EncodeToString(cat.PoolID[:])
	if d := dialControl(c.String("control")); d.owns(c.Context, id) {
		if driver != "" && driver != "auto" {
			return nil, wrongUse(c, "--driver %s: a daemon owns the pool and has mounted it already", driver)
		}
		return d, nil
	}
	index := a.findIndex(rc, cat)
	if index == "" {
		if pid := ownerOf(rc); pid != 0 {
			busy := &region.BusyError{Path: rc.Path, PID: pid}
			return nil, fmt.Errorf("%s: %w, and no daemon with it answers at %q", a.Pool, busy, c.String("control"))
		}
		return nil, fmt.Errorf("%s: %w", a.Pool, errNoIndex)
	}
	list, err := mount.Select(drivers.All(), driver)
	if err != nil {
		return nil, wrongUse(c, "%v", err)
	}
	return e.openStore(c.Context, rc, index, list)
}

// catalogue reads the pool's own data, without becoming its owner.
func catalogue(rc region.Config) (*pool.Catalogue, error) {
	rc.ReadOnly = true
	r, err := region.Open(rc)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return pool.ReadCatalogue(r)
}

func ownerOf(rc region.Config) int {
	if rc.Path == "" {
		return 0
	}
	return region.LockHolder(rc.Path)
}

// openStore makes this process the owner of a pool.
func (e *env) openStore(
	ctx context.Context, rc region.Config, index string, list []mount.Driver,
) (*localKeeper, error) {
	e.useLog()
	rc.ReadOnly = false
	r, err := region.Open(rc)
	if err != nil {
		return nil, err
	}
	p, err := pool.Open(r, index, e.poolOptions())
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	id := p.ID()
	root := storeRoot(index, hex.EncodeToString(id[:]))
	s, err := store.New(ctx, store.Config{Root: root, Drivers: list, Adopt: drivers.All()}, r, p)
	if err != nil {
		return nil, err
	}
	return &localKeeper{s, root}, nil
}

// localKeeper is a store in this process.
type localKeeper struct {
	store *store.Store
	root  string
}

func (k *localKeeper) Images(context.Context) ([]store.Info, error) { return k.store.Images(), nil }

func (k *localKeeper) Usage(context.Context) (pool.Usage, error) { return k.store.Pool().Usage(), nil }

func (k *localKeeper) Put(ctx context.Context, src putSource, name string) (store.Info, error) {
	info, err := k.store.Put(ctx, src.image, name)
	if err != nil {
		return info, err
	}
	return info, k.store.Publish(ctx, nil)
}

func (k *localKeeper) Pin(ctx context.Context, image, name string) (store.Info, error) {
	return k.store.Pin(ctx, image, name)
}

func (k *localKeeper) Unpin(ctx context.Context, name string) error {
	if err := k.store.Unpin(name); err != nil {
		return err
	}
	return k.store.Publish(ctx, nil)
}

func (k *localKeeper) Readers(context.Context) ([]store.LeaseUser, error) {
	return k.store.LeaseUsers()
}

func (k *localKeeper) Release(_ context.Context, reader string, earlier bool) (int, error) {
	return k.store.Release(reader, earlier)
}

func (k *localKeeper) Sweep(ctx context.Context) error { return k.sweep(store.ByCommand(ctx)) }

func (k *localKeeper) sweep(ctx context.Context) error {
	if err := k.store.Sweep(ctx, nil, false); err != nil {
		return err
	}
	return k.store.UnmountIdle(ctx)
}

func (k *localKeeper) Scrub(ctx context.Context) (found []pool.Finding, lost string, err error) {
	found = []pool.Finding{}
	_, err = k.store.Scrub(ctx, 0)
	for _, d := range k.store.Pool().Damaged() {
		found = append(found, d.Finding())
	}
	if herr := k.store.Heal(ctx, nil); herr != nil {
		lost = herr.Error()
	}
	return found, lost, err
}

func (k *localKeeper) Mount(ctx context.Context, name, dir string, suid bool) (string, error) {
	info, err := k.store.MountAt(ctx, name, dir, !suid)
	if err != nil {
		return "", errors.Join(err, k.store.UnmountIdle(context.WithoutCancel(ctx)))
	}
	for _, m := range k.store.Mounted() {
		if m.Key == info.Key {
			return fmt.Sprintf("with %s: %s", m.Driver, m.Sharing), nil
		}
	}
	return "", nil
}

// Unmount also removes the mounts of the pool that no user asked for.
func (k *localKeeper) Unmount(ctx context.Context, dir string) error {
	if err := k.store.UnmountAt(ctx, dir); err != nil {
		return err
	}
	return k.sweep(ctx)
}

// Close also removes directories on which nothing is mounted.
func (k *localKeeper) Close() error {
	err := k.store.Close()
	if filepath.Dir(k.root) == stateDir() {
		for _, dir := range []string{"images", "live", "plain", ""} {
			_ = os.Remove(filepath.Join(k.root, dir)) // fails if it is not empty
		}
		_ = os.Remove(stateDir())
	}
	return err
}
