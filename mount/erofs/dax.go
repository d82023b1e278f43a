package erofs

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// DAX mounts a block device with DAX: mapped files are the device's memory. The zero value is usable.
type DAX struct{}

// Name returns "erofs-dax".
func (DAX) Name() string { return "erofs-dax" }

// Sharing implements mount.Driver.
func (DAX) Sharing() string {
	return "mapped files are the pool's own pages, in every container and every kernel that maps the pool; " +
		"no page cache; full fidelity"
}

// Windows implements mount.Driver.
func (DAX) Windows() bool { return false }

// Probe implements mount.Driver.
func (DAX) Probe(_ context.Context, r region.Info) error {
	if r.BlockDevice == "" {
		return fmt.Errorf("memory of kind %q is no block device; DAX needs /dev/pmemN (an nvdimm namespace in fsdax "+
			"mode, virtio-pmem, or memmap=nn!ss on the kernel command line): %w", r.Kind, mount.ErrUnsupported)
	}
	if !r.DAX {
		return fmt.Errorf("block device %q has no DAX; an nvdimm namespace must be in fsdax mode "+
			"(ndctl create-namespace -m fsdax): %w", r.BlockDevice, mount.ErrUnsupported)
	}
	return sys.HasFilesystem("erofs", remedy)
}

// Mount implements mount.Driver. The kernel may accept dax=always and still mount without it, with at
// most a line in its log. Mount detects that and returns ErrUnsupported.
func (DAX) Mount(ctx context.Context, src mount.Source, dir string) error {
	if err := checkDir(src, dir); err != nil {
		return err
	}
	if src.Off != 0 {
		return fmt.Errorf("mount %s: DAX mounts a block device from its start only: %w", src, mount.ErrUnsupported)
	}
	err := sys.Do(sys.Mount{
		Type: "erofs", Source: src.Region.BlockDevice, Options: []string{"dax=always"}, Restrict: src.Restrict,
	}, dir)
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("this kernel's EROFS has no DAX (CONFIG_FS_DAX), or cannot use it with this image: %w: %w",
			err, mount.ErrUnsupported)
	}
	if err != nil {
		return err
	}
	if err := hasDAX(dir); err != nil {
		return errors.Join(err, sys.Unmount(context.WithoutCancel(ctx), dir))
	}
	return nil
}

// hasDAX checks in the mount table that the kernel kept dax=always.
func hasDAX(dir string) error {
	m, _, err := sys.Top(dir)
	if err != nil {
		return err
	}
	if m == nil {
		return fmt.Errorf("%q vanished from the mount table", dir)
	}
	if v, _ := sys.MountOption(m, "dax"); v != "always" {
		return fmt.Errorf("the kernel mounted %q without DAX although dax=always was asked for (options %q): "+
			"the device has no DAX, or its pages have no struct page (fsdax mode has): %w",
			m.Source, m.VFSOptions, mount.ErrUnsupported)
	}
	return nil
}

// Match implements mount.Driver.
func (DAX) Match(ctx context.Context, src mount.Source, dir string) error {
	if err := matchDevice(src, dir); err != nil {
		return err
	}
	if err := hasDAX(dir); err != nil {
		return err
	}
	return sys.Alive(ctx, dir)
}

// matchDevice returns nil if dir is a mount of the block device itself.
func matchDevice(src mount.Source, dir string) error {
	m, err := sys.MatchTop(dir, "erofs", src.Restrict)
	if err != nil {
		return err
	}
	want, err := devNumber(src.Region.BlockDevice)
	if err != nil {
		return err
	}
	if got := fmt.Sprintf("%d:%d", m.Major, m.Minor); got != want {
		return fmt.Errorf("%q is mounted from %q (%s), expected %q (%s)", dir, m.Source, got,
			src.Region.BlockDevice, want)
	}
	return nil
}

// Unmount implements mount.Driver.
func (DAX) Unmount(ctx context.Context, dir string) error { return unmount(ctx, dir) }
