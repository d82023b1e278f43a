package region

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// labelArea is left unused at the end of persistent or physical memory: ramdax keeps its namespace
// labels there, in memory that all kernels which map the range share.
const labelArea = 128 << 10

// host is the root of the kernel's files about the machine; tests have their own sys and proc.
type host struct{ root string }

var thisHost = host{"/"}

func (h host) path(elem ...string) string { return filepath.Join(append([]string{h.root}, elem...)...) }

// attr reads a one-line file of sysfs; it returns "" if there is none.
func (h host) attr(elem ...string) string {
	b, err := os.ReadFile(h.path(elem...))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// number reads a number from a sysfs file, decimal or with 0x.
func (h host) number(elem ...string) (n uint64, ok bool) {
	n, err := strconv.ParseUint(h.attr(elem...), 0, 64)
	return n, err == nil
}

// iorange is one line of /proc/iomem. depth is the number of ranges around it.
type iorange struct {
	start, end uint64 // end is the last byte
	name       string
	depth      int
}

// iomem reads /proc/iomem. Without privilege the kernel shows all addresses as zero: an error.
func (h host) iomem() ([]iorange, error) {
	b, err := os.ReadFile(h.path("proc/iomem"))
	if err != nil {
		return nil, err
	}
	var out []iorange
	seen := false
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		line := s.Text()
		body := strings.TrimLeft(line, " ")
		addr, name, ok := strings.Cut(body, " : ")
		lo, hi, ok2 := strings.Cut(addr, "-")
		start, err1 := strconv.ParseUint(lo, 16, 64)
		end, err2 := strconv.ParseUint(hi, 16, 64)
		if !ok || !ok2 || err1 != nil || err2 != nil {
			return nil, fmt.Errorf("%s: line %q", h.path("proc/iomem"), line)
		}
		seen = seen || end != 0
		out = append(out, iorange{start, end, name, (len(line) - len(body)) / 2})
	}
	if !seen {
		return nil,
			fmt.Errorf("%s hides its addresses, it shows them to root: %w", h.path("proc/iomem"), fs.ErrPermission)
	}
	return out, nil
}

// reservedNames are the prefixes of ranges that the kernel keeps for other users than itself.
var reservedNames = []string{"Reserved", "Soft Reserved", "Persistent Memory", "CXL Window", "CXL ", "dax"}

// checkPhys refuses physical memory that must not be written. It always refuses System RAM. Without
// force it also refuses memory that has a driver or is not known to be reserved.
func (h host) checkPhys(start uint64, size int64, force bool) error {
	last := start + uint64(size) - 1
	if last < start {
		return fmt.Errorf("range %#x+%#x wraps around: %w", start, size, ErrRange)
	}
	ranges, err := h.iomem()
	if err != nil {
		return fmt.Errorf("is the range System RAM: %w", err)
	}
	reserved := ""
	for _, r := range ranges {
		if r.end < start || r.start > last {
			continue
		}
		if strings.HasPrefix(r.name, "System RAM") {
			return fmt.Errorf("range %#x-%#x holds System RAM at %#x-%#x; reserve memory on the kernel command line, "+
				"as with memmap=4G$16G: %w",
				start, last, r.start, r.end, ErrForeign)
		}
		if strings.HasPrefix(r.name, "Persistent Memory") && last > r.end-labelArea {
			return fmt.Errorf("range %#x-%#x reaches into the label area, the last %d KiB of %#x-%#x: %w", start, last,
				labelArea>>10, r.start, r.end, ErrForeign)
		}
		if r.start <= start && r.end >= last && hasAnyPrefix(r.name, reservedNames) {
			reserved = r.name
		}
		if strings.HasPrefix(r.name, "namespace") && !force {
			return fmt.Errorf("range %#x-%#x belongs to %s, use its /dev/pmem with kind %q, or force: %w", start, last,
				r.name, KindPmem, ErrForeign)
		}
	}
	if reserved == "" && !force {
		return fmt.Errorf("range %#x-%#x is not inside of one reserved range of /proc/iomem: %w", start,
			last, ErrForeign)
	}
	return nil
}

func hasAnyPrefix(s string, prefixes []string) bool {
	for _, p := range prefixes {
		if strings.HasPrefix(s, p) {
			return true
		}
	}
	return false
}

type pmemDevice struct {
	name    string
	size    int64 // bytes
	dax     bool
	phys    uint64
	hasPhys bool
}

// pmem describes the block device with a number, or refuses it if it is no byte addressable memory.
func (h host) pmem(major, minor uint32) (*pmemDevice, error) {
	dir, err := filepath.EvalSymlinks(h.path("sys/dev/block", fmt.Sprintf("%d:%d", major, minor)))
	if err != nil {
		return nil, fmt.Errorf("block device %d:%d in sysfs: %w", major, minor, err)
	}
	in := host{dir}
	d := &pmemDevice{name: filepath.Base(dir)}
	disk, start := in, uint64(0)
	if in.attr("partition") != "" {
		disk = host{filepath.Dir(dir)}
		start, _ = in.number("start")
	}
	diskName := filepath.Base(disk.root)
	switch {
	case !strings.HasPrefix(diskName, "pmem"):
		return nil, fmt.Errorf("%q is not persistent memory: %w", diskName, ErrKind)
	case strings.HasSuffix(diskName, "s"):
		return nil,
			fmt.Errorf("%q is a sector mode (BTT) namespace, which is not byte addressable; make it fsdax with "+
				"ndctl: %w", diskName, ErrKind)
	}
	sectors, ok := in.number("size")
	if !ok {
		return nil, fmt.Errorf("%q has no size in sysfs: %w", d.name, ErrSize)
	}
	d.size = int64(sectors) * 512
	dax, _ := disk.number("queue/dax")
	d.dax = dax == 1
	// The device is namespaceX.Y or, with struct pages in it, pfnX.Y; both name the first data byte.
	if phys, ok := disk.number("device/resource"); ok && phys != 0 && phys != ^uint64(0) {
		d.phys, d.hasPhys = phys+start*512, true
	}
	return d, h.checkHolders(in, major, minor)
}

// checkHolders refuses a device that is used for something else than a pool of ours. A pool may be
// mounted from it as EROFS or, by earlier versions, through windows. Callers check whether the bytes
// are a pool.
func (h host) checkHolders(dev host, major, minor uint32) error {
	holders, err := os.ReadDir(dev.path("holders"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range holders {
		if name := dev.attr("holders", e.Name(), "dm/name"); !strings.HasPrefix(name, "daxfs") {
			return fmt.Errorf("is held by %q (%s): %w", e.Name(), name, ErrBusy)
		}
	}
	b, err := os.ReadFile(h.path("proc/self/mountinfo"))
	if err != nil {
		return err
	}
	want := fmt.Sprintf("%d:%d", major, minor)
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 5 || f[2] != want {
			continue
		}
		// The filesystem type follows a dash; the number of fields before it varies.
		if i := slices.Index(f, "-"); i < 0 || i+1 >= len(f) || f[i+1] != "erofs" {
			return fmt.Errorf("is mounted on %q: %w", f[4], ErrBusy)
		}
	}
	return nil
}

// daxDevice describes a DAX character device, from sysfs.
type daxDevice struct {
	name       string
	size       int64
	align      int64
	phys       uint64
	hasPhys    bool
	persistent bool
}

func (h host) devdax(major, minor uint32) (*daxDevice, error) {
	dir, err := filepath.EvalSymlinks(h.path("sys/dev/char", fmt.Sprintf("%d:%d", major, minor)))
	if err != nil {
		return nil, fmt.Errorf("character device %d:%d in sysfs: %w", major, minor, err)
	}
	in := host{dir}
	d := &daxDevice{name: filepath.Base(dir)}
	if !strings.HasPrefix(d.name, "dax") {
		return nil, fmt.Errorf("%q is not a DAX device: %w", d.name, ErrKind)
	}
	size, ok := in.number("size")
	if !ok {
		return nil, fmt.Errorf("%q has no size in sysfs: %w", d.name, ErrSize)
	}
	align, ok := in.number("align")
	if !ok {
		align = Align
	}
	d.size, d.align = int64(size), int64(align)
	d.phys, d.hasPhys = in.number("resource")
	d.hasPhys = d.hasPhys && d.phys != 0 && d.phys != ^uint64(0)
	// Memory on an nvdimm bus is persistent; soft reserved and CXL memory is assumed to be volatile.
	d.persistent = strings.Contains(dir, "/ndbus")
	return d, nil
}
