package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// tmpfsPath is where a pool of kind tmpfs is without a configured path.
const tmpfsPath = "/dev/shm/daxfs-snapshotter.pool"

// maxSparse bounds the size that a file gets which was given none: EROFS counts blocks in 32 bits, and a window reaches
// to the end of the pool.
const maxSparse = 8 << 40

// openPool opens the pool that the configuration names, and makes it if there is none.
func openPool(ctx context.Context, c *config.Config) (_ region.Region, _ *pool.Pool, err error) {
	rc, err := regionConfig(c)
	if err != nil {
		return nil, nil, err
	}
	r, err := region.Open(rc)
	if err != nil {
		return nil, nil, fmt.Errorf("%w%s", err, advice(err))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	dir := filepath.Join(c.Root, "pool")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	index := filepath.Join(dir, "index.db")
	opts := pool.Options{Warn: func(err error) { log.L.WithError(err).Warn("pool") }}
	p, err := pool.Open(r, index, opts)
	if errors.Is(err, pool.ErrWiped) {
		if _, serr := os.Stat(index); serr == nil {
			log.G(ctx).WithError(err).Warn("the memory of the pool was wiped, as by a reboot; images are made again as they are needed")
		}
		p, err = pool.Reset(r, index, opts)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%w (pool.kind %q, pool.path %q)%s", err, rc.Kind, rc.Path, advice(err))
	}
	return r, p, nil
}

// advice says what to do about the errors of opening a pool that a change of the configuration, or of the program, causes.
func advice(err error) string {
	switch {
	case errors.Is(err, region.ErrSize):
		return "; a pool keeps the size that it was made with: set pool.size back or leave it out, " +
			"or end all containers and remove the file to start with an empty pool"
	case errors.Is(err, pool.ErrForeign):
		return "; if nothing needs what is there, `daxfs pool init --force` makes an empty pool"
	case errors.Is(err, pool.ErrBusy):
		return "; end what uses it, then start again"
	}
	return ""
}

// regionConfig fills in what the configuration leaves open.
func regionConfig(c *config.Config) (region.Config, error) {
	rc := region.Config{Kind: c.Pool.Kind, Path: c.Pool.Path, Size: int64(c.Pool.Size), Phys: c.Pool.Phys}
	switch rc.Kind {
	case region.KindFile, region.KindTmpfs, region.KindHugetlbfs:
		rc.Create = true
	default:
		return rc, nil
	}
	if rc.Path == "" {
		rc.Path = filepath.Join(c.Root, "pool", "region")
		if rc.Kind == region.KindTmpfs {
			rc.Path = tmpfsPath
		}
	}
	dir := filepath.Dir(rc.Path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return rc, err
	}
	if rc.Size > 0 {
		return rc, nil
	}
	if st, err := os.Stat(rc.Path); err == nil && st.Size() > 0 {
		return rc, nil // as large as it was made
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return rc, fmt.Errorf("size of the file system of %q: %w", rc.Path, err)
	}
	rc.Size = min(int64(st.Blocks)*st.Bsize, maxSparse)
	if rc.Kind != region.KindFile {
		rc.Size /= 2
	}
	if rc.Size == 0 {
		return rc, fmt.Errorf("the file system of %q does not say how large it is: set pool.size", rc.Path)
	}
	return rc, nil
}
