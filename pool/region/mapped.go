package region

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// mapped is a region written through its mapping: others see bytes at once, in the order of stores.
type mapped struct {
	f    *os.File // may be nil
	m    []byte   // the region
	all  []byte   // the mapping, which may be larger
	info Info
	// punch frees a range inside the region; nil clears it.
	punch func(off, n int64) error
	// sync makes a range durable, for kinds that need it.
	sync func(b []byte) error
	// access brackets stores, which a dma-buf needs; else nil.
	access func(begin bool) error
}

// mapFile maps size bytes of a file at off.
func mapFile(f *os.File, off, size int64, readOnly bool) ([]byte, error) {
	prot := unix.PROT_READ
	if !readOnly {
		prot |= unix.PROT_WRITE
	}
	m, err := unix.Mmap(int(f.Fd()), off, int(size), prot, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes at %#x: %w", size, off, err)
	}
	return m, nil
}

func (r *mapped) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 || off >= int64(len(r.m)) {
		return 0, io.EOF
	}
	if err := Guard(func() { n = copy(p, r.m[off:]) }); err != nil {
		return 0, err
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (r *mapped) WriteAt(p []byte, off int64) (int, error) {
	if err := r.store(off, int64(len(p)), func(to []byte) { copy(to, p) }); err != nil {
		return 0, err
	}
	return len(p), nil
}

// store lets f write to a range of the mapping.
func (r *mapped) store(off, n int64, f func(to []byte)) (err error) {
	if err := checkRange(off, n, r.Size()); err != nil {
		return err
	}
	if r.info.ReadOnly {
		return &os.PathError{Op: "write", Path: r.info.Path, Err: unix.EBADF}
	}
	if r.access != nil {
		if err := r.access(true); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, r.access(false)) }()
	}
	return Guard(func() { f(r.m[off : off+n]) })
}

func (r *mapped) Punch(off, n int64) error {
	if r.punch != nil {
		if err := checkRange(off, n, r.Size()); err != nil {
			return err
		}
		return r.punch(off, n)
	}
	return r.store(off, n, func(to []byte) { clear(to) })
}

func (r *mapped) Sync(off, n int64) error {
	if err := checkRange(off, n, r.Size()); err != nil || r.sync == nil {
		return err
	}
	return r.sync(r.m[off : off+n])
}

func (r *mapped) Size() int64 { return int64(len(r.m)) }
func (r *mapped) Info() Info  { return r.info }

// Lock locks the file of the region. A dma-buf needs no lock: nobody else can open it.
func (r *mapped) Lock() error {
	if r.f == nil || r.info.Kind == KindDMABuf {
		return nil
	}
	return Flock(r.f)
}

func (r *mapped) Close() error {
	var err error
	if r.all != nil {
		err = unix.Munmap(r.all)
		r.m, r.all = nil, nil
	}
	if r.f != nil {
		err = errors.Join(err, r.f.Close())
		r.f = nil
	}
	return err
}
