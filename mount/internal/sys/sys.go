// Package sys holds the system calls that the mount drivers share.
package sys

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

var (
	// ErrBusy is mount.ErrBusy.
	ErrBusy = errors.New("in use")
	// ErrUnsupported is mount.ErrUnsupported.
	ErrUnsupported = errors.New("not supported here")
)

// Mount describes one mount for Do.
type Mount struct {
	// Type is the file system type; Source is the device or file in the mount table.
	Type, Source string
	// Options are file system options, "key" or "key=value".
	Options []string
	// FDs are options whose value is an open file.
	FDs map[string]int
	// Restrict adds nosuid and nodev. Every mount is read-only.
	Restrict bool
}

// Do mounts m on dir, read-only. It uses fsopen(2), the only way to pass descriptors and to get the
// kernel's complaint as text, which becomes part of the error.
func Do(m Mount, dir string) error {
	fd, err := unix.Fsopen(m.Type, unix.FSOPEN_CLOEXEC)
	if err != nil {
		if errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("this kernel has no file system %q: %w", m.Type, ErrUnsupported)
		}
		return explain(fmt.Errorf("fsopen %s: %w", m.Type, err))
	}
	defer unix.Close(fd)
	if m.Source != "" {
		if err := unix.FsconfigSetString(fd, "source", m.Source); err != nil {
			return explain(fmt.Errorf("source %q: %w%s", m.Source, err, words(fd)))
		}
	}
	if err := unix.FsconfigSetFlag(fd, "ro"); err != nil {
		return explain(fmt.Errorf("option ro: %w%s", err, words(fd)))
	}
	for _, o := range m.Options {
		if k, v, ok := strings.Cut(o, "="); ok {
			err = unix.FsconfigSetString(fd, k, v)
		} else {
			err = unix.FsconfigSetFlag(fd, o)
		}
		if err != nil {
			return explain(fmt.Errorf("option %q: %w%s", o, err, words(fd)))
		}
	}
	for k, v := range m.FDs {
		if err := unix.FsconfigSetFd(fd, k, v); err != nil {
			return explain(fmt.Errorf("option %q: %w%s", k, err, words(fd)))
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return explain(fmt.Errorf("mount %s %q: %w%s", m.Type, m.Source, err, words(fd)))
	}
	attr := unix.MOUNT_ATTR_RDONLY
	if m.Restrict {
		attr |= unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
	}
	mfd, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return explain(fmt.Errorf("fsmount %s %q: %w%s", m.Type, m.Source, err, words(fd)))
	}
	defer unix.Close(mfd)
	if dir == "" { // a trial: the mount goes away with its descriptor
		return nil
	}
	if err := unix.MoveMount(mfd, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return explain(fmt.Errorf("attach %s to %q: %w", m.Type, dir, err))
	}
	return nil
}

// explain adds remedies to errors that have one common cause.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: mounting needs CAP_SYS_ADMIN: run as root: %w", err, ErrUnsupported)
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%w: the kernel is older than 5.2 or a seccomp filter blocks the call: %w",
			err, ErrUnsupported)
	}
	return err
}

// words returns the messages that the kernel queued for a file system context.
func words(fd int) string {
	var out []string
	buf := make([]byte, 1024)
	for range 16 {
		n, err := unix.Read(fd, buf)
		if err != nil || n <= 0 {
			break
		}
		line := bytes.TrimSpace(buf[:n])
		if len(line) > 2 && line[1] == ' ' { // prefix "e ", "w " or "i "
			line = line[2:]
		}
		out = append(out, string(line))
	}
	if len(out) == 0 {
		return ""
	}
	return " (kernel: " + strings.Join(out, "; ") + ")"
}

// Top returns the uppermost mount on dir and the number of mounts there; nil and 0 if dir is no mount
// point.
func Top(dir string) (*mountinfo.Info, int, error) {
	all, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.Mountpoint != dir, false })
	if err != nil {
		return nil, 0, fmt.Errorf("read mount table: %w", err)
	}
	if len(all) == 0 {
		return nil, 0, nil
	}
	// A mount on top of another has that one as its parent.
	top := all[0]
	for range all {
		for _, m := range all {
			if m.Parent == top.ID {
				top = m
			}
		}
	}
	return top, len(all), nil
}

// Unmount removes the top mount on dir, if there is one. A busy mount gives ErrBusy, after a few
// attempts: the kernel may still be closing the files of a process that has just ended.
func Unmount(ctx context.Context, dir string) error {
	var err error
	for wait := 5 * time.Millisecond; ; wait *= 2 {
		err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		if !errors.Is(err, unix.EBUSY) || wait > 200*time.Millisecond {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
	switch {
	case err == nil, errors.Is(err, unix.EINVAL), errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("unmount %q: a process has its working directory or a file in it "+
			"(fuser -vm %[1]q names it), or something is mounted below it: %w", dir, ErrBusy)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("unmount %q: %w: needs CAP_SYS_ADMIN", dir, err)
	}
	return fmt.Errorf("unmount %q: %w", dir, err)
}

// Detach removes every mount on dir, used or not: for mounts that are dead or not what they should be.
func Detach(dir string) error {
	for range 64 {
		err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("detach %q: %w", dir, err)
		}
	}
	return fmt.Errorf("detach %q: still a mount point after 64 unmounts", dir)
}

// Alive asks the file system on dir a question that it cannot answer from a cache. The error is
// ENOTCONN if its server is dead, and wraps context.DeadlineExceeded if no answer comes in time. The
// waiting goroutine ends when the kernel gives up.
func Alive(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		var st unix.Statfs_t
		done <- unix.Statfs(dir, &st)
	}()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("statfs %q: %w", dir, err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("statfs %q: no answer: %w", dir, ctx.Err())
	}
}

// Real returns dir as the kernel names it: absolute, without symbolic links. It resolves only the
// parent, so that it works on a dead mount point.
func Real(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if dir == "/" {
		return dir, nil
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(dir))
	if err != nil {
		return "", err
	}
	full := filepath.Join(parent, filepath.Base(dir))
	if target, err := os.Readlink(full); err == nil {
		if !filepath.IsAbs(target) {
			target = filepath.Join(parent, target)
		}
		return filepath.EvalSymlinks(target)
	}
	return full, nil
}
