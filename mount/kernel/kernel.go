// Package kernel mounts the DAXFS half of an image with the out-of-tree kernel module daxfs.ko
// (github.com/multikernel/daxfs, on-disk format 8). It needs no block device: a physical address or a dma-buf is
// enough.
//
// It shows less than EROFS: no times, no extended attributes, no device nodes. And all mapped pages,
// including program text, are copied into each process. MAP_SHARED does not help: Linux turns a shared
// mapping of a file opened for reading into a private one, and the module maps only shared ones
// directly. read(2) is served from the memory itself.
//
// Without its option validate the module checks little, and a damaged image can crash the kernel. The
// driver always sets the option. The owner of a pool also checks images first, which finds damage that
// validate misses.
package kernel

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strconv"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Align is the alignment of a window in physical memory, so that the kernel maps it with huge pages.
const Align = 2 << 20

// Driver mounts with the kernel module. The zero value is ready to use.
type Driver struct{}

var _ mount.Driver = Driver{}

// Name returns "daxfs".
func (Driver) Name() string { return "daxfs" }

// Sharing implements mount.Driver.
func (Driver) Sharing() string {
	return "read(2) uses the pool's own pages; whatever is mapped, program text too, is copied into every process; " +
		"no times, extended attributes or device nodes"
}

// Windows implements mount.Driver: the module mounts one image at a time.
func (Driver) Windows() bool { return true }

// Probe implements mount.Driver.
func (Driver) Probe(_ context.Context, r region.Info) error {
	switch {
	case r.Kind == region.KindDMABuf:
		if r.FD < 0 {
			return fmt.Errorf("the dma-buf of %q is not open in this process: %w", r.Path, mount.ErrUnsupported)
		}
	case !r.HasPhys:
		return fmt.Errorf("the physical address of memory of kind %q is not known; the module needs one, or a "+
			"dma-buf: %w", r.Kind, mount.ErrUnsupported)
	case r.Phys%Align != 0:
		return fmt.Errorf("the region begins at physical address %#x, expected a multiple of 2 MiB: %w", r.Phys,
			mount.ErrUnsupported)
	}
	return sys.HasFilesystem("daxfs",
		"build the module for it (github.com/multikernel/daxfs, format 8) and load it (modprobe daxfs)")
}

// options returns the mount of a window, without descriptors.
func options(src mount.Source) (sys.Mount, error) {
	m := sys.Mount{Type: "daxfs", Restrict: src.Restrict}
	switch {
	case src.Region.Kind == region.KindDMABuf:
		// The module maps the whole buffer and has no offset option.
		if src.Off != 0 {
			return m,
				fmt.Errorf("%s: the daxfs module mounts a dma-buf from its start only: %w", src, mount.ErrUnsupported)
		}
		if src.Region.FD < 0 {
			return m, fmt.Errorf("%s: the dma-buf is not open in this process: %w", src, mount.ErrUnsupported)
		}
		m.Source = cmp.Or(src.Region.Path, "dmabuf") // without a source the kernel would invent one
		m.FDs = map[string]int{"dmabuf": src.Region.FD}
		m.Options = []string{"validate"}
		return m, nil
	case !src.Region.HasPhys:
		return m, fmt.Errorf("%s: no physical address is known: %w", src, mount.ErrUnsupported)
	}
	phys := src.Region.Phys + uint64(src.Off)
	if phys%Align != 0 {
		return m,
			fmt.Errorf("%s: the window begins at physical address %#x, expected a multiple of 2 MiB: %w", src, phys,
				mount.ErrUnsupported)
	}
	m.Source = fmt.Sprintf("%#x", phys)
	m.Options = []string{"phys=" + m.Source, "size=" + strconv.FormatInt(src.Size, 10), "validate"}
	return m, nil
}

// Mount implements mount.Driver.
func (Driver) Mount(_ context.Context, src mount.Source, dir string) error {
	if m, _, err := sys.Top(dir); err != nil {
		return err
	} else if m != nil {
		return fmt.Errorf("mount %s: %q is a mount point already", src, dir)
	}
	m, err := options(src)
	if err != nil {
		return err
	}
	return sys.Do(m, dir)
}

// Match implements mount.Driver. Mount passes the physical address as the source, so the mount table
// shows the place of the window even if the module shows no options.
func (Driver) Match(ctx context.Context, src mount.Source, dir string) error {
	m, err := sys.MatchTop(dir, "daxfs", src.Restrict)
	if err != nil {
		return err
	}
	want, err := options(src)
	if err != nil {
		return err
	}
	if m.Source != want.Source {
		return fmt.Errorf("%q is mounted from %q, expected %q", dir, m.Source, want.Source)
	}
	// The module always maps a whole dma-buf.
	if size, ok := sys.MountOption(m, "size"); ok && src.Region.Kind != region.KindDMABuf {
		if n, err := strconv.ParseInt(size, 0, 64); err == nil && n != src.Size {
			return fmt.Errorf("%q has a window of %q bytes, expected %d", dir, size, src.Size)
		}
	}
	return sys.Alive(ctx, dir)
}

// Unmount implements mount.Driver.
func (Driver) Unmount(ctx context.Context, dir string) error {
	m, _, err := sys.Top(dir)
	if err != nil || m == nil {
		return err
	}
	return sys.Unmount(ctx, dir)
}

// Loaded tells whether the module is loaded or built in. It does not load it.
func Loaded() bool {
	_, err := os.Stat("/sys/module/daxfs")
	return err == nil
}
