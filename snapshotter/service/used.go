package service

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// usedElsewhere returns a process that sees an overlay mount with a lower below dir's parent, or "". containerd removes
// a snapshot only after its container ended, but nothing forces a client to, and a container's root is mounted in the
// container's own mount namespace, where unmounting dir here changes nothing.
func usedElsewhere(dir string) (string, error) {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return "", err
	}
	seen := map[string]bool{}
	for _, p := range procs {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		// Processes come and go while this runs: one that can not be read uses nothing.
		ns, err := os.Readlink(filepath.Join("/proc", p.Name(), "ns/mnt"))
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		raw, err := os.ReadFile(filepath.Join("/proc", p.Name(), "mountinfo"))
		if err == nil && hasLower(raw, dir) {
			return fmt.Sprintf("process %s in mount namespace %s", p.Name(), ns), nil
		}
	}
	return "", nil
}

// hasLower reports whether a mountinfo lists an overlay over dir.
func hasLower(mountinfo []byte, dir string) bool {
	for line := range bytes.Lines(mountinfo) {
		_, after, ok := bytes.Cut(line, []byte(" - "))
		if ok && bytes.HasPrefix(after, []byte("overlay ")) && bytes.Contains(after, []byte(dir)) {
			return true
		}
	}
	return false
}
