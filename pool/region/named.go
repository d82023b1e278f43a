package region

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Named returns the existing region with a name: a file, a persistent memory or DAX device, or a
// physical range as ADDRESS+SIZE, both decimal or with 0x.
func Named(name string) (Config, error) {
	if c, ok, err := PhysRange(name); err != nil {
		return Config{}, fmt.Errorf("%w: %w", ErrKind, err)
	} else if ok {
		return c, nil
	}
	c := Config{Path: name}
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return c, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		c.Kind = KindPmem
		return c, nil
	case unix.S_IFCHR:
		c.Kind = KindDevDAX
		return c, nil
	case unix.S_IFREG:
	default:
		return c, fmt.Errorf("%q is neither a file nor a device: %w", name, ErrKind)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(name, &fs); err != nil {
		return c, &os.PathError{Op: "statfs", Path: name, Err: err}
	}
	switch fs.Type {
	case unix.HUGETLBFS_MAGIC:
		c.Kind = KindHugetlbfs
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		c.Kind = KindTmpfs
	default:
		c.Kind = KindFile
	}
	return c, nil
}

// PhysRange returns the physical range with a name. ok is false if the name is not a range.
func PhysRange(name string) (_ Config, ok bool, _ error) {
	addr, size, ok := strings.Cut(name, "+")
	if !ok || strings.Contains(name, "/") {
		return Config{}, false, nil
	}
	phys, err1 := strconv.ParseUint(addr, 0, 64)
	n, err2 := strconv.ParseInt(size, 0, 64)
	if err := errors.Join(err1, err2); err != nil {
		return Config{}, false, fmt.Errorf("physical range %q, expected ADDRESS+SIZE: %w", name, err)
	}
	return Config{Kind: KindPhys, Phys: phys, Size: n}, true, nil
}
