package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// pseudoTerminal returns both ends of a terminal with 25 lines of 120 characters.
func pseudoTerminal(t *testing.T) (master, tty *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("needs pseudo terminals: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprint("/dev/pts/", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("needs pseudo terminals: %v", err)
	}
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 25, Col: 120}); err != nil {
		t.Fatal(err)
	}
	return master, tty
}

// terminal returns a terminal and what was written to it, once the terminal was closed.
func terminal(t *testing.T) (*os.File, func() string) {
	t.Helper()
	master, tty := pseudoTerminal(t)
	var seen bytes.Buffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(&seen, master) // ends with EIO when the terminal is closed
	}()
	return tty, func() string {
		tty.Close()
		<-done
		return seen.String()
	}
}

// TestProgressOnTerminal: a bar for each layer, also when the conversion fails, and nothing with --quiet.
func TestProgressOnTerminal(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	setup(t, dir)
	for _, c := range []struct {
		args   []string
		status int
		holds  []string
	}{
		{[]string{"oci:layout:v1"}, statusOK, []string{"sha256:", "done"}},
		{[]string{"oci:layout:v2"}, statusFailed, []string{"sha256:", "diff ID mismatch"}},
		{[]string{"oci:nowhere"}, statusFailed, []string{"not an OCI layout"}},
		{[]string{"rootfs:layout"}, statusOK, nil},
		{[]string{"--quiet", "oci:layout:v1"}, statusOK, nil},
	} {
		tty, text := terminal(t)
		args := append([]string{"daxfs", "convert", "-o", "image"}, c.args...)
		got := run(context.Background(), args, strings.NewReader(""), io.Discard, tty)
		seen := text()
		if got != c.status {
			t.Errorf("%q: status %d, expected %d: %s", c.args, got, c.status, seen)
		}
		if c.holds == nil && seen != "" {
			t.Errorf("%q: %q on the terminal, expected nothing", c.args, seen)
		}
		for _, h := range c.holds {
			if !strings.Contains(seen, h) {
				t.Errorf("%q: %q on the terminal, expected %q in it", c.args, seen, h)
			}
		}
	}
}

// TestProgressOnTerminalWithoutSize: bars would not be seen there, so there are lines.
func TestProgressOnTerminalWithoutSize(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	setup(t, dir)
	tty, text := terminal(t)
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{}); err != nil {
		t.Fatal(err)
	}
	got := run(context.Background(), []string{"daxfs", "convert", "-o", "image", "oci:layout:v1"}, strings.NewReader(""), io.Discard, tty)
	if seen := text(); got != statusOK || !strings.Contains(seen, "(2 of 2 layers)") {
		t.Errorf("status %d, %q on the terminal", got, seen)
	}
}
