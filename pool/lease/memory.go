package lease

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// memory is the memory of a lease region. All implementations keep this contract: bytes passed to
// store are visible to every load that begins after store returns, on every machine that has the
// memory. No later load of this process runs before that.
type memory interface {
	load(b []byte, off int64) error
	store(b []byte, off int64) error
	// file returns the file to lock and the region's offset in it; nil if nothing can be locked.
	file() (f *os.File, off int64)
	size() int64
	close() error
}

// place is the location of a lease region: a whole file or device, or a range of it.
type place struct {
	path      string
	off, size int64 // size 0 means everything after off
}

// parsePlace parses "PATH", "PATH@OFFSET+SIZE" and, for physical memory, "ADDRESS+SIZE".
func parsePlace(spec string) (place, error) {
	at, rest := "", ""
	p := place{path: spec}
	if i := strings.LastIndexByte(spec, '@'); i >= 0 && strings.HasPrefix(spec, "/") {
		p.path, rest = spec[:i], spec[i+1:]
	} else if !strings.HasPrefix(spec, "/") {
		p.path, rest = "/dev/mem", spec
	}
	if rest == "" && spec != "" {
		return p, nil
	}
	at, length, found := strings.Cut(rest, "+")
	off, err := strconv.ParseInt(at, 0, 64)
	n, err2 := strconv.ParseInt(length, 0, 64)
	if !found || err != nil || err2 != nil || off < 0 || n < MinSize || off%headerSize != 0 || n%headerSize != 0 {
		return p,
			fmt.Errorf("lease region %q: expected an absolute path, PATH@OFFSET+SIZE or ADDRESS+SIZE with "+
				"multiples of %d, at least %d long",
				spec, headerSize, MinSize)
	}
	p.off, p.size = off, n
	return p, nil
}

// Within reports whether a lease region, named as for Open and NewRegions, lies in the first size
// bytes of a pool's memory. There, pool and reader would overwrite each other.
func Within(spec string, mem region.Info, size int64) (bool, error) {
	p, err := parsePlace(strings.TrimPrefix(spec, launched))
	if err != nil {
		return false, err
	}
	if p.path == "/dev/mem" {
		from, to := uint64(p.off), uint64(p.off+p.size)
		return mem.HasPhys && from < mem.Phys+uint64(size) && to > mem.Phys, nil
	}
	a, err := os.Stat(p.path)
	if err != nil || mem.Path == "" {
		return false, nil // a missing file overlaps nothing
	}
	b, err := os.Stat(mem.Path)
	return err == nil && os.SameFile(a, b) && p.off < size, nil
}

// openMemory opens a region for reading, or for writing too.
func openMemory(spec string, write bool) (_ memory, err error) {
	p, err := parsePlace(spec)
	if err != nil {
		return nil, err
	}
	flags := os.O_RDONLY
	if write {
		flags = os.O_RDWR
	}
	f, err := os.OpenFile(p.path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("lease region: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("lease region %q: %w", spec, err), f.Close())
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return openFile(f, p, st.Size)
	case unix.S_IFBLK:
		return openBlock(f, p)
	case unix.S_IFCHR:
		return openMapped(f, p, st.Rdev, write)
	}
	return nil, fmt.Errorf("is neither a file nor a device: %w", region.ErrKind)
}

// fit returns the size of the region in total available bytes.
func (p place) fit(total int64) (int64, error) {
	n := total - p.off
	if p.size > 0 {
		if p.size > n {
			return 0, fmt.Errorf("%d bytes at %d of %d: %w", p.size, p.off, total, region.ErrSize)
		}
		n = p.size
	}
	if n < MinSize {
		return 0, fmt.Errorf("%d bytes, expected at least %d: %w", n, MinSize, region.ErrSize)
	}
	return min(n, MaxSize), nil
}

// fileMemory is a range of a regular file. Processes of one kernel, and virtual machines that map the
// file as virtio-pmem, see each other's writes in its page cache.
type fileMemory struct {
	f      *os.File
	off, n int64
}

func openFile(f *os.File, p place, total int64) (memory, error) {
	n, err := p.fit(total)
	if err != nil {
		return nil, err
	}
	return &fileMemory{f: f, off: p.off, n: n}, nil
}

func (m *fileMemory) load(b []byte, off int64) error {
	region.Fence()
	_, err := m.f.ReadAt(b, m.off+off)
	return err
}

func (m *fileMemory) store(b []byte, off int64) error {
	_, err := m.f.WriteAt(b, m.off+off)
	region.Fence()
	return err
}

func (m *fileMemory) file() (*os.File, int64) { return m.f, m.off }
func (m *fileMemory) size() int64             { return m.n }
func (m *fileMemory) close() error            { return m.f.Close() }

// blockMemory is a persistent memory block device: virtio-pmem in a guest. It uses direct I/O, because
// nobody else sees the page cache of the device node. The driver copies from and to the memory before
// the call returns.
type blockMemory struct {
	fileMemory
	mu  sync.Mutex
	buf []byte // aligned for direct I/O
}

func openBlock(f *os.File, p place) (memory, error) {
	total, err := f.Seek(0, 2)
	if err != nil {
		return nil, err
	}
	n, err := p.fit(total)
	if err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, unix.O_DIRECT); err != nil {
		return nil, fmt.Errorf("direct I/O: %w", err)
	}
	buf, err := unix.Mmap(-1, 0, headerSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("buffer for direct I/O: %w", err)
	}
	return &blockMemory{fileMemory: fileMemory{f: f, off: p.off, n: n}, buf: buf}, nil
}

func (m *blockMemory) load(b []byte, off int64) error {
	return m.blocks(b, off, func(part, block []byte, _ int64) error {
		copy(part, block)
		return nil
	})
}

// store reads and writes whole blocks: nobody else writes the surrounding bytes.
func (m *blockMemory) store(b []byte, off int64) error {
	return m.blocks(b, off, func(part, block []byte, at int64) error {
		copy(block, part)
		return m.fileMemory.store(m.buf, at)
	})
}

// blocks reads each block that b touches, and calls f with both matching parts and the offset.
func (m *blockMemory) blocks(b []byte, off int64, f func(part, block []byte, at int64) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(b) > 0 {
		at := off &^ (headerSize - 1)
		if err := m.fileMemory.load(m.buf, at); err != nil {
			return err
		}
		part := b[:min(int64(len(b)), headerSize-(off-at))]
		if err := f(part, m.buf[off-at:][:len(part)], at); err != nil {
			return err
		}
		b, off = b[len(part):], off+int64(len(part))
	}
	return nil
}

func (m *blockMemory) close() error { return errors.Join(unix.Munmap(m.buf), m.f.Close()) }

// mappedMemory is a DAX device or physical memory, reached by loads and stores. Other machines may not
// see the cache of this processor, and their stores do not update it. So lines are written back after
// a store and dropped before a load.
type mappedMemory struct {
	f   *os.File
	off int64
	all []byte
	m   []byte
}

func openMapped(f *os.File, p place, rdev uint64, write bool) (memory, error) {
	total := p.off + p.size
	if p.path != "/dev/mem" {
		raw, err := os.ReadFile(fmt.Sprintf("/sys/dev/char/%d:%d/size", unix.Major(rdev), unix.Minor(rdev)))
		if err != nil {
			return nil, fmt.Errorf("is not a DAX device: %w: %w", region.ErrKind, err)
		}
		if total, err = strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64); err != nil {
			return nil, fmt.Errorf("size of the device: %w", err)
		}
	}
	n, err := p.fit(total)
	if err != nil {
		return nil, err
	}
	prot := unix.PROT_READ
	if write {
		prot |= unix.PROT_WRITE
	}
	// A DAX device is mapped in whole pages of its own size.
	for _, align := range []int64{headerSize, 2 << 20, 1 << 30} {
		lo := p.off &^ (align - 1)
		hi := (p.off + n + align - 1) &^ (align - 1)
		all, merr := unix.Mmap(int(f.Fd()), lo, int(hi-lo), prot, unix.MAP_SHARED)
		if merr == nil {
			return &mappedMemory{f: f, off: p.off, all: all, m: all[p.off-lo:][:n:n]}, nil
		}
		err = merr
	}
	return nil, fmt.Errorf("map %d bytes at %#x: %w", n, p.off, err)
}

func (m *mappedMemory) load(b []byte, off int64) error {
	return region.Guard(func() {
		from := m.m[off:][:len(b)]
		region.FlushShared(from)
		copy(b, from)
	})
}

func (m *mappedMemory) store(b []byte, off int64) error {
	return region.Guard(func() {
		to := m.m[off:][:len(b)]
		copy(to, b)
		region.FlushShared(to)
	})
}

// file returns nothing for physical memory: all ranges share one file.
func (m *mappedMemory) file() (*os.File, int64) {
	if m.f.Name() == "/dev/mem" {
		return nil, 0
	}
	return m.f, m.off
}

func (m *mappedMemory) size() int64  { return int64(len(m.m)) }
func (m *mappedMemory) close() error { return errors.Join(unix.Munmap(m.all), m.f.Close()) }
