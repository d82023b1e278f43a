//go:build linux

package main

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// alarming matches the lines in which the kernel reports an internal error.
var alarming = regexp.MustCompile(`WARNING|\bBUG\b|Oops|RIP:|[Bb]ad page|hung task|blocked for more|refcount|` +
	`use-after-free|UBSAN|Call Trace`)

// watched calls do and adds the kernel's warnings during the call to the answer.
func (g *guest) watched(do func() error) error {
	// Each read of the device returns one record of the log, starting at the descriptor's position.
	log, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the kernel's log: %w", err)
	}
	defer unix.Close(log)
	if _, err := unix.Seek(log, 0, unix.SEEK_END); err != nil {
		return fmt.Errorf("go to the end of the kernel's log: %w", err)
	}
	done := do()
	record := make([]byte, 8192)
	for {
		n, err := unix.Read(log, record)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return done
		case err != nil: // EPIPE: records were overwritten before they were read
			return errors.Join(done, fmt.Errorf("read the kernel's log: %w", err))
		}
		// priority,number,time,flags;message
		_, message, _ := strings.Cut(string(record[:n]), ";")
		message, _, _ = strings.Cut(message, "\n")
		if alarming.MatchString(message) {
			g.answer.Warnings = append(g.answer.Warnings, message)
		}
	}
}
