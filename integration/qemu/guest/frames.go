//go:build linux

package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
)

// memory returns the page frames of the shared memory. Before about Linux 6.15 the memory of processes
// does not include pages of devices, so their addresses are the only proof.
func memory() ([2]uint64, error) {
	var list [2]uint64
	for i, name := range []string{"resource", "size"} {
		path := filepath.Join("/sys/block", filepath.Base(device), "device", name)
		b, err := os.ReadFile(path)
		if err != nil {
			return list, err
		}
		n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 0, 64)
		if err != nil {
			return list, fmt.Errorf("%q: %w", path, err)
		}
		list[i] = n >> 12
	}
	list[1] += list[0]
	return list, nil
}

// text returns the pages of program text that a process has in memory. Paths are relative to its root.
func text(pid int, root string) ([]task.Page, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	pagemap, err := openPagemap(strconv.Itoa(pid))
	if err != nil {
		return nil, err
	}
	defer pagemap.Close()
	var list []task.Page
	for _, line := range strings.Split(string(maps), "\n") {
		// start-end permissions offset device inode path
		f := strings.Fields(line)
		if len(f) != 6 || !strings.HasPrefix(f[5], root) || !strings.Contains(f[1], "x") {
			continue
		}
		var start, end uint64
		var off int64
		if _, err := fmt.Sscanf(f[0]+" "+f[2], "%x-%x %x", &start, &end, &off); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		for at := start; at < end; at += 4096 {
			frame, err := pagemap.frame(uintptr(at))
			if err != nil {
				return nil, err
			}
			if frame != 0 {
				list = append(list,
					task.Page{File: strings.TrimPrefix(f[5], root), Off: off + int64(at-start), Frame: frame})
			}
		}
	}
	return list, nil
}

// frames maps a file like a program's text and returns the page frame number of each of its pages.
func frames(path string) ([]uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	mapped, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("map %q: %w", path, err)
	}
	defer unix.Munmap(mapped)
	if err := unix.Madvise(mapped, unix.MADV_POPULATE_READ); err != nil { // a fault for each page
		return nil, fmt.Errorf("read %q through its mapping: %w", path, err)
	}
	pagemap, err := openPagemap("self")
	if err != nil {
		return nil, err
	}
	defer pagemap.Close()
	var list []uint64
	for off := 0; off < len(mapped); off += 4096 {
		frame, err := pagemap.frame(address(mapped) + uintptr(off))
		if err != nil {
			return nil, err
		}
		if frame == 0 {
			return nil, fmt.Errorf("page %d of %q is not in memory", off/4096, path)
		}
		list = append(list, frame)
	}
	return list, nil
}

// pagemap finds the page frames of a process.
type pagemap struct{ *os.File }

func openPagemap(pid string) (pagemap, error) {
	f, err := os.Open("/proc/" + pid + "/pagemap")
	return pagemap{f}, err
}

// frame returns the page frame number at an address, or 0 if there is none.
func (p pagemap) frame(at uintptr) (uint64, error) {
	var entry [8]byte
	if _, err := p.ReadAt(entry[:], int64(at)/4096*8); err != nil {
		return 0, fmt.Errorf("read the pagemap: %w", err)
	}
	const present, number = 1 << 63, 1<<55 - 1
	v := binary.LittleEndian.Uint64(entry[:])
	if v&present == 0 {
		return 0, nil
	}
	return v & number, nil
}
