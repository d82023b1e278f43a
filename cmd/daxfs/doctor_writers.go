package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// checkWriters finds processes that can write to the pool of the running daemon through a mapping, such
// as a virtual machine monitor without readonly=on. A guest cannot tell: its kernel does not know
// whether the memory is read-only.
func checkWriters(pool string, daemon int, add adder) {
	var st unix.Stat_t
	if pool == "" || unix.Stat(pool, &st) != nil {
		return
	}
	found, err := findWriters("/proc", inode{st.Dev, st.Ino}, daemon)
	if err != nil {
		add("nobody else can write to the pool", false, "%v; run daxfs doctor as root", err)
		return
	}
	add("nobody else can write to the pool", len(found) == 0,
		"%s can write to %s, and so change every image: give it the memory read-only (daxfs vm args)",
		strings.Join(found, ", "), pool)
}

// findWriters returns the processes that map a file writable and shared, except the daemon, process own.
func findWriters(proc string, file inode, own int) (found []string, err error) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == own {
			continue
		}
		// In another PID namespace the daemon gave another number. The pool's lock admits one daemon only.
		exe, _ := os.Readlink(filepath.Join(proc, e.Name(), "exe"))
		if strings.HasPrefix(filepath.Base(exe), "daxfs-snapshotter") {
			continue
		}
		writes := false
		err = eachMapping(proc, e.Name(), func(v mapping) { writes = writes || v.file == file && v.writes })
		if err != nil && !gone(err) {
			return nil, fmt.Errorf("process %d: %w", pid, err)
		}
		if writes {
			name, _ := os.ReadFile(filepath.Join(proc, e.Name(), "comm"))
			found = append(found, fmt.Sprintf("process %d (%s)", pid, strings.TrimSpace(string(name))))
		}
	}
	return found, nil
}
