package store

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Pool names a pool, as in the daemon's configuration.
type Pool struct {
	Kind string
	// Path is the file or device; empty selects the default of the kind.
	Path string
	// Size in bytes. 0 means the present size, and for a new file as much as its file system can hold.
	Size int64
	// Phys is the address of the first byte, for region.KindPhys.
	Phys uint64
	// Windows is "auto", "yes" or "no"; empty means "auto".
	Windows string
	// DAX is "auto", "yes" or "no": whether kernels mount the pool with DAX. Empty means "auto".
	DAX string
}

// ShmDir is the directory of a pool of kind tmpfs without a path.
const ShmDir = "/dev/shm/daxfs-snapshotter"

// maxSparse limits the default size of a file: EROFS counts blocks in 32 bits.
const maxSparse = 8 << 40

// File returns the file or device of a pool.
func (p Pool) File(root string) string {
	switch {
	case p.Path != "":
		return p.Path
	case p.Kind == region.KindFile:
		return filepath.Join(root, "pool", "live")
	case p.Kind == region.KindTmpfs:
		return filepath.Join(ShmDir, "pool")
	}
	return ""
}

// openPool opens the pool of a root directory, or makes one.
//
// The index lies below the root and is found by trial, because it names its pool. So an index is not
// lost if the pool is missing at one start (its file system is mounted late), or if a configuration is
// changed and changed back.
func openPool(ctx context.Context, c Config) (_ region.Region, _ *pool.Pool, err error) {
	rc, err := c.Pool.region(c.Root)
	if err != nil {
		return nil, nil, err
	}
	r, err := region.Open(rc)
	if errors.Is(err, region.ErrForeign) {
		return nil, nil, err // the error says what to do; making a pool there is no remedy
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%w%s", err, advice(err, rc.Kind))
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
	x := indexes{ctx: ctx, region: r, dir: dir, name: indexName(rc), config: c}
	p, err := x.open()
	if err != nil {
		return nil, nil, fmt.Errorf("%w (pool.kind %q, pool.path %q)%s", err, rc.Kind, rc.Path, advice(err, rc.Kind))
	}
	return r, p, nil
}

// indexName is the prefix of the indexes of pools with a kind and a path.
func indexName(rc region.Config) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %s %d", rc.Kind, rc.Path, rc.Phys))
	return hex.EncodeToString(sum[:6])
}

// indexes finds the index of the pool in a region.
type indexes struct {
	ctx    context.Context
	region region.Region
	dir    string
	name   string // prefix of indexes made for this kind and path
	config Config
}

const (
	indexSuffix = ".db"
	// newSuffix is the suffix of an index until its pool is complete.
	newSuffix = ".new"
)

func (x indexes) mine(path string) bool { return strings.HasPrefix(filepath.Base(path), x.name+"-") }

// open opens the pool with its index, or makes a pool if the region is new.
func (x indexes) open() (*pool.Pool, error) {
	opts := pool.Options{Warn: func(err error) { log.L.WithError(err).Warn("pool") }}
	all, err := x.list()
	if err != nil {
		return nil, err
	}
	var foreign error
	for _, path := range all {
		p, err := pool.Open(x.region, path, opts)
		isNew := strings.HasSuffix(path, newSuffix)
		switch {
		case err == nil && isNew:
			return x.complete(p, path)
		case err == nil:
			return p, nil
		case errors.Is(err, pool.ErrWiped) || errors.Is(err, pool.ErrForeign) && !errors.Is(err, pool.ErrVersion):
			if errors.Is(err, pool.ErrForeign) {
				foreign = err
			}
			// An incomplete index has no pool, and an index is useless once its memory was lost.
			lost := errors.Is(err, pool.ErrWiped) && x.region.Info().Persistent < region.PersistsReboot
			if x.mine(path) && (isNew || lost) {
				if err := os.Remove(path); err != nil {
					return nil, err
				}
			}
		default:
			return nil, err
		}
	}
	if foreign == nil && slices.ContainsFunc(all, x.mine) {
		x.warnWiped()
	}
	p, err := x.make(opts)
	if errors.Is(err, pool.ErrForeign) && foreign != nil {
		err = foreign
	}
	return p, err
}

// list returns the indexes below the root, those of the same kind and path first.
func (x indexes) list() ([]string, error) {
	var all []string
	for _, suffix := range []string{indexSuffix, newSuffix} {
		some, err := filepath.Glob(filepath.Join(x.dir, "*"+suffix))
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	all = slices.DeleteFunc(all, func(p string) bool { return filepath.Base(p) == oldIndex })
	slices.SortStableFunc(all, func(a, b string) int {
		switch {
		case x.mine(a) == x.mine(b):
			return 0
		case x.mine(a):
			return -1
		}
		return 1
	})
	return all, nil
}

func (x indexes) warnWiped() {
	logger := log.G(x.ctx).WithField("pool", x.region.Info().Path)
	if x.region.Info().Persistent < region.PersistsReboot {
		logger.Warn("the memory of the pool was wiped, as by a reboot; images are made again as they are needed")
		return
	}
	logger.Warn("there was a pool here, and now there is none: making a new one. The index of the old one is kept, " +
		"for the case that what the pool lies on is mounted late")
}

// make makes a pool with an index of its own.
func (x indexes) make(opts pool.Options) (*pool.Pool, error) {
	defaults := PoolOptions(x.ctx, x.config.Drivers, x.region.Info(), x.config.Pool.Windows)
	opts.Windows, opts.Device, opts.DAX = defaults.Windows, defaults.Device, choices[x.config.Pool.DAX]
	var random [4]byte
	rand.Read(random[:])
	path := filepath.Join(x.dir, x.name+"-"+hex.EncodeToString(random[:])+newSuffix)
	p, err := pool.Reset(x.region, path, opts)
	if err != nil {
		if rerr := os.Remove(path); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
		return nil, err
	}
	return x.complete(p, path)
}

// complete gives the index of a new pool its final name.
func (x indexes) complete(p *pool.Pool, path string) (*pool.Pool, error) {
	if err := os.Rename(path, strings.TrimSuffix(path, newSuffix)+indexSuffix); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// PoolOptions returns the options for a new pool: for its future driver, with windows as in
// Pool.Windows.
func PoolOptions(ctx context.Context, drivers []mount.Driver, info region.Info, windows string) pool.Options {
	o := pool.Options{Windows: choices[windows]}
	for _, e := range mount.Explain(ctx, drivers, info) {
		if e.Picked && (e.Driver == "erofs-loop" || e.Driver == "erofs-dax") {
			o.Device = pool.Yes
		}
	}
	return o
}

var choices = map[string]pool.Choice{"": pool.Auto, "auto": pool.Auto, "yes": pool.Yes, "no": pool.No}

// advice says how to fix errors of opening a pool after the configuration or the program changed.
func advice(err error, kind string) string {
	files := region.TraitsOf(kind).Regular
	switch {
	case errors.Is(err, region.ErrSize) && files:
		return "; set pool.size to the size that the pool has or leave it out, or stop all containers and make the " +
			"pool larger with `daxfs pool grow`; a smaller one is a new one: end all containers and remove the file"
	case errors.Is(err, region.ErrSize) && kind == region.KindPhys:
		return "; set pool.phys and pool.size to a range that the kernel was told to reserve, in whole 2 MiB"
	case errors.Is(err, region.ErrSize):
		return "; set pool.size to the size that the pool has, or leave it out"
	case errors.Is(err, pool.ErrVersion):
		return "; end all containers that run from it, then `daxfs pool init --force` makes an empty pool"
	case errors.Is(err, pool.ErrForeign):
		return "; if nothing needs what is there, `daxfs pool init --force` makes an empty pool"
	case errors.Is(err, pool.ErrBusy):
		return "; end what uses it, then start again"
	}
	return ""
}

// region fills in what the configuration leaves open.
func (p Pool) region(root string) (region.Config, error) {
	rc := region.Config{Kind: p.Kind, Path: p.File(root), Size: p.Size, Phys: p.Phys}
	if rc.Create = slices.Contains(region.Kinds(), rc.Kind) && !region.TraitsOf(rc.Kind).ByAddress; !rc.Create {
		return rc, nil
	}
	dir := filepath.Dir(rc.Path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return rc, err
	}
	if p.Path == "" {
		if err := checkOwnDir(dir); err != nil {
			return rc, err
		}
	}
	if rc.Size > 0 {
		return rc, nil
	}
	if st, err := os.Stat(rc.Path); err == nil && st.Size() > 0 {
		return rc, nil // the size of the existing file
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

// checkOwnDir refuses a directory that is not ours alone. Anyone can make directories in /dev/shm.
func checkOwnDir(dir string) error {
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	owner := int(st.Sys().(*syscall.Stat_t).Uid)
	if !st.IsDir() || owner != os.Geteuid() || st.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("directory %q of the pool: found %s of user %d, expected a directory of user %d that nobody "+
			"else can write to; remove it if you did not make it, or set pool.path: %w",
			dir, st.Mode(), owner, os.Geteuid(), region.ErrForeign)
	}
	return nil
}
