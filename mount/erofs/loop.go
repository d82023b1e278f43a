package erofs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Loop mounts a block device, or a file through a loop device. The zero value is ready to use.
type Loop struct{}

// Name returns "erofs-loop".
func (Loop) Name() string { return "erofs-loop" }

// Sharing implements mount.Driver.
func (Loop) Sharing() string {
	return "one page-cache copy of each distinct file on this host, shared by all containers; " +
		"on tmpfs beside the pool's own pages; full fidelity"
}

// Windows implements mount.Driver.
func (Loop) Windows() bool { return false }

// Probe implements mount.Driver: it needs a readable path, and a kernel with loop devices.
func (Loop) Probe(_ context.Context, r region.Info) error {
	if err := sys.HasFilesystem("erofs", remedy); err != nil {
		return err
	}
	path, err := backing(r)
	if err != nil {
		return err
	}
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%w: %w", err, mount.ErrUnsupported)
	}
	if !st.Mode().IsRegular() && st.Mode()&os.ModeType != os.ModeDevice {
		return fmt.Errorf("%q is neither a file nor a block device, so no loop device can read it: %w", path,
			mount.ErrUnsupported)
	}
	c, err := os.OpenFile("/dev/loop-control", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return noLoop(err)
	}
	return c.Close()
}

// backing returns the file or block device that holds the bytes of a region.
func backing(r region.Info) (string, error) {
	switch {
	case r.Traits().MapOnly:
		return "",
			fmt.Errorf("memory of kind %q cannot be read as a file or block device by the kernel: %w", r.Kind,
				mount.ErrUnsupported)
	case r.BlockDevice != "":
		return r.BlockDevice, nil
	case r.Path != "":
		return r.Path, nil
	}
	return "", fmt.Errorf("region of kind %q has no path: %w", r.Kind, mount.ErrUnsupported)
}

func noLoop(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("loop devices need root: %w: %w", err, mount.ErrUnsupported)
	}
	return fmt.Errorf("no loop devices: %w: load the loop module (modprobe loop), "+
		"or give /dev/loop-control and /dev/loop* to this container: %w", err, mount.ErrUnsupported)
}

// Mount implements mount.Driver.
func (Loop) Mount(ctx context.Context, src mount.Source, dir string) error {
	if err := checkDir(src, dir); err != nil {
		return err
	}
	path, err := backing(src.Region)
	if err != nil {
		return err
	}
	if direct(src) {
		return sys.Do(sys.Mount{Type: "erofs", Source: path, Restrict: src.Restrict}, dir)
	}
	dev, err := attach(ctx, path, src.Off, src.Size)
	if err != nil {
		return err
	}
	// The mount holds the device now. If the mount fails, closing the last descriptor clears the device.
	defer dev.Close()
	return sys.Do(sys.Mount{Type: "erofs", Source: dev.Name(), Restrict: src.Restrict}, dir)
}

// direct tells whether src is a block device that needs no loop device.
func direct(src mount.Source) bool { return src.Region.BlockDevice != "" && src.Off == 0 }

// attach returns an open loop device over a window of a file. Closing it removes the device unless it
// is mounted.
func attach(ctx context.Context, path string, off, size int64) (*os.File, error) {
	back, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer back.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, noLoop(err)
	}
	defer ctl.Close()
	cfg := unix.LoopConfig{Fd: uint32(back.Fd()), Size: 4096}
	cfg.Info.Offset, cfg.Info.Sizelimit = uint64(off), uint64(size)
	// Without direct I/O a tmpfs copies through one more queue, and a file is cached twice.
	cfg.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], path)
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, noLoop(err) // such as ENOSPC, or a limit of the module
		}
		dev, err := os.OpenFile("/dev/loop"+strconv.Itoa(n), os.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, noLoop(err)
		}
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		if errors.Is(err, unix.EINVAL) && cfg.Info.Flags&unix.LO_FLAGS_DIRECT_IO != 0 {
			// The file system below has no direct I/O.
			cfg.Info.Flags &^= unix.LO_FLAGS_DIRECT_IO
			err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		}
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if errors.Is(err, unix.EBUSY) { // another process took it between the two calls
			continue
		}
		return nil, fmt.Errorf("loop device over %q: %w", path, err)
	}
}

// Match implements mount.Driver.
func (Loop) Match(ctx context.Context, src mount.Source, dir string) error {
	if direct(src) {
		if err := matchDevice(src, dir); err != nil {
			return err
		}
		return sys.Alive(ctx, dir)
	}
	m, err := sys.MatchTop(dir, "erofs", src.Restrict)
	if err != nil {
		return err
	}
	if m.Major != 7 {
		return fmt.Errorf("%q is mounted from %q, expected a loop device", dir, m.Source)
	}
	dev, err := os.OpenFile(m.Source, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	info, err := unix.IoctlLoopGetStatus64(int(dev.Fd()))
	if err != nil {
		return fmt.Errorf("status of %s: %w", m.Source, err)
	}
	path, err := backing(src.Region)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fmt.Errorf("stat %q: %w", path, err)
	}
	if info.Inode != st.Ino || info.Device != st.Dev || info.Offset != uint64(src.Off) ||
		info.Sizelimit != uint64(src.Size) {
		return fmt.Errorf("%s is inode %d of device %#x at %d+%d, expected inode %d of device %#x at %d+%d", m.Source,
			info.Inode, info.Device, info.Offset, info.Sizelimit, st.Ino, st.Dev, src.Off, src.Size)
	}
	return sys.Alive(ctx, dir)
}

// Unmount implements mount.Driver.
func (Loop) Unmount(ctx context.Context, dir string) error { return unmount(ctx, dir) }
