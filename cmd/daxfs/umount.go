package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/mount/drivers"
)

func init() { register(71, umountCommand) }

func umountCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "umount",
		Aliases:   []string{"unmount"},
		Usage:     "unmount images",
		ArgsUsage: "DIR...",
		Description: `
The devices and the server process of the mount go with it. The owner of a pool unmounts the pool's
images. Mounts that the snapshotter made for containers are left alone.

Example:
   daxfs umount /mnt`,
		Flags: append([]cli.Flag{&cli.BoolFlag{Name: "force", Usage: "unmount what the snapshotter mounted, too"}},
			keeperFlags()...),
		Action: e.umount,
	}
}

func (e *env) umount(c *cli.Context) error {
	if !c.Args().Present() {
		return wrongUse(c, "no arguments, expected DIR...")
	}
	var errs []error
	for _, arg := range c.Args().Slice() {
		errs = append(errs, e.umountOne(c, arg))
	}
	return errors.Join(errs...)
}

func (e *env) umountOne(c *cli.Context, arg string) error {
	dir, err := drivers.Resolve(arg)
	if err != nil {
		return err
	}
	if done, err := e.umountFromPool(c, dir); done || err != nil {
		return err
	}
	d, table, err := drivers.Of(dir)
	if err != nil {
		return err
	}
	if table != "" && !c.Bool("force") {
		return fmt.Errorf("%q belongs to the snapshotter with the root %q, which unmounts it when no container uses "+
			"it (--force unmounts it now)", dir, table)
	}
	return d.Unmount(c.Context, dir)
}
