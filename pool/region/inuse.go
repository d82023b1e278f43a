package region

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// InUse returns an error that wraps ErrBusy if the kernel reads the region at the moment: a mount, a loop device or a
// device-mapper window of it. A region in use must not be made anew. What the processes and kernels that map the memory
// by themselves do can not be seen.
func InUse(i Info) error { return thisHost.inUse(i) }

func (h host) inUse(i Info) error {
	if i.Path == "" {
		return nil
	}
	if i.BlockDevice != "" {
		var st unix.Stat_t
		if err := unix.Stat(i.BlockDevice, &st); err != nil {
			return &os.PathError{Op: "stat", Path: i.BlockDevice, Err: err}
		}
		return h.held(unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	path, err := filepath.Abs(i.Path)
	if err != nil {
		return err
	}
	loops, err := filepath.Glob(h.path("sys/block/loop*/loop/backing_file"))
	if err != nil {
		return err
	}
	for _, l := range loops {
		if b, err := os.ReadFile(l); err == nil && strings.TrimSpace(string(b)) == path {
			return fmt.Errorf("%q is under /dev/%s: %w", path, filepath.Base(filepath.Dir(filepath.Dir(l))), ErrBusy)
		}
	}
	b, err := os.ReadFile(h.path("proc/self/mountinfo"))
	if err != nil {
		return err
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		fields := strings.Fields(s.Text())
		if _, rest, ok := strings.Cut(s.Text(), " - "); ok && len(fields) > 4 {
			if f := strings.Fields(rest); len(f) > 1 && f[1] == path {
				return fmt.Errorf("%q is mounted on %q: %w", path, fields[4], ErrBusy)
			}
		}
	}
	return nil
}

// held tells whether any window lies on a block device.
func (h host) held(major, minor uint32) error {
	dir := h.path("sys/dev/block", fmt.Sprintf("%d:%d", major, minor), "holders")
	holders, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range holders {
		return fmt.Errorf("window %q (%s) lies on it: %w", host{dir}.attr(e.Name(), "dm/name"), e.Name(), ErrBusy)
	}
	return nil
}
