package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// poolArgs select a pool: the user's arguments, or those recorded for a mount.
type poolArgs struct {
	Pool  string `json:"pool"`
	Kind  string `json:"kind,omitempty"`
	Index string `json:"index,omitempty"`
}

// poolArgsOf returns the poolArgs of a command whose first argument is POOL.
func poolArgsOf(c *cli.Context) poolArgs {
	return poolArgs{Pool: c.Args().First(), Kind: c.String("kind"), Index: c.String("index")}
}

func (a poolArgs) region(readOnly bool) (region.Config, error) {
	rc, err := regionAt(a.Kind, a.Pool)
	rc.ReadOnly = readOnly
	return rc, err
}

// open opens the memory of a pool for reading, and reads its catalogue. The caller closes the memory.
func (a poolArgs) open() (region.Region, *pool.Catalogue, error) {
	rc, err := a.region(true)
	if err != nil {
		return nil, nil, err
	}
	r, err := region.Open(rc)
	if err != nil {
		return nil, nil, err
	}
	cat, err := pool.ReadCatalogue(r)
	if err != nil {
		r.Close()
		return nil, nil, fmt.Errorf("%s: %w", a.Pool, err)
	}
	return r, cat, nil
}

// regionAt returns the region of a POOL argument. Its kind follows from the argument unless kind is set.
func regionAt(kind, arg string) (region.Config, error) {
	rc := region.Config{Kind: kind, Path: arg}
	if kind == "" || kind == region.KindPhys {
		if phys, ok, err := region.PhysRange(arg); err != nil {
			return rc, &usageError{"pool", err.Error()}
		} else if ok {
			// Opening a pool does not reserve the range: init did, with force if the kernel does not reserve it.
			phys.Force = true
			return phys, nil
		}
	}
	if kind != "" {
		if !slices.Contains(region.Kinds(), kind) {
			kinds := strings.Join(region.Kinds(), ", ")
			return rc, &usageError{"pool", fmt.Sprintf("--kind %q, expected one of %s", kind, kinds)}
		}
		return rc, nil
	}
	info, err := describe("/", arg)
	if errors.Is(err, os.ErrNotExist) {
		// A new file has the kind of its directory.
		dir, derr := filepath.EvalSymlinks(filepath.Dir(arg))
		if derr != nil {
			return rc, derr
		}
		info, err = fileRegion(dir)
	}
	rc.Kind = info.Kind
	return rc, err
}

// newIndex returns the path of a new pool's index: beside a file, unless --index is given.
func (a poolArgs) newIndex(rc region.Config) (string, error) {
	switch {
	case a.Index != "":
		return a.Index, nil
	case region.TraitsOf(rc.Kind).Regular:
		return rc.Path + ".index", nil
	}
	return "", &usageError{"pool", fmt.Sprintf("a pool of kind %q needs --index", rc.Kind)}
}

// needIndex is findIndex for a command that becomes the owner of the pool. Its error names the current owner, if any.
func (a poolArgs) needIndex(rc region.Config, cat *pool.Catalogue) (string, error) {
	index := a.findIndex(rc, cat)
	if index != "" {
		return index, nil
	}
	if pid := ownerOf(rc); pid != 0 {
		return "", fmt.Errorf("%s: %w; stop it first", a.Pool, &region.BusyError{Path: rc.Path, PID: pid})
	}
	return "", fmt.Errorf("%s: %w", a.Pool, errNoIndex)
}

// ownUnused briefly becomes the owner of a pool, and fails if something uses the pool. It keeps the lock on r.
func (e *env) ownUnused(r region.Region, index string) error {
	p, err := pool.Open(r, index, e.poolOptions())
	if err != nil {
		return err
	}
	if err := region.InUse(r); err != nil {
		return errors.Join(fmt.Errorf("%w; unmount it first", err), p.Close())
	}
	return p.Close()
}

// findIndex returns the index of an existing pool: the one given, the one beside the pool, or a
// daemon's. It returns "" if it finds none: the index is on another machine or in another directory.
func (a poolArgs) findIndex(rc region.Config, cat *pool.Catalogue) string {
	sure, candidates := a.indexes(rc)
	if sure != "" {
		return sure
	}
	for _, path := range candidates {
		peeked, err := pool.ReadIndex(path, cat.Size)
		if err == nil && peeked.ID == cat.PoolID {
			return path
		}
	}
	return ""
}

// indexes returns where the index of a pool may be: one sure place, given or beside the pool, or several candidates.
func (a poolArgs) indexes(rc region.Config) (sure string, candidates []string) {
	if a.Index != "" {
		return a.Index, nil
	}
	if rc.Path != "" {
		if beside := rc.Path + ".index"; fileExists(beside) {
			return beside, nil
		}
		candidates, _ = filepath.Glob(filepath.Join(filepath.Dir(rc.Path), "*.db"))
	}
	daemons, _ := filepath.Glob(filepath.Join(defaultRoot, "pool", "*.db"))
	return "", append(candidates, daemons...)
}

// storeRoot returns the state directory of a pool's store. An index at a daemon's path belongs to that
// daemon's store, whose root also has the daemon's mounts. All other mounts end with the machine.
func storeRoot(index string, id string) string {
	if dir, err := filepath.Abs(filepath.Dir(index)); err == nil && filepath.Base(dir) == "pool" {
		if root := filepath.Dir(dir); fileExists(filepath.Join(root, "images")) &&
			fileExists(filepath.Join(root, "live")) {
			return root
		}
	}
	return filepath.Join(stateDir(), id)
}

// stateDir returns the directory of state that ends with the machine.
func stateDir() string {
	if os.Geteuid() == 0 {
		return "/run/daxfs"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "daxfs")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("daxfs-%d", os.Geteuid()))
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
