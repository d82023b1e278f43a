package region

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// deviceSize is the size of the region on a device of size bytes. A pool leaves out the end of the
// memory, where labels may lie. A reader of another owner's pool takes everything: the owner may have
// the pool in a file without labels, and pass that file to a virtual machine.
func deviceSize(size int64, c Config) (int64, error) {
	if c.ReadOnly && c.Size == 0 {
		return usable(size)
	}
	return beforeLabels(size, c.Size)
}

// beforeLabels is the usable size of memory that may end with labels.
func beforeLabels(size, configured int64) (int64, error) {
	most, err := usable(size - labelArea)
	if err != nil {
		return 0, err
	}
	if configured == 0 {
		return most, nil
	}
	if configured > most {
		return 0,
			fmt.Errorf("configured are %d bytes, usable are %d (whole 2 MiB before the last %d KiB): %w", configured,
				most, labelArea>>10, ErrSize)
	}
	return usable(configured)
}

func openDevice(c Config, kind uint32) (*os.File, *unix.Stat_t, error) {
	flags := os.O_RDWR
	if c.ReadOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(c.Path, flags, 0)
	if err != nil {
		return nil, nil, err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	if err == nil && st.Mode&unix.S_IFMT != kind {
		want := map[uint32]string{unix.S_IFBLK: "a block device", unix.S_IFCHR: "a character device"}[kind]
		err = fmt.Errorf("is not %s: %w", want, ErrKind)
	}
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return f, &st, nil
}

// openDevDAX maps a DAX character device: loads and stores reach the memory itself.
func openDevDAX(h host, c Config) (_ Region, err error) {
	f, st, err := openDevice(c, unix.S_IFCHR)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	d, err := h.devdax(unix.Major(st.Rdev), unix.Minor(st.Rdev))
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
	// A mapping must be whole pages of the device's own size; the excess is unused.
	whole := min((size+d.align-1)/d.align*d.align, d.size)
	m, err := mapFile(f, 0, whole, c.ReadOnly)
	if err != nil {
		return nil, err
	}
	info := Info{
		Kind: c.Kind, Path: c.Path, Phys: d.phys, HasPhys: d.hasPhys, Persistent: PersistsProcess,
		ReadOnly: c.ReadOnly, FD: int(f.Fd()),
	}
	r := &mapped{f: f, m: m[:size:size], all: m, info: info}
	if d.persistent && canFlush {
		r.info.Persistent, r.sync = PersistsReboot, flush
	}
	return r, nil
}

// openPhys maps reserved physical memory through /dev/mem.
func openPhys(h host, c Config) (Region, error) {
	if c.Phys == 0 || c.Phys%Align != 0 {
		return nil, fmt.Errorf("physical address %#x is not a multiple of 2 MiB above 0: %w", c.Phys, ErrSize)
	}
	if c.Size == 0 {
		return nil, fmt.Errorf("the size of a physical range must be given: %w", ErrSize)
	}
	size, err := usable(c.Size)
	if err != nil {
		return nil, err
	}
	if err := h.checkPhys(c.Phys, size, c.Force); err != nil {
		return nil, err
	}
	flags := os.O_RDWR
	if c.ReadOnly {
		flags = os.O_RDONLY
	}
	// No O_SYNC: it would map the memory uncached.
	f, err := os.OpenFile(h.path("dev/mem"), flags, 0)
	if err != nil {
		return nil, err
	}
	m, err := mapFile(f, int64(c.Phys), size, c.ReadOnly)
	if err != nil {
		if errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("the kernel forbids it, see CONFIG_IO_STRICT_DEVMEM and iomem=relaxed: %w", err)
		}
		return nil, errors.Join(err, f.Close())
	}
	// Nobody knows whether the memory is persistent. Flush: another kernel may map it uncached.
	return &phys{mapped{f: f, m: m, all: m, sync: flush, info: Info{
		Kind: c.Kind, Path: f.Name(), Phys: c.Phys, HasPhys: true, Persistent: PersistsProcess,
		ReadOnly: c.ReadOnly, FD: -1,
	}}}, nil
}

// phys locks no file: all ranges share /dev/mem. The pool's index keeps two owners apart.
type phys struct{ mapped }

func (r *phys) Lock() error { return nil }

// heapAllocation is struct dma_heap_allocation_data of linux/dma-heap.h.
type heapAllocation struct {
	length    uint64
	fd        uint32
	fdFlags   uint32
	heapFlags uint64
}

const (
	heapIoctlAlloc = 0xc0184800 // DMA_HEAP_IOCTL_ALLOC
	bufIoctlSync   = 0x40086200 // DMA_BUF_IOCTL_SYNC
	bufSyncWrite   = 2          // DMA_BUF_SYNC_WRITE
	bufSyncEnd     = 4          // DMA_BUF_SYNC_END
)

func ioctl(fd int, req uint, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(arg))
		switch errno {
		case 0:
			return nil
		case unix.EINTR, unix.EAGAIN:
			continue
		}
		return errno
	}
}

// openDMABuf allocates a buffer from a DMA heap, or uses an existing one by its descriptor.
func openDMABuf(c Config) (Region, error) {
	if c.FD > 0 {
		fd, err := unix.FcntlInt(uintptr(c.FD), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("descriptor %d: %w", c.FD, err)
		}
		size, err := unix.Seek(fd, 0, unix.SEEK_END)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("size of descriptor %d: %w", c.FD, err), unix.Close(fd))
		}
		return mapDMABuf(c, fd, size)
	}
	size, err := usable(c.Size)
	if err != nil {
		return nil, fmt.Errorf("the size of a buffer must be given: %w", err)
	}
	heap, err := os.OpenFile(c.Path, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer heap.Close()
	a := heapAllocation{length: uint64(size), fdFlags: unix.O_RDWR | unix.O_CLOEXEC}
	if err := ioctl(int(heap.Fd()), heapIoctlAlloc, unsafe.Pointer(&a)); err != nil {
		return nil, fmt.Errorf("take %d bytes from the heap: %w", size, err)
	}
	return mapDMABuf(c, int(a.fd), size)
}

// mapDMABuf turns a buffer into a region, which owns the descriptor.
func mapDMABuf(c Config, fd int, size int64) (Region, error) {
	f := os.NewFile(uintptr(fd), c.Path)
	size, err := usable(size)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	m, err := mapFile(f, 0, size, c.ReadOnly)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	r := &mapped{
		f: f, m: m, all: m,
		info: Info{Kind: c.Kind, Path: c.Path, Persistent: PersistsNothing, ReadOnly: c.ReadOnly, FD: fd},
	}
	r.access = func(begin bool) error {
		flags := uint64(bufSyncWrite)
		if !begin {
			flags |= bufSyncEnd
		}
		err := ioctl(fd, bufIoctlSync, unsafe.Pointer(&flags))
		if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) {
			return nil // not a dma-buf but other shareable memory, such as a memfd: coherent
		}
		return err
	}
	return r, nil
}
