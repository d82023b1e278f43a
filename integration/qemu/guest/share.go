//go:build linux

package main

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/kernel"
)

// processes is the number of processes per image.
const processes = 2

// share measures the memory of containers. For each image it reads everything and queries the page
// cache, starts processes of a dynamic program in overlays and queries their pages, and gets the page
// frames of one file. All processes run until the end; late images are added meanwhile. A module, if
// given, mounts the images.
func (g *guest) share() error {
	var driver mount.Driver = erofs.DAX{}
	if g.Module != "" {
		if err := load(g.Module, ""); err != nil {
			return err
		}
		driver = kernel.Driver{}
	}
	s, err := g.openPool(driver)
	if err != nil {
		return err
	}
	if g.Phys == 0 {
		if g.answer.Memory, err = memory(); err != nil {
			return err
		}
	}
	for _, key := range g.Images {
		if err := g.use(s, key); err != nil {
			return fmt.Errorf("image %q: %w", key, err)
		}
	}
	if len(g.Late) == 0 {
		return nil
	}
	if err := pause(); err != nil {
		return err
	}
	for _, key := range g.Late {
		if err := g.use(s, key); err != nil {
			return fmt.Errorf("late image %q: %w", key, err)
		}
	}
	return nil
}

// use mounts one image, reads all of it, and runs it.
func (g *guest) use(s *shared, key string) error {
	dir, err := g.mountImage(s, key)
	if err != nil {
		return err
	}
	before, err := cached()
	if err != nil {
		return err
	}
	n, err := readAll(dir)
	if err != nil {
		return err
	}
	after, err := cached()
	if err != nil {
		return err
	}
	g.answer.Read, g.answer.Cached = append(g.answer.Read, n), append(g.answer.Cached, after-before)
	for range processes {
		if err := g.runOne(dir); err != nil {
			return err
		}
	}
	if g.File == "" {
		return nil
	}
	frames, err := frames(filepath.Join(dir, g.File))
	g.answer.Frames = append(g.answer.Frames, frames)
	return err
}

// runOne starts the program in its own overlay over the image, and records its memory. The program
// must write a line when it is ready, and wait for the end of its input.
func (g *guest) runOne(image string) error {
	root, err := g.overlay(image)
	if err != nil {
		return err
	}
	cmd := exec.Command(g.Program[0], g.Program[1:]...)
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
		return fmt.Errorf("start %q: %w", g.Program, err)
	}
	g.later("end a program", func() error {
		in.Close()
		_ = cmd.Wait() // the interrupted read sets its status
		return nil
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		return fmt.Errorf("%q did not come up: %w", g.Program, err)
	}
	pages, err := text(cmd.Process.Pid, root)
	if err != nil {
		return err
	}
	clean, err := kib(fmt.Sprintf("/proc/%d/smaps_rollup", cmd.Process.Pid), "Private_Clean")
	g.answer.Text, g.answer.Clean = append(g.answer.Text, pages), append(g.answer.Clean, clean)
	return err
}

// cached returns the kernel's cache of files and of block devices, in KiB.
func cached() (int64, error) {
	var sum int64
	for _, field := range []string{"Cached", "Buffers"} {
		n, err := kib("/proc/meminfo", field)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

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

// readAll reads every regular file below dir and returns the number of bytes.
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
