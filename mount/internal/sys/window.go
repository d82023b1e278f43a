package sys

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const blockSize = 4096

// Mapping is a window of a file or device in memory, read-only and shared. Reading past the end of a
// file that shrank is a fault: callers use debug.SetPanicOnFault and recover.
type Mapping struct {
	all []byte // the whole mapping, for munmap(2)
	// Window holds exactly the bytes asked for. It must not be used after Close.
	Window []byte
}

// MapWindow maps [off, off+size) of the file at path. The path "/dev/fd/N" means descriptor N of this
// process, for files without a name such as a dma-buf; the descriptor stays open.
func MapWindow(path string, off, size int64) (*Mapping, error) {
	if off < 0 || size <= 0 || off%blockSize != 0 || size > 1<<46 {
		return nil,
			fmt.Errorf("window %d+%d of %q: expected an offset that is a multiple of %d and a positive size", off, size,
				path, blockSize)
	}
	f, err := openPath(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Mode().IsRegular() && st.Size() < off+size {
		return nil, fmt.Errorf("window %d+%d of %q: the file has %d bytes only", off, size, path, st.Size())
	}
	if st.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice {
		// The page cache of a block device may be older than its memory, which other kernels write, too. Pages
		// that are mapped elsewhere stay in the cache.
		_ = unix.Fadvise(int(f.Fd()), off, size, unix.FADV_DONTNEED)
	}
	m, err := mapRange(int(f.Fd()), off, size)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOMEM) {
		// Files of huge pages and DAX devices can only be mapped in whole huge pages.
		const huge = 2 << 20
		begin := off &^ (huge - 1)
		end := (off + size + huge - 1) &^ (huge - 1)
		if all, err2 := mapRange(int(f.Fd()), begin, end-begin); err2 == nil {
			return &Mapping{all: all, Window: all[off-begin:][:size:size]}, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("map %d+%d of %q: %w", off, size, path, err)
	}
	return &Mapping{all: m, Window: m}, nil
}

func openPath(path string) (*os.File, error) {
	if n, ok := strings.CutPrefix(path, "/dev/fd/"); ok {
		fd, err := strconv.Atoi(n)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", path, err)
		}
		if fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return nil, fmt.Errorf("%q: %w", path, err)
		}
		return os.NewFile(uintptr(fd), path), nil
	}
	return os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
}

func mapRange(fd int, off, size int64) ([]byte, error) {
	return unix.Mmap(fd, off, int(size), unix.PROT_READ, unix.MAP_SHARED)
}

// Close unmaps the window.
func (m *Mapping) Close() error { return unix.Munmap(m.all) }
