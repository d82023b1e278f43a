package stack

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// makeDisk gives the directory of the stack its own file system, so that it can become full. Like
// other mounts below the directory, it ends when the stack is closed.
func (s *Stack) makeDisk(size int64) error {
	f, err := os.Create(s.diskFile())
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return err
	}
	for _, argv := range [][]string{
		{"mkfs.ext4", "-q", "-m", "0", s.diskFile()}, {"mount", "-o", "loop", s.diskFile(), s.Dir},
	} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%q: %w\n%s", argv, err, out)
		}
	}
	return nil
}

// diskFile returns the file below the stack's own file system, if there is one.
func (s *Stack) diskFile() string { return s.Dir + ".disk" }

// Disk returns the size of the file system with the stack's directory, and its free space, in bytes.
func (s *Stack) Disk() (size, free uint64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.Dir, &st); err != nil {
		return 0, 0, fmt.Errorf("look at the file system of %q: %w", s.Dir, err)
	}
	return st.Blocks * uint64(st.Bsize), st.Bavail * uint64(st.Bsize), nil
}
