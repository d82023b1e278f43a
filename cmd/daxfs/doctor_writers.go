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
		add("nobody else can write to the pool", false, "%v; what the processes map is not known", err)
		return
	}
	add("nobody else can write to the pool", len(found) == 0,
		"%s can write to %s, and so change every image: give it the memory read-only (daxfs vm args)",
		strings.Join(found, ", "), pool)
}

// findWriters returns the processes that map a file writable and shared, except the daemon, process own.
func findWriters(proc string, file inode, own int) (found []string, err error) {
	err = eachProcess(proc, func(pid string) error {
		// In another PID namespace the daemon gave another number. The pool's lock admits one daemon only.
		exe, _ := os.Readlink(filepath.Join(proc, pid, "exe"))
		if pid == strconv.Itoa(own) || strings.HasPrefix(filepath.Base(exe), "daxfs-snapshotter") {
			return nil
		}
		writes := false
		err := eachMapping(proc, pid, func(v mapping) { writes = writes || v.file == file && v.writes })
		if writes {
			found = append(found, fmt.Sprintf("process %s (%s)", pid, nameOf(proc, pid)))
		}
		return err
	})
	return found, err
}
