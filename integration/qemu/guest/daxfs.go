//go:build linux

package main

import (
	"fmt"
	"os/exec"
	"syscall"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/kernel"
)

// module loads the kernel module that the host gave along, mounts all images with the driver for it, lists their trees
// and runs the program from each, directly and through an overlay. Where the memory is a block device as well, the same
// bytes are then mounted as EROFS beside it and listed too.
func module(t task.Task, answer *task.Answer) error {
	if err := load(t.Module, ""); err != nil {
		return err
	}
	dirs, err := mountImages(t, kernel.Driver{}, answer)
	if err != nil {
		return err
	}
	if err := listTrees(dirs, listing.Options{NoTimes: true, NoXattrs: true}, answer); err != nil {
		return err
	}
	if t.Phys == 0 {
		others, err := mountImages(t, erofs.DAX{}, answer)
		if err != nil {
			return err
		}
		if err := listTrees(others, listing.Options{}, answer); err != nil {
			return err
		}
	}
	if t.Program == nil {
		return nil
	}
	for _, dir := range dirs {
		root, err := overlay(dir)
		if err != nil {
			return err
		}
		for _, where := range []string{dir, root} {
			out, err := run(where, t.Program)
			if err != nil {
				return err
			}
			answer.Output = append(answer.Output, out)
		}
	}
	return nil
}

// run runs a program with a directory as its root and returns what it printed.
func run(root string, argv []string) (string, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("run %q in %q: %w: %s", argv, root, err, out)
	}
	return string(out), nil
}

// script runs the program in the guest's own root, with the module loaded if there is one: for what a user would type.
func script(t task.Task, answer *task.Answer) error {
	if t.Module != "" {
		if err := load(t.Module, ""); err != nil {
			return err
		}
	}
	if t.Phys == 0 {
		if err := awaitDevice(); err != nil {
			return err
		}
	}
	out, err := run("/", t.Program)
	answer.Output = append(answer.Output, out)
	return err
}
