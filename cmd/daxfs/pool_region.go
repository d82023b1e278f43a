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

// poolArgs say which pool is meant: what a user gives, and what is remembered of a mount.
type poolArgs struct {
	Pool  string `json:"pool"`
	Kind  string `json:"kind,omitempty"`
	Index string `json:"index,omitempty"`
}

// poolArgsOf are those of a command whose first argument is POOL.
func poolArgsOf(c *cli.Context) poolArgs {
	return poolArgs{Pool: c.Args().First(), Kind: c.String("kind"), Index: c.String("index")}
}

// region turns the arguments into a region.
func (a poolArgs) region(readOnly bool) (region.Config, error) {
	rc, err := regionAt(a.Kind, a.Pool)
	rc.ReadOnly = readOnly
	return rc, err
}

// open opens the memory of a pool for reading, and reads what the pool says of itself. The caller closes the memory.
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

// regionAt is the region that a POOL argument stands for, of the kind that follows from it unless one is given.
func regionAt(kind, arg string) (region.Config, error) {
	rc := region.Config{Kind: kind, Path: arg}
	if kind == "" || kind == region.KindPhys {
		if phys, ok, err := region.PhysRange(arg); err != nil {
			return rc, &usageError{"pool", err.Error()}
		} else if ok {
			// Whoever opens a pool does not take the range: init did, and had to be forced where the kernel does not reserve it.
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
		// One that is to be made is of the kind of its directory.
		dir, derr := filepath.EvalSymlinks(filepath.Dir(arg))
		if derr != nil {
			return rc, derr
		}
		info, err = fileRegion(dir)
	}
	rc.Kind = info.Kind
	return rc, err
}

// newIndex is where the index of a pool is made unless --index says so: beside a file.
func (a poolArgs) newIndex(rc region.Config) (string, error) {
	switch {
	case a.Index != "":
		return a.Index, nil
	case region.TraitsOf(rc.Kind).Regular:
		return rc.Path + ".index", nil
	}
	return "", &usageError{"pool", fmt.Sprintf("a pool of kind %q needs --index", rc.Kind)}
}

// needIndex is findIndex for a command that becomes the owner of the pool. The error names who owns it, if it is that.
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

// ownUnused becomes the owner of a pool for a moment, and fails if something uses the pool. The lock on r stays.
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

// findIndex is the index of a pool that there is: the one that was named, that beside the pool, or that of a daemon.
// It is empty if there is none: another machine has it, or another directory.
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

// indexes are where the index of a pool may be: in one place that is named or beside the pool, or in several.
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

// storeRoot is the directory of the state of a pool's store. An index that lies where a daemon puts it belongs to that
// daemon's store: what the daemon has mounted is found there. Everybody else's mounts end with the machine.
func storeRoot(index string, id string) string {
	if dir, err := filepath.Abs(filepath.Dir(index)); err == nil && filepath.Base(dir) == "pool" {
		if root := filepath.Dir(dir); fileExists(filepath.Join(root, "images")) &&
			fileExists(filepath.Join(root, "live")) {
			return root
		}
	}
	return filepath.Join(stateDir(), id)
}

// stateDir is the directory of what ends with the machine.
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
