package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"os"

	"github.com/docker/go-units"
	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// poolGrown is the output of pool grow --json.
type poolGrown struct {
	ID     string     `json:"id"`
	Before int64      `json:"before"` // size in bytes
	Usage  pool.Usage `json:"usage"`
}

func (e *env) poolGrow(c *cli.Context) error {
	if err := needArgs(c, "POOL", "SIZE"); err != nil {
		return err
	}
	size, err := units.RAMInBytes(c.Args().Get(1))
	if err != nil || size <= 0 || size == math.MaxInt64 {
		return wrongUse(c, "SIZE %q, expected a size like 64m or 2g", c.Args().Get(1))
	}
	size &^= region.Align - 1
	a := poolArgsOf(c)
	rc, err := a.region(false)
	if err != nil {
		return err
	}
	if !region.TraitsOf(rc.Kind).Regular {
		return fmt.Errorf("pool of kind %q: only files grow; a pool on a device has the size of the device: %w",
			rc.Kind, pool.ErrInvalid)
	}
	cat, err := catalogue(rc)
	if err != nil {
		return fmt.Errorf("%s: %w", a.Pool, err)
	}
	if err := canGrow(cat.Size, size); err != nil {
		return fmt.Errorf("%s: %w", a.Pool, err)
	}
	if d := dialControl(c.String("control")); d.owns(c.Context, hex.EncodeToString(cat.PoolID[:])) {
		return fmt.Errorf("%s: %w: the daemon has it mounted, and the kernel remembers how large it is; "+
			"stop the daemon and its containers, then grow it", a.Pool, pool.ErrBusy)
	}
	index, err := a.needIndex(rc, cat)
	if err != nil {
		return err
	}
	if err := noReaders(index, cat.Size); err != nil {
		return fmt.Errorf("%s: %w", a.Pool, err)
	}
	usage, err := e.grow(rc, index, cat.Size, size)
	if err != nil {
		return fmt.Errorf("%s: %w", a.Pool, err)
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, poolGrown{ID: hex.EncodeToString(cat.PoolID[:]), Before: cat.Size, Usage: usage})
	}
	_, err = fmt.Fprintf(e.stdout,
		"%s: %s, was %s; a daemon with pool.size in its configuration needs the new one there\n",
		printable(a.Pool), human(usage.Size), human(cat.Size))
	return err
}

// canGrow returns an error if a pool cannot grow from one size to another.
func canGrow(from, to int64) error {
	switch {
	case to == from:
		return fmt.Errorf("it has %d bytes (%s) already: %w", from, human(from), pool.ErrInvalid)
	case to < from:
		return fmt.Errorf("it has %d bytes (%s) and does not shrink to %d: put its images into a new pool: %w",
			from, human(from), to, pool.ErrInvalid)
	case to > pool.MaxSize:
		return fmt.Errorf("%d bytes are more than a pool can have, which is %d: %w", to, int64(pool.MaxSize),
			pool.ErrInvalid)
	}
	return nil
}

// noReaders returns an error if other kernels use the pool, because they remember its size.
func noReaders(index string, size int64) error {
	peeked, err := pool.ReadIndex(index, size)
	if err != nil {
		return err
	}
	users, err := store.PeekReaders(peeked)
	if err != nil {
		return fmt.Errorf("its readers are not known: %w", err)
	}
	for _, u := range users {
		if n := len(u.Images) + len(u.Earlier) + u.Torn; n > 0 {
			return fmt.Errorf("%w: reader %q (%s) has %d claims, and its kernel remembers how large the pool is; "+
				"stop it, and release it with `daxfs pool release` if it does not do so itself",
				pool.ErrBusy, u.Reader, u.Region, n)
		}
	}
	return nil
}

// grow enlarges a file and the pool in it. After an error the file has the size that the pool records.
func (e *env) grow(rc region.Config, index string, from, to int64) (u pool.Usage, err error) {
	st, err := os.Stat(rc.Path)
	if err != nil {
		return u, err
	}
	if st.Size() > to {
		return u, fmt.Errorf("the file has %d bytes already, more than %d: %w", st.Size(), to, pool.ErrInvalid)
	}
	if st.Size()&^(region.Align-1) == from { // otherwise an interrupted command enlarged the file
		if err := e.tryOwn(rc, index); err != nil {
			return u, err
		}
	}
	if err := os.Truncate(rc.Path, to); err != nil {
		return u, err
	}
	defer func() {
		if cat, cerr := catalogue(rc); err != nil && cerr == nil && cat.Size == from {
			err = errors.Join(err, os.Truncate(rc.Path, st.Size()))
		}
	}()
	r, err := region.Open(rc)
	if err != nil {
		return u, err
	}
	defer r.Close()
	p, err := pool.Grow(r, index, e.poolOptions())
	if err != nil {
		return u, err
	}
	return p.Usage(), p.Close()
}

// tryOwn returns an error if this process cannot become the owner of the pool or if something uses the pool.
func (e *env) tryOwn(rc region.Config, index string) error {
	r, err := region.Open(rc)
	if err != nil {
		return err
	}
	defer r.Close()
	return e.ownUnused(r, index)
}
