package stack

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// footprint is the state that a stack can leave in the kernel.
type footprint struct {
	mounts []string // mount points
	loops  []string // loop device and its file
}

func takeFootprint() (footprint, error) {
	var f footprint
	infos, err := mountinfo.GetMounts(nil)
	if err != nil {
		return f, fmt.Errorf("read the mounts: %w", err)
	}
	for _, m := range infos {
		f.mounts = append(f.mounts, m.Mountpoint)
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return f, err
	}
	for _, l := range loops {
		if file, err := os.ReadFile(l); err == nil { // otherwise it was just detached
			f.loops = append(f.loops, strings.Split(l, "/")[3]+" "+strings.TrimSpace(string(file)))
		}
	}
	return f, nil
}

// Mounts lists the kernel's mount points below the directories of the stack.
func (s *Stack) Mounts() ([]string, error) {
	infos, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !within(m.Mountpoint, s.Dir) && !within(m.Mountpoint, s.Run) &&
			!within(m.Mountpoint, "/run/containerd"), false
	})
	if err != nil {
		return nil, fmt.Errorf("read the mounts: %w", err)
	}
	var points []string
	for _, m := range infos {
		points = append(points, m.Mountpoint)
	}
	return points, nil
}

func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// unmountAll unmounts the mounts that outlive the daemons, newest first. The daemon promises that
// image mounts stay, so finding some is no error. A failing unmount is one, because something still uses the mount.
func (s *Stack) unmountAll() error {
	points, err := s.Mounts()
	if err != nil {
		return err
	}
	slices.Reverse(points)
	var errs []error
	for _, p := range points {
		if err := unix.Unmount(p, 0); err != nil {
			errs = append(errs, fmt.Errorf("unmount %q: %w", p, err), unix.Unmount(p, unix.MNT_DETACH))
		}
	}
	return errors.Join(errs...)
}

// leaks compares the kernel's state with that before the stack. Loop devices and processes may need a
// moment after the last unmount, so it retries for a while.
func (s *Stack) leaks() error {
	var err error
	for range 100 {
		if err = s.leaksNow(); err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

func (s *Stack) leaksNow() error {
	now, err := takeFootprint()
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range added(s.before.mounts, now.mounts) {
		errs = append(errs, fmt.Errorf("left behind: mount %q", m))
	}
	for _, l := range added(s.before.loops, now.loops) {
		if strings.Contains(l, s.Dir) || strings.Contains(l, s.Run) { // others use loop devices as well
			errs = append(errs, fmt.Errorf("left behind: loop device %s", l))
		}
	}
	processes, err := ownProcesses()
	if err != nil {
		return err
	}
	for _, p := range processes {
		errs = append(errs, fmt.Errorf("left behind: process %s", p))
	}
	return errors.Join(errs...)
}

// added lists the elements of now that are not in before.
func added(before, now []string) []string {
	var list []string
	for _, s := range now {
		if !slices.Contains(before, s) {
			list = append(list, s)
		}
	}
	return list
}
