//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
)

// node makes the guest a machine that runs containers. The image on the first device becomes its root,
// mounted read-only with DAX, and the guest runs the scripts of the host until the host ends it.
func (g *guest) node() error {
	if err := awaitDevice(); err != nil {
		return err
	}
	if err := switchRoot(device); err != nil {
		return err
	}
	for n := 1; ; {
		script, err := os.ReadFile(host + fmt.Sprint(task.CommandFile, n))
		if err == nil {
			if err := runScript(n, string(script)); err != nil {
				return err
			}
			n++
			continue
		}
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if _, err := os.Stat(host + task.ResumeFile); err == nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// runScript runs one script. Its output is a file, because background programs would keep a pipe open.
func runScript(n int, script string) error {
	out, err := os.Create(host + fmt.Sprint(task.OutputFile, n))
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command("/bin/sh", "-euc", script)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = out, out
	status := 0
	if err := cmd.Run(); err != nil {
		if status = cmd.ProcessState.ExitCode(); status == 0 || cmd.ProcessState == nil {
			return fmt.Errorf("run the shell: %w", err)
		}
	}
	name := host + fmt.Sprint(task.StatusFile, n)
	return errors.Join(os.WriteFile(name+".new", []byte(strconv.Itoa(status)), 0o644), os.Rename(name+".new", name))
}

// switchRoot makes the image on a device the root directory, moves the existing mounts there, and puts
// memory below the directories that programs write to. The initramfs stays mounted below, out of
// sight: runtimes change a container's root with pivot_root, which the kernel refuses below an initramfs.
func switchRoot(device string) error {
	const root = "/newroot"
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(device, root, "erofs", unix.MS_RDONLY, "dax=always"); err != nil {
		return fmt.Errorf("mount the root on %s: %w", device, err)
	}
	for _, dir := range []string{"/proc", "/sys", "/dev", "/host", "/run", "/tmp"} {
		if err := unix.Mount(dir, root+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	for _, m := range []struct{ kind, dir string }{
		{"tmpfs", "/var"},
		{"tmpfs", "/root"},
		{"cgroup2", "/sys/fs/cgroup"},
	} {
		if err := unix.Mount(m.kind, root+m.dir, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	return os.Chdir("/")
}
