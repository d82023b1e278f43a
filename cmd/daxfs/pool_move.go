package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// poolMoved is the output of pool move --json.
type poolMoved struct {
	From  string `json:"from"`
	To    string `json:"to"`
	Index string `json:"index"` // its path after the move
}

func (e *env) poolMove(c *cli.Context) error {
	if err := needArgs(c, "POOL", "PATH"); err != nil {
		return err
	}
	a := poolArgsOf(c)
	rc, err := a.region(false)
	if err != nil {
		return err
	}
	to, err := filepath.Abs(c.Args().Get(1))
	if err != nil {
		return err
	}
	if err := canMove(rc, to); err != nil {
		return err
	}
	cat, err := catalogue(rc)
	if err != nil {
		return fmt.Errorf("%s: %w", a.Pool, err)
	}
	index, err := a.needIndex(rc, cat)
	if err != nil {
		return err
	}
	if rc.Path, err = filepath.Abs(rc.Path); err != nil {
		return err
	}
	r, err := region.Open(rc)
	if err != nil {
		return err
	}
	defer r.Close()
	// As the owner, because then nobody else changes the pool. Pending writes are done.
	if err := e.ownUnused(r, index); err != nil {
		return err
	}
	m := move{from: rc.Path, to: to}
	if index == rc.Path+".index" {
		m.index = index
		index = to + ".index"
	}
	if err := m.run(c.Context); err != nil {
		return err
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, poolMoved{m.from, m.to, index})
	}
	_, err = fmt.Fprintf(e.stdout, "%s is now %s; a daemon that is to use it needs pool.path = %q\n",
		printable(m.from), printable(m.to), m.to)
	return err
}

// canMove returns an error if a pool cannot be moved to a path, whatever its contents.
func canMove(rc region.Config, to string) error {
	if !region.TraitsOf(rc.Kind).Regular {
		return fmt.Errorf("pool of kind %q: only files are moved; put its images into another pool: %w", rc.Kind,
			pool.ErrInvalid)
	}
	for _, path := range []string{to, to + ".index"} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%q: %w", path, errors.Join(err, fs.ErrExist))
		}
	}
	there, err := fileRegion(filepath.Dir(to))
	if err != nil {
		return err
	}
	if there.Kind != rc.Kind {
		return fmt.Errorf("%q would be a pool of kind %q and not %q, which is made in another way: %w",
			to, there.Kind, rc.Kind, pool.ErrInvalid)
	}
	return nil
}

// move moves a file, and the index beside it if there is one. After an error both are at their old place.
type move struct{ from, to, index string }

func (m move) run(ctx context.Context) error {
	err := os.Rename(m.from, m.to)
	if err == nil {
		if m.index == "" {
			return nil
		}
		if err := os.Rename(m.index, m.to+".index"); err != nil {
			return errors.Join(err, os.Rename(m.to, m.from))
		}
		return nil
	}
	if !errors.Is(err, unix.EXDEV) {
		return err
	}
	return m.copy(ctx)
}

// copy moves to another file system. It removes the old files when the new ones are durable.
func (m move) copy(ctx context.Context) (err error) {
	files := map[string]string{m.from: m.to}
	if m.index != "" {
		files[m.index] = m.to + ".index"
	}
	var need int64
	for from := range files {
		var st unix.Stat_t
		if err := unix.Stat(from, &st); err != nil {
			return &fs.PathError{Op: "stat", Path: from, Err: err}
		}
		need += st.Blocks * 512
	}
	if have := free(filepath.Dir(m.to)); uint64(need) > have {
		return fmt.Errorf("%q takes %d bytes, and the file system of %q has %d free: %w", m.from, need, m.to,
			have, unix.ENOSPC)
	}
	defer func() {
		if err != nil {
			for _, to := range files {
				if rerr := os.Remove(to); !errors.Is(rerr, fs.ErrNotExist) {
					err = errors.Join(err, rerr)
				}
			}
		}
	}()
	for from, to := range files {
		if err := copySparse(ctx, from, to); err != nil {
			return err
		}
	}
	for from := range files {
		if err := os.Remove(from); err != nil {
			return fmt.Errorf("%q is copied to %q, and stays: %w", from, m.to, err)
		}
	}
	return nil
}

// copySparse copies a file to a new one and keeps its holes.
func copySparse(ctx context.Context, from, to string) (err error) {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	st, err := src.Stat()
	if err != nil {
		return err
	}
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, st.Mode().Perm())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	if err := dst.Truncate(st.Size()); err != nil {
		return err
	}
	for at := int64(0); at < st.Size(); {
		data, err := src.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // only a hole is left
			break
		}
		if err != nil {
			return err
		}
		end, err := src.Seek(data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		for at = data; at < end; {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(end-at, 64<<20)
			if _, err := io.Copy(io.NewOffsetWriter(dst, at), io.NewSectionReader(src, at, n)); err != nil {
				return err
			}
			at += n
		}
	}
	return dst.Sync()
}
