package fusefs

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

// mapping is a window of a file or device in memory, read-only and shared.
type mapping struct {
	all    []byte // what munmap(2) wants
	window []byte
}

// mapWindow maps [off, off+size) of the file at path.
func mapWindow(path string, off, size int64) (*mapping, error) {
	if off < 0 || size <= 0 || off%daxfs.BlockSize != 0 || size > 1<<46 {
		return nil, fmt.Errorf("window %d+%d of %q: expected an offset that is a multiple of %d and a positive size", off, size, path, daxfs.BlockSize)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
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
	m, err := mapRange(int(f.Fd()), off, size)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOMEM) {
		// Files of huge pages and DAX devices are mapped in whole huge pages only.
		const huge = 2 << 20
		begin := off &^ (huge - 1)
		end := (off + size + huge - 1) &^ (huge - 1)
		if all, err2 := mapRange(int(f.Fd()), begin, end-begin); err2 == nil {
			return &mapping{all: all, window: all[off-begin:][:size:size]}, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("map %d+%d of %q: %w", off, size, path, err)
	}
	return &mapping{all: m, window: m}, nil
}

func mapRange(fd int, off, size int64) ([]byte, error) {
	return unix.Mmap(fd, off, int(size), unix.PROT_READ, unix.MAP_SHARED)
}

func (m *mapping) close() error { return unix.Munmap(m.all) }
