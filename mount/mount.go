package mount

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

var (
	// ErrBusy says that the mount is in use: by a file, a working directory or another mount.
	ErrBusy = sys.ErrBusy
	// ErrNotFound says that the image, or the pool, is not mounted.
	ErrNotFound = errors.New("not mounted")
	// ErrUnsupported says that this kernel, this region or these privileges do not allow the operation.
	// The message says what is missing. Another driver may succeed.
	ErrUnsupported = sys.ErrUnsupported
	// ErrCheck says that the image did not pass daxfs.Check and was therefore not mounted.
	ErrCheck = errors.New("image check failed")
)

// Source is what a driver mounts: a whole pool, an image file, or a window of a pool.
type Source struct {
	// Key names the image in messages; it is empty for a pool.
	Key string
	// Region is the memory, file or device that holds the bytes. An image file is a region of kind "file".
	Region region.Info
	// Off and Size are the range in bytes. Off is 0, except for an image inside a larger file (a multiple
	// of 4096) and for the windows of the daxfs driver (a multiple of 2 MiB).
	Off, Size int64
	// Restrict mounts with nosuid and nodev, for directories that other users can reach.
	Restrict bool
}

// String returns the key and the range, for messages.
func (s Source) String() string {
	if s.Key == "" {
		return "pool " + s.Where()
	}
	return fmt.Sprintf("%q (range %d+%d of %s)", s.Key, s.Off, s.Size, s.Where())
}

// Where names the holder of the bytes: the path of a file or device, or the physical address.
func (s Source) Where() string {
	switch {
	case s.Region.Path != "":
		return fmt.Sprintf("%s %q", s.Region.Kind, s.Region.Path)
	case s.Region.BlockDevice != "":
		return fmt.Sprintf("%s %q", s.Region.Kind, s.Region.BlockDevice)
	case s.Region.HasPhys:
		return fmt.Sprintf("%s at %#x", s.Region.Kind, s.Region.Phys)
	}
	return s.Region.Kind
}

// Driver is one way to mount a pool or an image. A Driver keeps no state: any process finds its mounts
// again by their directories. All methods are safe for concurrent use with different directories.
type Driver interface {
	// Name is the configured name: "erofs-dax", "erofs-file", "erofs-loop", "daxfs" or "fuse".
	Name() string
	// Sharing says in one sentence, for people, which memory the containers share.
	Sharing() string
	// Windows is true if the driver mounts a window for each image, false if it mounts whole pools.
	Windows() bool
	// Probe tells whether the region can be mounted here; where possible it tries on a scratch file. An
	// error wraps ErrUnsupported and says why not and what would help.
	Probe(ctx context.Context, r region.Info) error
	// Mount mounts src on the existing directory dir (absolute, no symbolic links). A Mount that fails
	// leaves nothing behind. ErrUnsupported means that another driver may be tried.
	Mount(ctx context.Context, src Source, dir string) error
	// Match returns nil if the top mount on dir is what Mount(src, dir) makes, and it answers.
	Match(ctx context.Context, src Source, dir string) error
	// Unmount removes the mount on dir and every device that Mount made for it, if there are any. While
	// files in it are open it changes nothing and fails with ErrBusy.
	Unmount(ctx context.Context, dir string) error
}

// Select returns the drivers with a name, in the order in which to try them: all for "auto" or "",
// those named "erofs-…" for "erofs", else the one with that name.
func Select(drivers []Driver, name string) ([]Driver, error) {
	if name == "" || name == "auto" {
		return drivers, nil
	}
	var found []Driver
	names := []string{"auto"}
	for _, d := range drivers {
		if d.Name() == name || strings.HasPrefix(d.Name(), name+"-") {
			found = append(found, d)
		}
		names = append(names, d.Name())
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("unknown mount driver %q: expected one of %s", name, strings.Join(names, ", "))
	}
	return found, nil
}

// Explanation says what one driver can do with a region.
type Explanation struct {
	Driver  string `json:"driver"`
	Sharing string `json:"sharing"`
	Usable  bool   `json:"usable"`
	// Picked marks the driver that auto takes: the first usable one.
	Picked bool `json:"picked"`
	// Why says what is missing if the driver is not usable.
	Why string `json:"why,omitempty"`
}

// Explain probes every driver for the region, in order.
func Explain(ctx context.Context, drivers []Driver, r region.Info) []Explanation {
	out := make([]Explanation, 0, len(drivers))
	picked := false
	for _, d := range drivers {
		e := Explanation{Driver: d.Name(), Sharing: d.Sharing()}
		if err := d.Probe(ctx, r); err != nil {
			e.Why = strings.TrimSuffix(err.Error(), ": "+ErrUnsupported.Error())
		} else {
			e.Usable, e.Picked, picked = true, !picked, true
		}
		out = append(out, e)
	}
	return out
}

// Warning receives one line about something that works, but worse than it could.
type Warning func(format string, args ...any)

// Auto mounts src on dir with the first driver that can, and returns that driver. It reports to warn,
// which may be nil, each driver that looked usable and failed, for example on a kernel that silently
// dropped DAX.
func Auto(ctx context.Context, drivers []Driver, src Source, dir string, warn Warning) (Driver, error) {
	var why reasons
	for _, d := range drivers {
		if err := d.Probe(ctx, src.Region); err != nil {
			why.add(d, err)
			continue
		}
		err := d.Mount(ctx, src, dir)
		if err == nil {
			return d, nil
		}
		if !errors.Is(err, ErrUnsupported) {
			return nil, fmt.Errorf("mount %s with %s: %w", src, d.Name(), err)
		}
		if warn != nil {
			warn("mount %s with %s: %v; trying the next driver", src, d.Name(), err)
		}
		why.add(d, err)
	}
	return nil, fmt.Errorf("no mount driver can show %s: %w", src, why.err())
}

// reasons collects why no driver works.
type reasons []string

func (r *reasons) add(d Driver, err error) {
	*r = append(*r, d.Name()+": "+strings.TrimSuffix(err.Error(), ": "+ErrUnsupported.Error()))
}

func (r *reasons) err() error { return fmt.Errorf("%s: %w", strings.Join(*r, "; "), ErrUnsupported) }
