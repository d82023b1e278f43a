//go:build linux

package main

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
)

// module loads the kernel module that the host gave along, mounts the image from its physical address with all of the
// module's own checks, lists the tree and runs the program directly and through an overlay.
func module(t task.Task, answer *task.Answer) error {
	if err := load(t.Module, ""); err != nil {
		return err
	}
	dir := "/run/daxfs"
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	options := fmt.Sprintf("phys=%#x,size=%d,validate", t.Phys, t.Size)
	if err := unix.Mount("none", dir, "daxfs", unix.MS_RDONLY, options); err != nil {
		return fmt.Errorf("mount daxfs with %s: %w", options, err)
	}
	line, err := mountOptions(dir)
	if err != nil {
		return err
	}
	answer.Options = append(answer.Options, line)
	tree, err := listing.Tree(dir, listing.Options{NoTimes: true, NoXattrs: true})
	if err != nil {
		return err
	}
	answer.Trees = append(answer.Trees, tree)
	root, err := overlay(dir)
	if err != nil {
		return err
	}
	for _, where := range []string{dir, root} {
		cmd := exec.Command(t.Program[0], t.Program[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: where}
		cmd.Dir = "/"
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("run %q in %q: %w: %s", t.Program, where, err, out)
		}
		answer.Output = append(answer.Output, string(out))
	}
	return nil
}
