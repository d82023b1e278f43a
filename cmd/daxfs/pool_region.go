package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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

// regionAt is the region that a POOL argument stands for, of the kind that follows from it unless one is given.
func regionAt(kind, arg string) (region.Config, error) {
	rc := region.Config{Kind: kind, Path: arg}
	addr, size, ok := strings.Cut(arg, "+")
	if ok && (kind == "" || kind == region.KindPhys) && !strings.Contains(arg, "/") {
		phys, err1 := strconv.ParseUint(addr, 0, 64)
		n, err2 := strconv.ParseInt(size, 0, 64)
		if err := errors.Join(err1, err2); err != nil {
			return rc, &usageError{"pool", fmt.Sprintf("physical range %q, expected ADDRESS+SIZE: %v", arg, err)}
		}
		// Whoever opens a pool does not take the range: init did, and had to be forced where the kernel does not reserve it.
		return region.Config{Kind: region.KindPhys, Phys: phys, Size: n, Force: true}, nil
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
	case rc.Kind == region.KindFile || rc.Kind == region.KindTmpfs:
		return rc.Path + ".index", nil
	}
	return "", &usageError{"pool", fmt.Sprintf("a pool of kind %q needs --index", rc.Kind)}
}

// findIndex is the index of a pool that there is: the one that was named, that beside the pool, or that of a daemon.
// It is empty if there is none: another machine has it, or another directory.
func (a poolArgs) findIndex(rc region.Config, cat *pool.Catalogue) string {
	if a.Index != "" {
		return a.Index
	}
	var candidates []string
	if rc.Path != "" {
		if beside := rc.Path + ".index"; fileExists(beside) {
			return beside
		}
		candidates, _ = filepath.Glob(filepath.Join(filepath.Dir(rc.Path), "*.db"))
	}
	daemons, _ := filepath.Glob(filepath.Join(defaultRoot, "pool", "*.db"))
	for _, path := range append(candidates, daemons...) {
		peeked, err := pool.ReadIndex(path, cat.Size)
		if err == nil && peeked.ID == cat.PoolID {
			return path
		}
	}
	return ""
}

// storeRoot is the directory of the state of a pool's store. An index that lies where a daemon puts it belongs to that
// daemon's store: what the daemon has mounted is found there. Everybody else's mounts end with the machine.
func storeRoot(index string, id string) string {
	if dir, err := filepath.Abs(filepath.Dir(index)); err == nil && filepath.Base(dir) == "pool" {
		if root := filepath.Dir(dir); fileExists(filepath.Join(root, "images")) && fileExists(filepath.Join(root, "live")) {
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
