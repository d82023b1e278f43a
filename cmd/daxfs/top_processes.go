package main

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
)

// mappingProcess is a process that maps files of an image.
type mappingProcess struct {
	PID  int    `json:"pid"`
	Name string `json:"name"`
	// Mapped is the size of its address space over files of the image, in bytes; not all of it is in memory.
	Mapped int64 `json:"mapped"`
}

// mappers finds the processes that map files of images. It skips processes that end meanwhile.
type mappers struct {
	proc   string         // the path of /proc
	dirs   map[string]int // images by mount point
	inodes map[inode][]int
	spaces map[string]mountSpace // by mount namespace
}

// mountSpace holds the overlays over images in a mount namespace, by device number as in /proc/PID/maps.
type mountSpace map[string]overlayMount

// overlayMount is an overlay with images below.
type overlayMount struct {
	images []int
	points []string // its mount points
	upper  string
}

// findMappers returns the processes of each image, largest mapping first. files are the files of each image.
func findMappers(proc string, dirs []string, files []map[inode]bool) ([][]mappingProcess, error) {
	m := mappers{proc: proc, dirs: map[string]int{}, inodes: map[inode][]int{}, spaces: map[string]mountSpace{}}
	for i, dir := range dirs {
		if dir != "" {
			m.dirs[dir] = i
		}
		for id := range files[i] {
			m.inodes[id] = append(m.inodes[id], i)
		}
	}
	out := make([][]mappingProcess, len(dirs))
	err := eachProcess(proc, func(pid string) error {
		mapped, err := m.mapped(pid)
		if err != nil {
			return err
		}
		id, _ := strconv.Atoi(pid)
		name := nameOf(proc, pid)
		for i, n := range mapped {
			out[i] = append(out[i], mappingProcess{id, name, n})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, list := range out {
		slices.SortStableFunc(list, func(a, b mappingProcess) int { return cmp.Compare(b.Mapped, a.Mapped) })
	}
	return out, nil
}

// eachProcess calls do for each process, by its number. It skips processes that end meanwhile.
func eachProcess(proc string, do func(pid string) error) error {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		if err := do(e.Name()); err != nil && !gone(err) {
			return fmt.Errorf("process %s: %w", e.Name(), err)
		}
	}
	return nil
}

// nameOf returns the name of a process's program; empty if it has ended.
func nameOf(proc, pid string) string {
	name, _ := os.ReadFile(filepath.Join(proc, pid, "comm"))
	return strings.TrimSpace(string(name))
}

// gone reports whether an error says that a process has ended, or that we may not read it.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, fs.ErrPermission)
}

// mapped returns how much a process maps of each image.
func (m *mappers) mapped(pid string) (map[int]int64, error) {
	ns, err := os.Readlink(filepath.Join(m.proc, pid, "ns/mnt"))
	if err != nil {
		return nil, err
	}
	space, known := m.spaces[ns]
	if !known {
		if space, err = m.space(pid); err != nil {
			return nil, err
		}
		m.spaces[ns] = space
	}
	out := map[int]int64{}
	err = eachMapping(m.proc, pid, func(v mapping) {
		images := m.inodes[v.file]
		if o, over := space[v.dev]; over && !o.changed(v.path) {
			images = o.images
		}
		for _, i := range images {
			out[i] += v.bytes
		}
	})
	return out, err
}

// eachMapping calls do for each mapping of a file by a process.
func eachMapping(proc, pid string, do func(mapping)) error {
	f, err := os.Open(filepath.Join(proc, pid, "maps"))
	if err != nil {
		return err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		if v, ok := parseMapping(s.Text()); ok {
			do(v)
		}
	}
	return s.Err()
}

// mapping is a line of /proc/PID/maps about a file.
type mapping struct {
	bytes  int64
	writes bool   // to the file: it is writable and shared
	dev    string // MAJOR:MINOR, decimal
	file   inode
	path   string
}

func parseMapping(line string) (v mapping, ok bool) {
	// 7f0e6c000000-7f0e6c021000 r-xp 00000000 00:1f 4711    /usr/bin/true
	fields := strings.Fields(line)
	if len(fields) < 6 || !strings.HasPrefix(fields[5], "/") {
		return v, false
	}
	from, to, _ := strings.Cut(fields[0], "-")
	first, err1 := strconv.ParseUint(from, 16, 64)
	end, err2 := strconv.ParseUint(to, 16, 64)
	major, minor, _ := strings.Cut(fields[3], ":")
	maj, err3 := strconv.ParseUint(major, 16, 32)
	mnr, err4 := strconv.ParseUint(minor, 16, 32)
	ino, err5 := strconv.ParseUint(fields[4], 10, 64)
	if errors.Join(err1, err2, err3, err4, err5) != nil {
		return v, false
	}
	return mapping{
		bytes: int64(end - first), writes: len(fields[1]) == 4 && fields[1][1] == 'w' && fields[1][3] == 's',
		dev:  fmt.Sprintf("%d:%d", maj, mnr),
		file: inode{unix.Mkdev(uint32(maj), uint32(mnr)), ino},
		path: line[strings.IndexByte(line, '/'):],
	}, true
}

// space finds the overlays over images in the mount namespace of a process.
func (m *mappers) space(pid string) (mountSpace, error) {
	f, err := os.Open(filepath.Join(m.proc, pid, "mountinfo"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all, err := mountinfo.GetMountsFromReader(f, mountinfo.FSTypeFilter("overlay"))
	if err != nil {
		return nil, err
	}
	out := mountSpace{}
	for _, mnt := range all {
		var o overlayMount
		for _, dir := range mount.Lowers(mnt.VFSOptions) {
			if i, ok := m.dirs[dir]; ok {
				o.images = append(o.images, i)
			}
		}
		for option := range strings.SplitSeq(mnt.VFSOptions, ",") {
			if upper, ok := strings.CutPrefix(option, "upperdir="); ok {
				o.upper = upper
			}
		}
		if len(o.images) == 0 {
			continue
		}
		dev := fmt.Sprintf("%d:%d", mnt.Major, mnt.Minor)
		o.points = append(out[dev].points, mnt.Mountpoint)
		out[dev] = o
	}
	return out, nil
}

// changed reports whether a container has its own copy of the image's file.
func (o overlayMount) changed(path string) bool {
	if o.upper == "" {
		return false
	}
	for _, p := range o.points {
		rel, ok := strings.CutPrefix(path, strings.TrimSuffix(p, "/")+"/")
		if ok && exists(filepath.Join(o.upper, rel)) {
			return true
		}
	}
	return false
}
