package sys

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// FlushDevice drops a block device from the page cache, so that the file system on it reads its
// metadata again. Pages that are being read at this moment stay.
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

// DropMetadata makes a mounted EROFS without a block device read its metadata again. Linux 7.3 keeps
// metadata in a cache of its own, which does not see writes to the file below; sysfs names the control
// of that cache by the device number. Earlier kernels use the page cache of the file, and nothing has
// to be dropped. With all set, DropMetadata drops the caches of all EROFS file systems of the machine,
// which only costs time.
func DropMetadata(major, minor uint32, all bool) error {
	controls := []string{fmt.Sprintf("/sys/fs/erofs/%d:%d/drop_caches", major, minor)}
	if all {
		found, err := filepath.Glob("/sys/fs/erofs/*/drop_caches")
		if err != nil {
			return err
		}
		controls = found
	}
	for _, path := range controls {
		f, err := os.OpenFile(path, os.O_WRONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		_, err = f.WriteString("1") // the cache of raw blocks, not of decompressed ones
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// DeviceFree tells whether nobody holds a block device exclusively, as file systems do until they die.
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

// DeviceNumberFree tells whether no superblock has the given device number. Major must be 0: file
// systems without a device. The kernel hands out the lowest free number, so a number is in use if new
// superblocks get all numbers around it. By now another file system may have it; a free number proves
// that the old superblock is gone.
func DeviceNumberFree(major, minor uint32) (bool, error) {
	if major != 0 {
		return false, fmt.Errorf("device %d:%d belongs to a block device", major, minor)
	}
	const most = 4096 // superblocks made for one answer
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for range most {
		fd, n, err := scratch()
		if err != nil {
			return false, err
		}
		fds = append(fds, fd)
		if n >= minor {
			return n == minor, nil
		}
	}
	return false, nil
}

// scratch makes an unattached empty file system, and returns its minor number.
func scratch() (fd int, minor uint32, err error) {
	fc, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, 0, explain(fmt.Errorf("fsopen tmpfs: %w", err))
	}
	defer unix.Close(fc)
	if err := unix.FsconfigCreate(fc); err != nil {
		return -1, 0, explain(fmt.Errorf("make a tmpfs: %w", err))
	}
	if fd, err = unix.Fsmount(fc, unix.FSMOUNT_CLOEXEC, 0); err != nil {
		return -1, 0, explain(fmt.Errorf("fsmount tmpfs: %w", err))
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, 0, errors.Join(err, unix.Close(fd))
	}
	return fd, unix.Minor(st.Dev), nil
}

// LoopBacking returns the device and inode number of the file below a loop device.
func LoopBacking(path string) (unix.Stat_t, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return unix.Stat_t{}, err
	}
	defer f.Close()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return unix.Stat_t{}, fmt.Errorf("status of %q: %w", path, err)
	}
	return unix.Stat_t{Ino: info.Inode, Dev: info.Device}, nil
}
