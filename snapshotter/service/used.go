package service

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// usedElsewhere returns a process that sees something made from the image mounted on dir, or "": an overlay over it, or a
// bind mount of it (a container's image volume). containerd removes a snapshot only after its container ended, but nothing
// forces a client to, and what a container mounted is in its own mount namespace, where unmounting dir here changes
// nothing. Lowers that containerd mapped to other owners have other names and are not seen.
func usedElsewhere(dir string) (string, error) {
	own, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
	if err != nil {
		return "", err
	}
	device := ""
	if len(own) > 0 {
		device = fmt.Sprintf("%d:%d", own[0].Major, own[0].Minor)
	}
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
		if err != nil {
			continue
		}
		if where := user(raw, dir, device); where != "" {
			return fmt.Sprintf("%q of process %s in mount namespace %s", where, p.Name(), ns), nil
		}
	}
	return "", nil
}

// user returns a mount point of a mountinfo at which something made from the image on dir is, or "". device is that of
// the mount on dir, "major:minor", or "" if dir is no mount point.
func user(mounts []byte, dir, device string) string {
	// A copy of the mount itself comes with a recursive bind mount of a directory above it, as programs make that watch
	// the whole machine. They use nothing in it.
	copied := filepath.Join("/", filepath.Base(filepath.Dir(dir)), filepath.Base(dir))
	for line := range bytes.Lines(mounts) {
		head, tail, ok := bytes.Cut(line, []byte(" - "))
		fields := strings.Fields(string(head)) // id, parent, device, root, mount point, ...
		if !ok || len(fields) < 5 {
			continue
		}
		if bytes.HasPrefix(tail, []byte("overlay ")) && bytes.Contains(tail, []byte(dir)) ||
			device != "" && fields[2] == device && !strings.HasSuffix(fields[4], copied) {
			return fields[4]
		}
	}
	return ""
}
