package region

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// InUse returns an error that wraps ErrBusy if a mount by one of our drivers, or a device, uses the
// region. A region in use must not be overwritten. InUse cannot see other mount namespaces, or
// processes and kernels that map the memory themselves.
func InUse(r Region) error {
	err := thisHost.inUse(r.Info(), r.Size())
	if errors.Is(err, ErrBusy) && onlyOurs(r.Info()) {
		return nil
	}
	return err
}

// onlyOurs reports whether only the region has its file open. A mount table keeps naming the old path
// of a file that was moved; the kernel grants a write lease only to the sole opener of a file.
func onlyOurs(i Info) bool {
	if !i.Traits().Regular {
		return false
	}
	if _, err := unix.FcntlInt(uintptr(i.FD), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		return false
	}
	_, err := unix.FcntlInt(uintptr(i.FD), unix.F_SETLEASE, unix.F_UNLCK)
	return err == nil
}

func (h host) inUse(i Info, size int64) error {
	uses, err := h.uses(i, size)
	if err != nil || len(uses) == 0 {
		return err
	}
	return fmt.Errorf("%q is %s: %w", cmp.Or(i.Path, i.BlockDevice, fmt.Sprintf("%#x", i.Phys)), uses[0], ErrBusy)
}

// uses describes the users of the region.
func (h host) uses(i Info, size int64) ([]string, error) {
	mounts, err := h.mounts(i, size)
	if err != nil {
		return nil, err
	}
	if i.BlockDevice != "" {
		above, err := h.above(i.BlockDevice)
		return append(mounts, above...), err
	}
	loops, err := h.loops(i)
	return append(mounts, loops...), err
}

// mounts finds the mounts whose source is the region, in the notation of each driver.
func (h host) mounts(i Info, size int64) ([]string, error) {
	f, err := os.Open(h.path("proc/self/mountinfo"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, m := range all {
		switch m.FSType {
		case "fuse.daxfs": // source: path@offset+size
			at := strings.LastIndexByte(m.Source, '@')
			if at < 0 || !h.isFile(m.Source[:at], i) {
				continue
			}
		case "daxfs": // source: physical address
			phys, err := strconv.ParseUint(m.Source, 0, 64)
			if err != nil || !i.HasPhys || phys < i.Phys || phys-i.Phys >= uint64(size) {
				continue
			}
		default:
			if !h.isFile(m.Source, i) {
				continue
			}
		}
		out = append(out, fmt.Sprintf("mounted on %q", m.Mountpoint))
	}
	return out, nil
}

// isFile tells whether a name leads to the region's file or device, by whatever path.
func (h host) isFile(name string, i Info) bool {
	path := cmp.Or(i.BlockDevice, i.Path)
	if path == "" || i.Kind == KindDMABuf { // its path is that of the heap
		return false
	}
	if abs, err := filepath.Abs(path); err == nil && abs == name {
		return true
	}
	if !filepath.IsAbs(name) {
		return false
	}
	a, err := os.Stat(name)
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

func (h host) loops(i Info) ([]string, error) {
	dirs, err := filepath.Glob(h.path("sys/block/loop*/loop"))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, dir := range dirs {
		loop := host{dir}
		if name := loop.attr("backing_file"); name != "" && h.isFile(name, i) {
			out = append(out, "under /dev/"+filepath.Base(filepath.Dir(dir)))
		}
	}
	return out, nil
}

// above finds the devices on top of a block device.
func (h host) above(device string) ([]string, error) {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: device, Err: err}
	}
	return h.held(unix.Major(st.Rdev), unix.Minor(st.Rdev))
}

func (h host) held(major, minor uint32) ([]string, error) {
	dir := h.path("sys/dev/block", fmt.Sprintf("%d:%d", major, minor), "holders")
	holders, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var out []string
	for _, e := range holders {
		out = append(out, fmt.Sprintf("under /dev/%s (%s)", e.Name(), host{dir}.attr(e.Name(), "dm/name")))
	}
	return out, nil
}
