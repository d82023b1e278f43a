//go:build linux

package main

import (
	"fmt"
	"os/exec"
	"syscall"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/kernel"
)

// module loads the given kernel module, mounts all images with its driver, lists their trees and runs
// the program from each, directly and through an overlay. If the memory is also a block device, the
// same images are then mounted as EROFS and listed too.
func (g *guest) module() error {
	if err := load(g.Module, ""); err != nil {
		return err
	}
	dirs, err := g.mountImages(kernel.Driver{}, g.Images)
	if err != nil {
		return err
	}
	if err := g.listTrees(dirs, listing.Options{NoTimes: true, NoXattrs: true}); err != nil {
		return err
	}
	if g.Phys == 0 {
		others, err := g.mountImages(erofs.DAX{}, g.Images)
		if err != nil {
			return err
		}
		if err := g.listTrees(others, listing.Options{}); err != nil {
			return err
		}
	}
	if g.Program == nil {
		return nil
	}
	for _, dir := range dirs {
		root, err := g.overlay(dir)
		if err != nil {
			return err
		}
		for _, where := range []string{dir, root} {
			out, err := run(where, g.Program)
			if err != nil {
				return err
			}
			g.answer.Output = append(g.answer.Output, out)
		}
	}
	return nil
}

// run runs a program with a directory as its root and returns its output.
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

// script runs the program in the guest's own root, after loading the module if there is one: for commands of a user.
func (g *guest) script() error {
	if g.Module != "" {
		if err := load(g.Module, ""); err != nil {
			return err
		}
	}
	if g.Phys == 0 {
		if err := awaitDevice(); err != nil {
			return err
		}
	}
	out, err := run("/", g.Program)
	g.answer.Output = append(g.answer.Output, out)
	return err
}
