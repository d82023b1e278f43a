package erofs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// DAX mounts a window of a block device with DAX. The zero value is ready to use.
//
// Device-mapper is driven through dmsetup(8), which talks to udev where there is one and makes the device node where there
// is none; both are easy to get wrong.
type DAX struct {
	// Dmsetup is the program to run, "dmsetup" if empty.
	Dmsetup string

	sysfs string // "/sys/class/block" if empty; tests have their own
}

// Name returns "erofs-dax".
func (DAX) Name() string { return "erofs-dax" }

// Sharing implements mount.Driver.
func (DAX) Sharing() string {
	return "mapped files are the pool's own pages, in every container and every kernel that maps the pool; no page cache; full fidelity"
}

func (d DAX) program() string {
	if d.Dmsetup != "" {
		return d.Dmsetup
	}
	return "dmsetup"
}

// Probe implements mount.Driver.
func (d DAX) Probe(_ context.Context, r region.Info) error {
	if r.BlockDevice == "" {
		return fmt.Errorf("memory of kind %q is no block device; DAX needs /dev/pmemN (an nvdimm namespace in fsdax mode, "+
			"virtio-pmem, or memmap=nn!ss on the kernel command line): %w", r.Kind, mount.ErrUnsupported)
	}
	if !r.DAX {
		return fmt.Errorf("block device %q has no DAX; an nvdimm namespace must be in fsdax mode (ndctl create-namespace -m fsdax): %w",
			r.BlockDevice, mount.ErrUnsupported)
	}
	if err := sys.HasFilesystem("erofs", remedy); err != nil {
		return err
	}
	if _, err := exec.LookPath(d.program()); err != nil {
		return fmt.Errorf("%w: install dmsetup: %w", err, mount.ErrUnsupported)
	}
	return nil
}

// device is the name of the device-mapper device for a mount point. It follows from the directory alone, so that a later
// process finds what an earlier one left, and no two tables meet.
func device(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return "daxfs-" + hex.EncodeToString(sum[:12])
}

// table is the device-mapper table of a window, in sectors of 512 bytes.
func table(src mount.Source) string {
	return fmt.Sprintf("0 %d linear %s %d", src.Size/512, src.Region.BlockDevice, src.Off/512)
}

func (d DAX) dmsetup(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, d.program(), args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		return "", fmt.Errorf("%w: install dmsetup: %w", err, mount.ErrUnsupported)
	}
	if err != nil {
		return "", fmt.Errorf("dmsetup %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return strings.TrimSpace(string(out)), nil
}

// Mount implements mount.Driver. A window that begins at 0 is mounted from the device itself. The kernel accepts dax=always
// and then may mount without it, with a line in its log at most; that is found out here and is ErrUnsupported.
func (d DAX) Mount(ctx context.Context, src mount.Source, dir string) (err error) {
	if err := checkDir(src, dir); err != nil {
		return err
	}
	cleanup := context.WithoutCancel(ctx)
	dev := src.Region.BlockDevice
	if src.Off != 0 {
		name := device(dir)
		if err := d.remove(ctx, name); err != nil {
			return fmt.Errorf("device %q of an earlier mount on %q: %w", name, dir, err)
		}
		if _, err := d.dmsetup(ctx, "create", name, "--readonly", "--table", table(src)); err != nil {
			return fmt.Errorf("%w: the window cannot become a block device; is the dm_mod module loaded? %w", err, mount.ErrUnsupported)
		}
		// From here on the device is removed with its last user: at once if the mount fails.
		defer func() { err = errors.Join(err, d.remove(cleanup, name)) }()
		if dev, err = d.node(ctx, name); err != nil {
			return err
		}
	}
	err = sys.Do(sys.Mount{Type: "erofs", Source: dev, Options: []string{"dax=always"}, Restrict: src.Restrict}, dir)
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("this kernel's EROFS has no DAX (CONFIG_FS_DAX), or cannot use it with this image: %w: %w", err, mount.ErrUnsupported)
	}
	if err != nil {
		return err
	}
	if err := hasDAX(dir); err != nil {
		return errors.Join(err, sys.Unmount(cleanup, dir))
	}
	return nil
}

// hasDAX reads from the mount table whether the kernel kept dax=always.
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
			"the device has no DAX, or its pages have no struct page (fsdax mode has): %w", m.Source, m.VFSOptions, mount.ErrUnsupported)
	}
	return nil
}

// node returns the path of a device. Where there is no udev it can take a second request until there is one.
func (d DAX) node(ctx context.Context, name string) (string, error) {
	path := "/dev/mapper/" + name
	if _, err := os.Lstat(path); err == nil {
		return path, nil
	}
	if _, err := d.dmsetup(ctx, "mknodes", name); err != nil {
		return "", err
	}
	if _, err := os.Lstat(path); err != nil {
		return "", fmt.Errorf("dmsetup made device %q but no node for it: %w: is udev running, or /dev a devtmpfs?", name, err)
	}
	return path, nil
}

// number returns the device number of a device-mapper device, "major:minor", or "" if there is none of that name. It asks
// sysfs: a device can be without a node.
func (d DAX) number(name string) string {
	root := d.sysfs
	if root == "" {
		root = "/sys/class/block"
	}
	names, err := filepath.Glob(filepath.Join(root, "dm-*", "dm", "name"))
	if err != nil {
		return ""
	}
	for _, file := range names {
		b, err := os.ReadFile(file)
		if err != nil || strings.TrimSpace(string(b)) != name {
			continue
		}
		if b, err = os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(file)), "dev")); err == nil {
			return strings.TrimSpace(string(b))
		}
	}
	return ""
}

// remove removes a device as soon as nobody has it open; nil if there is none.
func (d DAX) remove(ctx context.Context, name string) error {
	if d.number(name) == "" {
		return nil
	}
	_, err := d.dmsetup(ctx, "remove", "--deferred", name)
	return err
}

// Match implements mount.Driver.
func (d DAX) Match(ctx context.Context, src mount.Source, dir string) error {
	m, err := sys.MatchTop(dir, "erofs", src.Restrict)
	if err != nil {
		return err
	}
	name, want := src.Region.BlockDevice, ""
	if src.Off != 0 {
		name = device(dir)
		want = d.number(name)
	} else if want, err = devNumber(name); err != nil {
		return err
	}
	if got := fmt.Sprintf("%d:%d", m.Major, m.Minor); got != want {
		return fmt.Errorf("%q is mounted from %q (%s), expected %q (%s)", dir, m.Source, got, name, want)
	}
	if err := hasDAX(dir); err != nil {
		return err
	}
	if src.Off != 0 {
		got, err := d.dmsetup(ctx, "table", device(dir))
		if err != nil {
			return err
		}
		if err := sameTable(got, src); err != nil {
			return err
		}
	}
	return sys.Alive(ctx, dir)
}

// sameTable compares what dmsetup prints ("0 2048 linear 259:0 4096") with the window of src.
func sameTable(got string, src mount.Source) error {
	f := strings.Fields(got)
	size, off := strconv.FormatInt(src.Size/512, 10), strconv.FormatInt(src.Off/512, 10)
	if len(f) != 5 || f[0] != "0" || f[1] != size || f[2] != "linear" || f[4] != off {
		return fmt.Errorf("device-mapper table is %q, expected %q", got, table(src))
	}
	dev, err := devNumber(src.Region.BlockDevice)
	if err != nil {
		return err
	}
	if f[3] != dev {
		return fmt.Errorf("device-mapper table is %q, expected device %s (%s)", got, dev, src.Region.BlockDevice)
	}
	return nil
}

// Unmount implements mount.Driver.
func (d DAX) Unmount(ctx context.Context, dir string) error {
	if err := unmount(ctx, dir); err != nil {
		return err
	}
	return d.remove(ctx, device(dir))
}
