package region

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// pmem is a region on a persistent memory block device.
//
// A filesystem mounted with DAX from the device, or from a window of it, reads the memory itself. A
// mapping of the device node, or a plain write, would go to the page cache of the node and reach the
// memory later. O_DIRECT writes reach it before they return: the driver copies with non-temporal
// stores and drops the page cache of the range. So DAX readers see bytes at once. Only durability
// needs Sync, which flushes the device (virtio-pmem asks its host to sync).
type pmem struct {
	f    *os.File
	size int64
	info Info

	// partial serialises writes of parts of a block, which read, change and write it.
	partial sync.Mutex
}

// directBlock is the alignment of direct I/O in memory and on the device.
const directBlock = 4096

// bounce buffers are mapped, hence page aligned. They live as long as the process.
var bounce = sync.Pool{New: func() any {
	b, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	return &b
}}

func takeBounce() (*[]byte, error) {
	switch b := bounce.Get().(type) {
	case *[]byte:
		return b, nil
	case error:
		return nil, fmt.Errorf("buffer for direct I/O: %w", b)
	}
	return nil, errors.New("buffer for direct I/O: none")
}

func openPmem(h host, c Config) (_ Region, err error) {
	f, st, err := openDevice(c, unix.S_IFBLK)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	d, err := h.pmem(unix.Major(st.Rdev), unix.Minor(st.Rdev))
	if err != nil {
		return nil, err
	}
	size, err := deviceSize(d.size, c)
	if err != nil {
		return nil, err
	}
	if d.hasPhys && !c.ReadOnly {
		if err := h.checkPhys(d.phys, size, true); err != nil {
			return nil, err
		}
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, unix.O_DIRECT); err != nil {
		return nil, fmt.Errorf("direct I/O: %w", err)
	}
	return &pmem{f: f, size: size, info: Info{
		Kind: c.Kind, Path: c.Path, BlockDevice: c.Path, DAX: d.dax, Phys: d.phys, HasPhys: d.hasPhys,
		Persistent: PersistsReboot, ReadOnly: c.ReadOnly, FD: int(f.Fd()),
	}}, nil
}

func (r *pmem) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= r.size {
		return 0, io.EOF
	}
	want := min(int64(len(p)), r.size-off)
	buf, err := takeBounce()
	if err != nil {
		return 0, err
	}
	defer bounce.Put(buf)
	var n int64
	for n < want {
		at := (off + n) &^ (directBlock - 1)
		k := min(roundBlock(off+want)-at, int64(len(*buf)))
		if _, err := r.f.ReadAt((*buf)[:k], at); err != nil {
			return int(n), err
		}
		n += int64(copy(p[n:want], (*buf)[off+n-at:k]))
	}
	if want < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

func roundBlock(n int64) int64 { return (n + directBlock - 1) &^ (directBlock - 1) }

func (r *pmem) WriteAt(p []byte, off int64) (int, error) {
	if err := checkRange(off, int64(len(p)), r.size); err != nil {
		return 0, err
	}
	buf, err := takeBounce()
	if err != nil {
		return 0, err
	}
	defer bounce.Put(buf)
	var n int
	for n < len(p) {
		at := (off + int64(n)) &^ (directBlock - 1)
		head := off + int64(n) - at
		k := min(roundBlock(head+int64(len(p)-n)), int64(len(*buf)))
		part := p[n:min(len(p), n+int(k-head))]
		if err := r.writeBlocks((*buf)[:k], at, head, part); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// writeBlocks writes part at offset head of the blocks at at, which fit into buf.
func (r *pmem) writeBlocks(buf []byte, at, head int64, part []byte) error {
	if head != 0 || len(part) != len(buf) {
		r.partial.Lock()
		defer r.partial.Unlock()
		last := int64(len(buf)) - directBlock
		if _, err := r.f.ReadAt(buf[:directBlock], at); err != nil {
			return err
		}
		if _, err := r.f.ReadAt(buf[last:], at+last); err != nil {
			return err
		}
	}
	copy(buf[head:], part)
	_, err := r.f.WriteAt(buf, at)
	return err
}

// Sync flushes the whole device: no call flushes a range.
func (r *pmem) Sync(off, n int64) error {
	if err := checkRange(off, n, r.size); err != nil {
		return err
	}
	return r.f.Sync()
}

// Punch writes zeros: the memory cannot be given back.
func (r *pmem) Punch(off, n int64) error {
	if err := checkRange(off, n, r.size); err != nil {
		return err
	}
	return writeZeros(r, off, n)
}

func (r *pmem) Size() int64  { return r.size }
func (r *pmem) Info() Info   { return r.info }
func (r *pmem) Lock() error  { return Flock(r.f) }
func (r *pmem) Close() error { return r.f.Close() }
