package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// figures are the needs of one snapshotter for all containers together, in bytes.
type figures struct {
	name     string
	mapped   int64 // pages of files in the processes, each counted once per process
	distinct int64 // physical pages behind them
	cached   int64 // page cache of the images' files and of the files below them; -1: the kernel cannot tell
	pool     int64 // the pool's part of cached
	disk     int64 // blocks taken on disk
}

func (f *figures) add(d *demo, ps []*process) error {
	frames := map[uint64]bool{}
	for _, p := range ps {
		f.mapped += int64(p.Mapped) * pageSize
		for frame := range p.Frames {
			frames[frame] = true
		}
	}
	f.distinct = int64(len(frames)) * pageSize
	err := d.eachFile(f.name, func(file *os.File, st fs.FileInfo, onDisk bool) error {
		if f.cached >= 0 {
			n, err := cachedBytes(file)
			switch {
			case errors.Is(err, unix.ENOSYS):
				f.cached = -1
			case errors.Is(err, unix.EOPNOTSUPP):
			case err != nil:
				return err
			default:
				f.cached += n
				if file.Name() == d.poolPath() {
					f.pool = n
				}
			}
		}
		if onDisk {
			f.disk += st.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	return err
}

// poolPath returns the path of the pool's file.
func (d *demo) poolPath() string {
	if d.pool == "tmpfs" {
		return filepath.Join(d.Run, "pool")
	}
	return d.PoolFile()
}

// eachFile calls f once for each regular file of a snapshotter: those below its root (onDisk), and
// those that its mounted images show. A file in several images counts once.
func (d *demo) eachFile(snapshotter string, f func(file *os.File, st fs.FileInfo, onDisk bool) error) error {
	root := filepath.Join(d.Dir, "containerd/root/io.containerd.snapshotter.v1."+snapshotter)
	if snapshotter == "daxfs" {
		root = d.DaemonRoot()
	}
	seen := map[[2]uint64]bool{}
	once := func(file *os.File, st fs.FileInfo, onDisk bool) error {
		sys := st.Sys().(*syscall.Stat_t)
		id := [2]uint64{uint64(sys.Dev), sys.Ino}
		if seen[id] {
			return nil
		}
		seen[id] = true
		return f(file, st, onDisk)
	}
	if err := walk(root, func(file *os.File, st fs.FileInfo) error { return once(file, st, true) }); err != nil {
		return err
	}
	shown := func(file *os.File, st fs.FileInfo) error { return once(file, st, false) }
	if snapshotter == "daxfs" && d.pool == "tmpfs" {
		if err := walk(d.poolPath(), shown); err != nil {
			return err
		}
	}
	if snapshotter == "overlayfs" {
		return nil // its files are below its root
	}
	mounts, err := d.imageMounts(snapshotter)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if err := walk(m.Mountpoint, shown); err != nil {
			return err
		}
	}
	return nil
}

// imageMounts lists the mounts of images, without those of containers.
func (d *demo) imageMounts(snapshotter string) ([]*mountinfo.Info, error) {
	return mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		if snapshotter == "daxfs" {
			return !strings.HasPrefix(m.Mountpoint, filepath.Join(d.DaemonRoot(), "images")+"/"), false
		}
		ours := strings.HasPrefix(m.Mountpoint, d.DaemonRoot()+"/")
		stacks := strings.HasPrefix(m.Mountpoint, d.Run+"/") || strings.HasPrefix(m.Mountpoint, d.Dir+"/")
		return ours || m.FSType != "erofs" || !stacks, false
	})
}

// walk opens all regular files below root in the same file system.
func walk(root string, f func(*os.File, fs.FileInfo) error) error {
	top, err := os.Lstat(root)
	if err != nil {
		return err
	}
	device := deviceOf(top)
	return filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err != nil {
			return err
		}
		st, err := e.Info()
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case e.IsDir() && deviceOf(st) != device:
			return fs.SkipDir
		case !e.Type().IsRegular():
			return nil
		}
		file, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer file.Close()
		return f(file, st)
	})
}

func deviceOf(st fs.FileInfo) uint64 {
	return uint64(st.Sys().(*syscall.Stat_t).Dev)
}

// cachedBytes returns the bytes of a file in the page cache. The error is ENOSYS before Linux 6.5.
func cachedBytes(f *os.File) (int64, error) {
	var c unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &c, 0); err != nil {
		if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) {
			return 0, err
		}
		return 0, fmt.Errorf("cachestat %q: %w", f.Name(), err)
	}
	return int64(c.Cache) * pageSize, nil
}

// dropCache drops the unused pages of a snapshotter's files, and of no other files.
func (d *demo) dropCache(snapshotter string) error {
	return d.eachFile(snapshotter, func(file *os.File, _ fs.FileInfo, onDisk bool) error {
		if !onDisk {
			return nil
		}
		if err := unix.Fdatasync(int(file.Fd())); err != nil {
			return fmt.Errorf("sync %q: %w", file.Name(), err)
		}
		return unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED)
	})
}
