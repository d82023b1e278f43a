package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"strconv"
	"strings"
)

const pageSize = 4096

// process is a container's program and the physical pages of files that it has mapped.
type process struct {
	container string
	image     int // index in imageNames
	pid       int
	mapped    int                          // pages of files in its address space
	frames    map[uint64]bool              // page frame numbers of those
	text      map[string]map[uint64]uint64 // program text: path -> offset in the file -> page frame number
}

// Bits of an entry of /proc/PID/pagemap, see Documentation/admin-guide/mm/pagemap.rst of Linux.
const (
	pagePresent = 1 << 63
	pageFile    = 1 << 61 // of a file (or shared); not a private copy
	frameMask   = 1<<55 - 1
)

// readProcess reads the maps and the pagemap of a process.
func readProcess(pid int) (*process, error) {
	p := &process{pid: pid, frames: map[uint64]bool{}, text: map[string]map[uint64]uint64{}}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	// Where this process has another root, in a chroot for instance, the kernel puts the way to the container's in front.
	root, err := os.Readlink(fmt.Sprintf("/proc/%d/root", pid))
	if err != nil {
		return nil, err
	}
	pagemap, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, err
	}
	defer pagemap.Close()
	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line) // address perms offset device inode path
		if len(f) < 6 || f[4] == "0" || !strings.HasPrefix(f[5], "/") {
			continue
		}
		first, last, err := parseRange(f[0])
		if err != nil {
			return nil, fmt.Errorf("maps line %q: %w", line, err)
		}
		offset, err := strconv.ParseUint(f[2], 16, 64)
		if err != nil {
			return nil, fmt.Errorf("maps line %q: %w", line, err)
		}
		entries := make([]byte, (last-first)/pageSize*8)
		if _, err := pagemap.ReadAt(entries, int64(first/pageSize*8)); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		file := "/" + strings.TrimPrefix(strings.TrimPrefix(f[5], root), "/")
		p.add(file, strings.Contains(f[1], "x"), offset, entries)
	}
	return p, nil
}

func parseRange(s string) (first, last uint64, err error) {
	a, b, _ := strings.Cut(s, "-")
	if first, err = strconv.ParseUint(a, 16, 64); err != nil {
		return 0, 0, err
	}
	last, err = strconv.ParseUint(b, 16, 64)
	return first, last, err
}

// add counts one mapping, whose pagemap entries are given.
func (p *process) add(file string, text bool, offset uint64, entries []byte) {
	for i := 0; i+8 <= len(entries); i += 8 {
		e := binary.LittleEndian.Uint64(entries[i:])
		if e&pagePresent == 0 || e&pageFile == 0 {
			continue
		}
		frame := e & frameMask
		p.mapped++
		p.frames[frame] = true
		if text {
			if p.text[file] == nil {
				p.text[file] = map[uint64]uint64{}
			}
			p.text[file][offset+uint64(i)/8*pageSize] = frame
		}
	}
}

// library is program text that every container has mapped.
type library struct {
	file string // path in the container
	// For each image: pages that are in memory in all its containers, and how many of these are one physical page.
	common, same [2]int
	// sample is the offset of a page that all have, frames where each of the processes has it.
	sample uint64
	frames []uint64
	// across tells how many pages both images have in memory, and how many of these are one physical page.
	acrossCommon, acrossSame int
}

// libraries compares the program text of processes, largest first.
func libraries(ps []*process) []library {
	var list []library
	for file := range ps[0].text {
		l := library{file: file}
		all := true
		for _, p := range ps {
			all = all && len(p.text[file]) > 0
		}
		if !all {
			continue
		}
		found := false
		for _, offset := range sortedKeys(ps[0].text[file]) {
			var frames [2][]uint64
			for _, p := range ps {
				if frame, ok := p.text[file][offset]; ok {
					frames[p.image] = append(frames[p.image], frame)
				}
			}
			complete := 0
			for i := range frames {
				if len(frames[i])*2 != len(ps) {
					continue
				}
				complete++
				l.common[i]++
				if allEqual(frames[i]) {
					l.same[i]++
				}
			}
			if complete < 2 {
				continue
			}
			l.acrossCommon++
			if frames[0][0] == frames[1][0] && frames[0][0] != 0 {
				l.acrossSame++
			}
			if !found {
				found = true
				l.sample, l.frames = offset, append(frames[0], frames[1]...)
			}
		}
		if found {
			list = append(list, l)
		}
	}
	sort.Slice(list, func(i, j int) bool { return list[i].common[0] > list[j].common[0] })
	return list
}

func allEqual(frames []uint64) bool {
	for _, f := range frames {
		if f != frames[0] || f == 0 { // 0: the kernel does not tell
			return false
		}
	}
	return true
}

func sortedKeys(m map[uint64]uint64) []uint64 {
	keys := make([]uint64, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Slice(keys, func(i, j int) bool { return keys[i] < keys[j] })
	return keys
}
