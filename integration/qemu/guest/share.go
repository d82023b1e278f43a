//go:build linux

package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/kernel"
)

// processes is how many are started of one image.
const processes = 10

// share proves what the memory of containers is made of: it starts processes of one dynamic program in overlays over
// each image and asks the kernel about their pages, then reads everything and asks for the page cache, then compares
// the frames of one file in all images. With a module, the images are mounted with that.
func share(t task.Task, answer *task.Answer) error {
	var driver mount.Driver = erofs.DAX{}
	if t.Module != "" {
		if err := load(t.Module, ""); err != nil {
			return err
		}
		driver = kernel.Driver{}
	}
	dirs, err := mountImages(t, driver, answer)
	if err != nil {
		return err
	}
	for _, d := range dirs {
		if err := runMany(d, t.Program, answer); err != nil {
			return err
		}
		if t.File != "" {
			frames, err := frames(filepath.Join(d, t.File))
			if err != nil {
				return err
			}
			answer.Frames = append(answer.Frames, frames)
		}
	}
	before, err := meminfo("Cached")
	if err != nil {
		return err
	}
	for _, d := range dirs {
		n, err := readAll(d)
		if err != nil {
			return err
		}
		answer.Read += n
	}
	after, err := meminfo("Cached")
	answer.Cached = after - before
	return err
}

// runMany starts a program several times, each in an overlay of its own over the image, and records their memory when
// all run: the vDSO also counts as file pages, and only then is each one's part of it less than 1 KiB. The program must
// write a line when it is up, and wait for the end of its input.
func runMany(image string, argv []string, answer *task.Answer) error {
	var pids []int
	for range processes {
		root, err := overlay(image)
		if err != nil {
			return err
		}
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		cmd.Dir = "/"
		cmd.Stderr = os.Stdout
		in, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("start %q: %w", argv, err)
		}
		defer func() { // they all run until the last one was measured
			in.Close()
			cmd.Wait()
		}()
		if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			return fmt.Errorf("%q did not come up: %w", argv, err)
		}
		pids = append(pids, cmd.Process.Pid)
	}
	for _, pid := range pids {
		pss, err := rollup(pid, "Pss_File")
		if err != nil {
			return err
		}
		clean, err := rollup(pid, "Private_Clean")
		if err != nil {
			return err
		}
		answer.PssFile = append(answer.PssFile, pss)
		answer.Clean = append(answer.Clean, clean)
	}
	return nil
}

// rollup returns one field of /proc/PID/smaps_rollup, in KiB.
func rollup(pid int, field string) (int64, error) {
	return kib(fmt.Sprintf("/proc/%d/smaps_rollup", pid), field)
}

// meminfo returns one field of /proc/meminfo, in KiB.
func meminfo(field string) (int64, error) { return kib("/proc/meminfo", field) }

func kib(path, field string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for _, line := range strings.Split(string(b), "\n") {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			return strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(value, "kB")), 10, 64)
		}
	}
	return 0, fmt.Errorf("no field %q in %q", field, path)
}

// readAll reads every regular file below dir and returns how much that was.
func readAll(dir string) (total int64, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		n, err := io.Copy(io.Discard, f)
		total += n
		return err
	})
	return total, err
}

// frames maps a file as a program's text is mapped and returns the number of the page frame behind each of its pages.
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
	if err := unix.Madvise(mapped, unix.MADV_POPULATE_READ); err != nil { // a fault of each page
		return nil, fmt.Errorf("read %q through its mapping: %w", path, err)
	}
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, err
	}
	defer pagemap.Close()
	page := os.Getpagesize()
	var list []uint64
	for off := 0; off < len(mapped); off += page {
		var entry [8]byte
		if _, err := pagemap.ReadAt(entry[:], int64(address(mapped)+uintptr(off))/int64(page)*8); err != nil {
			return nil, fmt.Errorf("read the pagemap: %w", err)
		}
		const present, number = 1 << 63, 1<<55 - 1
		v := binary.LittleEndian.Uint64(entry[:])
		if v&present == 0 || v&number == 0 {
			return nil, fmt.Errorf("page %d of %q is not in memory: pagemap says %#x", off/page, path, v)
		}
		list = append(list, v&number)
	}
	return list, nil
}
