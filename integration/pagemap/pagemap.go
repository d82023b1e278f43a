// Package pagemap reads which physical pages a process has mapped, from /proc/PID/maps and
// /proc/PID/pagemap. Only root can read page frame numbers.
package pagemap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// PageSize is the size of a page in bytes.
const PageSize = 4096

// Process holds the physical pages of a process's mapped files.
type Process struct {
	PID    int
	Mapped int                          // pages of files in its address space
	Frames map[uint64]bool              // page frame numbers of those pages
	Text   map[string]map[uint64]uint64 // program text: path -> offset in the file -> page frame number
}

// Bits of an entry of /proc/PID/pagemap, see Documentation/admin-guide/mm/pagemap.rst of Linux.
const (
	pagePresent = 1 << 63
	pageFile    = 1 << 61 // of a file or shared; not a private copy
	frameMask   = 1<<55 - 1
)

// Read reads the maps and the pagemap of a process.
func Read(pid int) (*Process, error) {
	p := &Process{PID: pid, Frames: map[uint64]bool{}, Text: map[string]map[uint64]uint64{}}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	// If this process has another root, such as a chroot, the kernel prefixes the path to the container's root.
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
		entries := make([]byte, (last-first)/PageSize*8)
		if _, err := pagemap.ReadAt(entries, int64(first/PageSize*8)); err != nil && !errors.Is(err, io.EOF) {
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

// add counts one mapping. entries are its pagemap entries.
func (p *Process) add(file string, text bool, offset uint64, entries []byte) {
	for i := 0; i+8 <= len(entries); i += 8 {
		e := binary.LittleEndian.Uint64(entries[i:])
		if e&pagePresent == 0 || e&pageFile == 0 {
			continue
		}
		frame := e & frameMask
		p.Mapped++
		p.Frames[frame] = true
		if text {
			if p.Text[file] == nil {
				p.Text[file] = map[uint64]uint64{}
			}
			p.Text[file][offset+uint64(i)/8*PageSize] = frame
		}
	}
}
