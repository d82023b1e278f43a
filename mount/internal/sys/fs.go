package sys

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// HasFilesystem returns nil if the kernel has the file system type, or a module to load for it.
func HasFilesystem(name, remedy string) error {
	fd, err := unix.Fsopen(name, unix.FSOPEN_CLOEXEC)
	switch {
	case err == nil:
		unix.Close(fd)
		return nil
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("this kernel has no file system %q: %s: %w", name, remedy, ErrUnsupported)
	}
	return explain(fmt.Errorf("look for file system %q: %w", name, err))
}

// MountOption returns the value of a file system option as the kernel shows it, if it is set.
func MountOption(m *mountinfo.Info, key string) (string, bool) {
	for o := range strings.SplitSeq(m.VFSOptions, ",") {
		if k, v, _ := strings.Cut(o, "="); k == key {
			return v, true
		}
	}
	return "", false
}

// MatchTop returns the only mount on dir if it has the type and the flags that Do sets. Otherwise the
// error says what is there instead.
func MatchTop(dir, fstype string, restrict bool) (*mountinfo.Info, error) {
	m, n, err := Top(dir)
	switch {
	case err != nil:
		return nil, err
	case m == nil:
		return nil, fmt.Errorf("nothing is mounted on %q", dir)
	case n > 1:
		return nil, fmt.Errorf("%d mounts lie on top of each other on %q", n, dir)
	case m.FSType != fstype:
		return nil, fmt.Errorf("%q is a mount of type %q, expected %q", dir, m.FSType, fstype)
	}
	opts := strings.Split(m.Options, ",")
	for o, want := range map[string]bool{"ro": true, "nosuid": restrict, "nodev": restrict} {
		if slices.Contains(opts, o) != want {
			return nil, fmt.Errorf("mount %q has options %q: expected %s=%t", dir, m.Options, o, want)
		}
	}
	return m, nil
}
