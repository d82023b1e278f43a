package sys

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// FlushDevice drops what the page cache of a block device holds, so that the file system on it reads its metadata anew. Pages
// that somebody reads at this moment stay.
func FlushDevice(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0); err != nil {
		return fmt.Errorf("flush the cache of %q: %w", path, err)
	}
	return nil
}

// DeviceFree tells whether nobody holds a block device for himself, as mounted file systems do, lazily unmounted ones too.
func DeviceFree(path string) (bool, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EBUSY) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open %q alone: %w", path, err)
	}
	return true, unix.Close(fd)
}
