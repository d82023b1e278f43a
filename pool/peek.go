package pool

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool/internal/alloc"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Peek is the content of a pool's index for a process that does not own the pool.
type Peek struct {
	ID         [16]byte // of the pool
	Generation uint64
	Layers     int
	// Images are in no order. Some may wait for readers, unlisted in the catalogue.
	Images   []Image
	Metadata int64 // of the live tree and of windows, and documents
	// Extents is the size of the contents that layers and images hold, each counted once, in whole pages.
	Extents     int64
	ExtentCount int
	// Dead is the size of the contents that nothing holds and that are not free yet.
	Dead      int64
	DeadCount int
	// Records are the records of the store above, by kind and key.
	Records map[string]map[string][]byte
}

// ReadIndex reads an index that no process has open. It neither locks nor changes it, so an owner can
// start meanwhile. size is the pool's. Errors: region.ErrBusy if there is an owner, which alone knows
// the current state.
func ReadIndex(path string, size int64) (*Peek, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	defer f.Close()
	before, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	if pid := region.LockHolder(path); pid != 0 {
		return nil, &region.BusyError{Path: path, PID: pid}
	}
	db, err := openCopy(f)
	if err != nil {
		return nil, fmt.Errorf("index %q: %w: %w", path, ErrCorrupt, err)
	}
	defer db.Close()
	var p *Peek
	err = safely(path, func() error {
		p, err = peek(&index{db: db, path: path}, size)
		return err
	})
	after, serr := f.Stat()
	pid := region.LockHolder(path)
	if serr != nil {
		return nil, fmt.Errorf("index: %w", serr)
	}
	if pid != 0 || !after.ModTime().Equal(before.ModTime()) || after.Size() != before.Size() {
		return nil, &region.BusyError{Path: path, PID: pid} // changed while it was copied
	}
	return p, err
}

// openCopy opens a copy of a database in memory, because bbolt locks every file that it opens.
func openCopy(f *os.File) (*bbolt.DB, error) {
	open := func(string, int, os.FileMode) (*os.File, error) {
		fd, err := unix.MemfdCreate("daxfs-index", unix.MFD_CLOEXEC)
		if err != nil {
			return nil, os.NewSyscallError("memfd_create", err)
		}
		m := os.NewFile(uintptr(fd), f.Name())
		if _, err := io.Copy(m, f); err != nil {
			return nil, errors.Join(err, m.Close())
		}
		return m, nil
	}
	return bbolt.Open(f.Name(), 0o600, &bbolt.Options{ReadOnly: true, OpenFile: open})
}

// safely reads a database that may have been copied during a change, and turns panics into errors.
func safely(path string, read func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("index %q: %w: %v", path, ErrCorrupt, r)
		}
	}()
	return read()
}

func peek(x *index, size int64) (p *Peek, err error) {
	c, err := x.load(size)
	if err != nil {
		return nil, err
	}
	p = &Peek{ID: c.id, Generation: c.gen, Layers: len(c.layers), Records: map[string]map[string][]byte{}}
	p.Metadata = c.tree.used()
	for _, m := range c.images {
		p.Images = append(p.Images, m.Image)
		p.Metadata += m.Segment + alloc.RoundUnit(m.Document.Size)
	}
	p.count(c)
	var kinds []string
	err = x.db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketRecords)
		if b == nil {
			return nil
		}
		return b.ForEachBucket(func(k []byte) error {
			kinds = append(kinds, string(k))
			return nil
		})
	})
	for _, kind := range kinds {
		if err == nil {
			p.Records[kind], err = x.records(kind)
		}
	}
	return p, err
}

// count adds up the held and the dead extents.
func (p *Peek) count(c *contents) {
	held := map[int64]bool{}
	for _, lists := range []map[string][]extentID{c.layers, c.used} {
		for _, ids := range lists {
			for _, e := range ids {
				if !held[e.off] {
					held[e.off] = true
					p.Extents += alloc.RoundUnit(e.size)
					p.ExtentCount++
				}
			}
		}
	}
	for _, run := range c.runs {
		for _, in := range run {
			if in.size > 0 && !held[in.off] {
				held[in.off] = true
				p.Dead += alloc.RoundUnit(in.size)
				p.DeadCount++
			}
		}
	}
}
