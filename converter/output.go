package converter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// output is a file that gets its name only once it is complete.
type output struct {
	*os.File
	path string
	temp string // temporary name, or empty
}

// newOutput creates a file in the directory of path. If the file system allows, the file has no name,
// so that not even SIGKILL leaves it behind.
func newOutput(path string) (*output, error) {
	// Detect an unusable name now: linking fails only after all layers are read.
	fi, err := os.Stat(path)
	switch {
	case err == nil && !fi.Mode().IsRegular():
		return nil, fmt.Errorf("output %q is a %s, expected a regular file or nothing", path, kind(fi.Mode()))
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("output: %w", err)
	}
	// Keep a symbolic link and replace its target. (/dev/stdout is one.)
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() == os.ModeSymlink {
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return nil, fmt.Errorf("output is a symbolic link to nothing that can be replaced: %w", err)
		}
	}
	dir := filepath.Dir(path)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o666)
	if err == nil {
		return &output{File: os.NewFile(uintptr(fd), path), path: path}, nil
	}
	if errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("output %q: directory %q: %w", path, dir, err)
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return nil, &os.PathError{Op: "create", Path: path, Err: err}
	}
	f, err := os.CreateTemp(dir, ".daxfs-*") // without the output's name, which may have the maximum length
	if err != nil {
		return nil, err
	}
	o := &output{File: f, path: path, temp: f.Name()}
	// Use the permissions of any new file, as limited by the umask.
	mask := unix.Umask(0)
	unix.Umask(mask)
	if err := f.Chmod(os.FileMode(0o666 &^ mask)); err != nil {
		o.discard()
		return nil, err
	}
	return o, nil
}

// kind describes a file that is not regular.
func kind(m os.FileMode) string {
	switch {
	case m.IsDir():
		return "directory"
	case m&os.ModeNamedPipe != 0:
		return "pipe"
	case m&os.ModeSocket != 0:
		return "socket"
	}
	return "device"
}

// commit gives the file its name and replaces an existing file.
func (o *output) commit(sync bool) error {
	if sync {
		if err := o.Sync(); err != nil {
			return err
		}
	}
	if o.temp == "" {
		if err := o.link(); err != nil {
			return err
		}
	}
	if err := o.Close(); err != nil { // some file systems report a full disk only here
		return err
	}
	if err := os.Rename(o.temp, o.path); err != nil {
		return err
	}
	o.temp = ""
	if !sync {
		return nil
	}
	d, err := os.Open(filepath.Dir(o.path))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// link gives the file a temporary name: unlike a link, a rename can replace a file.
func (o *output) link() error {
	for i := range 1000 {
		name := filepath.Join(filepath.Dir(o.path), fmt.Sprintf(".daxfs-%d-%d", os.Getpid(), i))
		err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", o.Fd()), unix.AT_FDCWD, name,
			unix.AT_SYMLINK_FOLLOW)
		if err == nil {
			o.temp = name
			return nil
		}
		if err != unix.EEXIST {
			return &os.LinkError{Op: "link", Old: "temporary file", New: name, Err: err}
		}
	}
	return fmt.Errorf("no free temporary name beside %q", o.path)
}

// discard removes the file unless it was committed.
func (o *output) discard() {
	o.Close()
	if o.temp != "" {
		os.Remove(o.temp)
	}
}
