//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
)

// hugePage is the size that one entry of the page table's middle level maps.
const hugePage = 2 << 20

// large maps a file of each image like a program that loads a model, reads a byte of each page, and
// counts the page faults and their sizes.
func (g *guest) large() error {
	dirs, err := g.mountImages(erofs.DAX{}, g.Images)
	if err != nil {
		return err
	}
	for _, d := range dirs {
		list, err := frames(filepath.Join(d, g.File))
		if err != nil {
			return err
		}
		g.answer.Frames = append(g.answer.Frames, list)
		faults, err := countFaults(filepath.Join(d, g.File))
		if err != nil {
			return err
		}
		g.answer.Faults = append(g.answer.Faults, faults)
	}
	return nil
}

// countFaults returns the number of page faults of one read through a private mapping aligned to 2 MiB.
func countFaults(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	size := uintptr(info.Size())
	// Newer kernels align the mapping themselves.
	room, err := unix.Mmap(-1, 0, int(size)+hugePage, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(room)
	skip := -address(room) & (hugePage - 1)
	at := room[skip : skip+size]
	if err := mapOver(at, f); err != nil {
		return 0, fmt.Errorf("map %q: %w", path, err)
	}
	before, err := minorFaults()
	if err != nil {
		return 0, err
	}
	var sum byte
	for off := 0; off < len(at); off += os.Getpagesize() {
		sum += at[off]
	}
	after, err := minorFaults()
	runtime.KeepAlive(sum) // keeps the compiler from dropping the reads
	return after - before, err
}

func minorFaults() (int64, error) {
	var u unix.Rusage
	err := unix.Getrusage(unix.RUSAGE_SELF, &u)
	return u.Minflt, err
}
