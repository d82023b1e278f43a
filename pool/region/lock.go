package region

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// BusyError is an ErrBusy for a file that another process has locked.
type BusyError struct {
	Path string
	PID  int // 0 if the holder is hidden, as inside a container
}

// Error names the holder.
func (e *BusyError) Error() string {
	if e.PID == 0 {
		return fmt.Sprintf("%q is in use by another process", e.Path)
	}
	return fmt.Sprintf("%q is in use by process %d", e.Path, e.PID)
}

// Is makes errors.Is(err, ErrBusy) true.
func (e *BusyError) Is(target error) bool { return target == ErrBusy }

// Flock takes the exclusive lock of an open file, or returns a *BusyError that names the holder. The
// lock ends when the file is closed, at the latest when the process dies.
func Flock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EWOULDBLOCK):
			return &BusyError{Path: f.Name(), PID: flockHolder(f, "/proc/locks")}
		}
		return fmt.Errorf("lock %q: %w", f.Name(), err)
	}
}

// flockHolder finds the holder of the flock of a file in /proc/locks, or returns 0. Lines there look like
// "1: FLOCK  ADVISORY  WRITE 712 fe:00:1235 0 EOF".
func flockHolder(f *os.File, locks string) int {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0
	}
	in, err := os.Open(locks)
	if err != nil {
		return 0
	}
	defer in.Close()
	want := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for s := bufio.NewScanner(in); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) < 6 || fields[1] != "FLOCK" || fields[5] != want {
			continue
		}
		if pid, err := strconv.Atoi(fields[4]); err == nil && pid > 0 {
			return pid
		}
	}
	return 0
}

// LockHolder returns the process that holds the exclusive lock of a file, or 0 if none is visible.
func LockHolder(path string) int {
	f, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer f.Close()
	return flockHolder(f, "/proc/locks")
}
