package region

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// use is something that reads a region at the moment.
type use struct {
	off  int64 // where its window begins; -1 if that is not known
	what string
}

// InUse returns an error that wraps ErrBusy if something reads the region at the moment: a mount by any of our drivers, a
// loop device or a device-mapper window of it. A region in use must not be made anew. What other mount namespaces, and the
// processes and kernels that map the memory by themselves, do can not be seen.
func InUse(r Region) error { return thisHost.inUse(r.Info(), r.Size(), -1) }

// WindowInUse is InUse of the window that begins at off.
func WindowInUse(r Region, off int64) error { return thisHost.inUse(r.Info(), r.Size(), off) }

// inUse reports the first use of the window at off, or of any if off is negative.
func (h host) inUse(i Info, size, off int64) error {
	uses, err := h.uses(i, size)
	if err != nil {
		return err
	}
	for _, u := range uses {
		if off < 0 || u.off < 0 || u.off == off {
			return fmt.Errorf("%q is %s: %w", cmp.Or(i.Path, i.BlockDevice, fmt.Sprintf("%#x", i.Phys)), u.what, ErrBusy)
		}
	}
	return nil
}

func (h host) uses(i Info, size int64) ([]use, error) {
	mounts, err := h.mounts(i, size)
	if err != nil {
		return nil, err
	}
	if i.BlockDevice != "" {
		windows, err := h.windows(i.BlockDevice)
		return append(mounts, windows...), err
	}
	loops, err := h.loops(i)
	return append(mounts, loops...), err
}

// mounts finds the mounts whose source names the region in the way in which each driver writes it.
func (h host) mounts(i Info, size int64) ([]use, error) {
	f, err := os.Open(h.path("proc/self/mountinfo"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return nil, err
	}
	var out []use
	for _, m := range all {
		off := int64(-1)
		switch m.FSType {
		case "erofs":
			if !h.isFile(m.Source, i) {
				continue
			}
			off = 0
			for o := range strings.SplitSeq(m.VFSOptions, ",") {
				if n, ok := strings.CutPrefix(o, "fsoffset="); ok {
					off = parse(n)
				}
			}
		case "fuse.daxfs": // path@offset+size
			at := strings.LastIndexByte(m.Source, '@')
			if at < 0 || !h.isFile(m.Source[:at], i) {
				continue
			}
			n, _, _ := strings.Cut(m.Source[at+1:], "+")
			off = parse(n)
		case "daxfs": // the physical address
			phys, err := strconv.ParseUint(m.Source, 0, 64)
			if err != nil || !i.HasPhys || phys < i.Phys || phys-i.Phys >= uint64(size) {
				continue
			}
			off = int64(phys - i.Phys)
		default:
			if !h.isFile(m.Source, i) {
				continue
			}
		}
		out = append(out, use{off, fmt.Sprintf("mounted on %q", m.Mountpoint)})
	}
	return out, nil
}

// isFile tells whether a name is that of the region's file or device, by whatever path.
func (h host) isFile(name string, i Info) bool {
	path := cmp.Or(i.BlockDevice, i.Path)
	if path == "" || i.Kind == KindDMABuf { // whose path is that of the heap
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

func parse(n string) int64 {
	off, err := strconv.ParseInt(strings.TrimSpace(n), 10, 64)
	if err != nil {
		return -1
	}
	return off
}

func (h host) loops(i Info) ([]use, error) {
	dirs, err := filepath.Glob(h.path("sys/block/loop*/loop"))
	if err != nil {
		return nil, err
	}
	var out []use
	for _, dir := range dirs {
		loop := host{dir}
		if name := loop.attr("backing_file"); name != "" && h.isFile(name, i) {
			out = append(out, use{parse(loop.attr("offset")), "under /dev/" + filepath.Base(filepath.Dir(dir))})
		}
	}
	return out, nil
}

// windows finds what lies on a block device, such as the device-mapper windows of our driver.
func (h host) windows(device string) ([]use, error) {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: device, Err: err}
	}
	return h.held(unix.Major(st.Rdev), unix.Minor(st.Rdev))
}

func (h host) held(major, minor uint32) ([]use, error) {
	dir := h.path("sys/dev/block", fmt.Sprintf("%d:%d", major, minor), "holders")
	holders, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var out []use
	for _, e := range holders {
		name := host{dir}.attr(e.Name(), "dm/name")
		out = append(out, use{windowOffset(name), fmt.Sprintf("under the window %q (%s)", name, e.Name())})
	}
	return out, nil
}

// windowOffset asks device-mapper where a window begins; sysfs does not tell.
var windowOffset = func(name string) int64 {
	out, err := exec.Command("dmsetup", "table", name).Output()
	if err != nil {
		return -1
	}
	return tableOffset(out)
}

// tableOffset is where a table of one linear target begins, in bytes: "0 2048 linear 259:0 4096".
func tableOffset(table []byte) int64 {
	f := bytes.Fields(table)
	if len(f) != 5 || string(f[2]) != "linear" {
		return -1
	}
	if n := parse(string(f[4])); n >= 0 {
		return n * 512
	}
	return -1
}
