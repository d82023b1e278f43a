// Package overlay asks the kernel about overlay mounts without making any.
package overlay

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Try makes an unattached overlay with options, and drops it. The error wraps that of the kernel.
func Try(options []string) error {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fsopen overlay: %w", err)
	}
	defer unix.Close(fd)
	for _, o := range options {
		key, value, isString := strings.Cut(o, "=")
		if isString {
			err = unix.FsconfigSetString(fd, key, value)
		} else {
			err = unix.FsconfigSetFlag(fd, key)
		}
		if err != nil {
			return fmt.Errorf("overlay option %q: %w", o, err)
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return fmt.Errorf("trial overlay: %w", err)
	}
	return nil
}
