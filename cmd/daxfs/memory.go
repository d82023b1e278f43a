package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// sysroot is the root of /sys and /proc; tests use a directory of their own.
type sysroot string

func (s sysroot) read(elem ...string) string {
	b, err := os.ReadFile(filepath.Join(append([]string{string(s)}, elem...)...))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// block describes a block device by its name in /sys/class/block.
func (s sysroot) block(dev, name string) region.Info {
	info := region.Info{Kind: region.KindPmem, Path: dev, BlockDevice: dev, FD: -1, Persistent: region.PersistsReboot}
	info.DAX = s.read("sys/class/block", name, "queue/dax") == "1"
	// An nvdimm namespace, and the virtio or legacy region below it, give their physical address.
	for _, file := range []string{"device/resource", "device/../resource"} {
		if phys, err := strconv.ParseUint(s.read("sys/class/block", name, file), 0, 64); err == nil && phys != 0 {
			info.Phys, info.HasPhys = phys, true
			break
		}
	}
	return info
}

// describe returns the kind of memory behind a path: a file, or a block or DAX device.
func describe(s sysroot, path string) (region.Info, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return region.Info{}, err
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return region.Info{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return region.Info{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		link := filepath.Join(string(s), "sys/dev/block",
			fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
		target, err := os.Readlink(link)
		if err != nil {
			return region.Info{}, fmt.Errorf("block device %q: %w", path, err)
		}
		return s.block(path, filepath.Base(target)), nil
	case unix.S_IFCHR:
		return region.Info{Kind: region.KindDevDAX, Path: path, FD: -1, Persistent: region.PersistsProcess}, nil
	case unix.S_IFREG:
		return fileRegion(path)
	}
	return region.Info{}, fmt.Errorf("%q is neither a file nor a device", path)
}

type memoryFile interface {
	io.ReaderAt
	io.Closer
}

// openMemory opens a path or ADDRESS+SIZE, fills in info and returns the size in bytes.
func openMemory(arg string, info *region.Info) (_ memoryFile, size int64, err error) {
	rc, err := regionAt("", arg)
	if err != nil {
		return nil, 0, err
	}
	if t := region.TraitsOf(rc.Kind); t.ByAddress && t.MapOnly {
		// This memory does not support read(2), only mmap.
		rc.ReadOnly = true
		r, err := region.Open(rc)
		if err != nil {
			return nil, 0, err
		}
		*info = r.Info()
		info.FD = -1 // the descriptor ends with r
		return r, r.Size(), nil
	}
	if *info, err = describe("/", arg); err != nil {
		return nil, 0, err
	}
	f, err := os.Open(info.Path)
	if err != nil {
		return nil, 0, err
	}
	if size, err = f.Seek(0, io.SeekEnd); err != nil { // works for devices too
		return nil, 0, errors.Join(fmt.Errorf("size of %q: %w", arg, err), f.Close())
	}
	if info.BlockDevice != "" {
		// This kernel's cache of the device may be older than what another kernel wrote to the same memory.
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			return nil, 0, errors.Join(fmt.Errorf("drop the cache of %q: %w", arg, err), f.Close())
		}
	}
	return f, size, nil
}

// fileRegion describes a region that is the file at path, or a new file in the directory at path.
func fileRegion(path string) (region.Info, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return region.Info{}, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	info := region.Info{Kind: region.KindFile, Path: path, Sparse: true, FD: -1, Persistent: region.PersistsReboot}
	switch int64(st.Type) {
	case unix.TMPFS_MAGIC:
		info.Kind, info.Persistent = region.KindTmpfs, region.PersistsProcess
	case unix.HUGETLBFS_MAGIC:
		info.Kind, info.Persistent = region.KindHugetlbfs, region.PersistsProcess
	}
	return info, nil
}

// free returns the number of bytes that a file in dir can have.
func free(dir string) uint64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0
	}
	return st.Bavail * uint64(st.Bsize)
}

// memory is a possible place for a pool.
type memory struct {
	Info region.Info `json:"region"`
	// Bytes is the size of a device, or the free space of a file system.
	Bytes uint64 `json:"bytes"`
	Note  string `json:"note,omitempty"`
}

// findMemory lists the memory of this machine that can hold a pool: devices first, then a file below
// dir and one on tmpfs. For the file systems it gives the path of a file that does not exist yet.
func findMemory(s sysroot, dir string) ([]memory, error) {
	var out []memory
	devices, err := os.ReadDir(filepath.Join(string(s), "sys/class/block"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, d := range devices {
		dax := s.read("sys/class/block", d.Name(), "queue/dax") == "1"
		if !dax && !strings.HasPrefix(d.Name(), "pmem") {
			continue
		}
		m := memory{Info: s.block("/dev/"+d.Name(), d.Name())}
		if n, err := strconv.ParseUint(s.read("sys/class/block", d.Name(), "size"), 10, 64); err == nil {
			m.Bytes = n * 512
		}
		if strings.HasPrefix(d.Name(), "dm-") {
			m.Note = "device-mapper window over another device"
		}
		out = append(out, m)
	}
	chars, err := os.ReadDir(filepath.Join(string(s), "sys/bus/dax/devices"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, d := range chars {
		m := memory{Info: region.Info{
			Kind: region.KindDevDAX, Path: "/dev/" + d.Name(), FD: -1,
			Persistent: region.PersistsProcess,
		}}
		if n, err := strconv.ParseUint(s.read("sys/bus/dax/devices", d.Name(), "size"), 10, 64); err == nil {
			m.Bytes = n
		}
		if phys, err := strconv.ParseUint(s.read("sys/bus/dax/devices", d.Name(), "resource"), 0, 64); err == nil &&
			phys != 0 {
			m.Info.Phys, m.Info.HasPhys = phys, true
		}
		if dir, err := filepath.EvalSymlinks(filepath.Join(string(s), "sys/bus/dax/devices", d.Name())); err == nil &&
			strings.Contains(dir, "/ndbus") {
			m.Info.Persistent = region.PersistsReboot // an nvdimm's, as in package region
		}
		out = append(out, m)
	}
	out = append(out, reserved(s.read("proc/cmdline"))...)
	pages, _ := strconv.ParseUint(s.read("proc/sys/vm/nr_hugepages"), 10, 64)
	if pages > 0 {
		out = append(out, memory{
			Info: region.Info{Kind: region.KindHugetlbfs, FD: -1, Persistent: region.PersistsProcess},
			Note: fmt.Sprintf("%d huge pages are reserved", pages),
		})
	}
	heaps, err := os.ReadDir(filepath.Join(string(s), "dev/dma_heap"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, h := range heaps {
		out = append(out, memory{Info: region.Info{Kind: region.KindDMABuf, Path: "/dev/dma_heap/" + h.Name(), FD: -1}})
	}
	for _, d := range []string{existing(dir), filepath.Join(string(s), "dev/shm")} {
		if info, err := fileRegion(d); err == nil {
			out = append(out, memory{Info: info, Bytes: free(d)})
		}
	}
	return out, nil
}

// reserved returns the ranges that memmap=SIZE$ADDRESS on the kernel command line reserves. Other
// reserved ranges in /proc/iomem belong to the firmware.
func reserved(cmdline string) []memory {
	var out []memory
	for _, arg := range strings.Fields(cmdline) {
		list, ok := strings.CutPrefix(arg, "memmap=")
		if !ok {
			continue
		}
		for part := range strings.SplitSeq(list, ",") {
			size, addr, ok := strings.Cut(strings.ReplaceAll(part, `\`, ""), "$")
			n, err1 := memSize(size)
			at, err2 := memSize(addr)
			if !ok || err1 != nil || err2 != nil {
				continue
			}
			out = append(out, memory{
				Info: region.Info{
					Kind: region.KindPhys, Phys: at, HasPhys: true, FD: -1,
					Persistent: region.PersistsProcess,
				},
				Bytes: n,
				Note:  "reserved on the kernel command line",
			})
		}
	}
	return out
}

// memSize parses a number of the kernel command line: decimal or 0x, with an optional suffix K, M, G or T.
func memSize(s string) (uint64, error) {
	shift := 0
	if s != "" {
		if i := strings.IndexByte("KMGT", s[len(s)-1]&^0x20); i >= 0 {
			shift, s = 10*(i+1), s[:len(s)-1]
		}
	}
	n, err := strconv.ParseUint(s, 0, 64)
	if err == nil && n<<shift>>shift != n {
		err = strconv.ErrRange
	}
	return n << shift, err
}

// existing returns the longest existing part of a path.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); err == nil || path == "/" || path == "." {
			return path
		}
		path = filepath.Dir(path)
	}
}
