package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/drivers"
	"github.com/daxfs/daxfs-snapshotter/mount/fusefs"
)

func init() { register(70, mountCommand) }

func mountCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "mount",
		Usage:     "mount an image, read-only",
		ArgsUsage: "IMAGE DIR | --pool POOL IMAGE DIR",
		Description: `
IMAGE is an image file, or a device or range of physical memory that holds one. With --pool, IMAGE
is the name of an image in a pool (or the beginning of its key, if no other key begins like it), and
POOL is the file, device or ADDRESS+SIZE of the pool. The pool is mounted once, and its images
appear at their directories. If a daemon owns the pool, it does the work; if nobody owns it, this
command does. The image stays in the pool as long as it is mounted. A machine without an index of
the pool can mount its images as well, by their keys. The owner does not know of such a mount, and
must not remove the image meanwhile.

Drivers: auto takes the first that works, in the order shown by daxfs doctor; erofs (erofs-dax,
erofs-file, erofs-loop), daxfs (the kernel module), fuse. The image is checked first, because a
kernel must not parse a stranger's image unchecked. Data of a pool that only root can have written
is not checked again.

With --root-hash the image is mounted only if it is, byte for byte, the image of this hash. inspect
shows the hash that is stored in an image. All of the image is read first.

Setuid programs and device nodes of the image do not work unless --suid is given.

With --driver fuse --foreground the command serves the image itself until it is unmounted; otherwise it starts a process
that does. SIGUSR1 makes a server write its counters to its standard error.

Examples:
   daxfs mount debian.daxfs /mnt
   daxfs mount --driver fuse debian.daxfs /mnt
   daxfs mount --root-hash "$(cat debian.hash)" debian.daxfs /mnt
   daxfs mount --pool /var/lib/pool docker.io/library/debian:12 /mnt
   daxfs mount --driver daxfs --pool 0x400000000+4294967296 6859 /mnt`,
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "driver", Aliases: []string{"d"}, Value: "auto", Usage: "mount with `DRIVER`"},
			&cli.StringFlag{Name: "pool", Usage: "mount an image of `POOL`"},
			&cli.StringFlag{Name: "index", Usage: "the index of POOL is `FILE`"},
			&cli.Int64Flag{Name: "offset", Usage: "the image starts at byte `N` of the file"},
			&cli.Int64Flag{Name: "size", Usage: "the image, or its window, has `N` bytes; 0 is the rest of the file"},
			&cli.BoolFlag{Name: "suid", Usage: "let setuid programs and device nodes of the image work"},
			&cli.StringFlag{Name: "root-hash", Usage: "mount only the image of `HASH`, 64 hexadecimal digits"},
			&cli.BoolFlag{
				Name:  "no-check",
				Usage: "do not check the image first: only for those that were checked and cannot have changed",
			},
			&cli.BoolFlag{Name: "foreground", Usage: "serve in this process (fuse only)"},
			// These two belong to the driver, which starts this command as its server.
			&cli.StringFlag{Name: "name", Hidden: true},
			&cli.IntFlag{Name: "ready-fd", Value: -1, Hidden: true},
		}, keeperFlags()...),
		Action: e.mount,
	}
}

func (e *env) mount(c *cli.Context) error {
	if err := needArgs(c, "IMAGE", "DIR"); err != nil {
		return err
	}
	if c.IsSet("pool") {
		return e.mountFromPool(c)
	}
	if c.Bool("foreground") {
		return e.serve(c)
	}
	src, err := mountSource(c)
	if err != nil {
		return err
	}
	list, err := mount.Select(drivers.All(), c.String("driver"))
	if err != nil {
		return wrongUse(c, "%v", err)
	}
	dir, err := drivers.Resolve(c.Args().Get(1))
	if err != nil {
		return err
	}
	if err := isDir(dir); err != nil {
		return err
	}
	if err := checkMount(c, src); err != nil {
		return err
	}
	d, err := mount.Auto(c.Context, list, src, dir, e.warn)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.stderr, "mounted on %s with %s: %s\n", dir, d.Name(), d.Sharing())
	return err
}

// checkMount checks the image as the flags demand.
func checkMount(c *cli.Context, src mount.Source) error {
	root, err := rootHash(c)
	switch {
	case err != nil:
		return err
	case root != nil && c.Bool("no-check"):
		return wrongUse(c, "--root-hash and --no-check contradict each other")
	case root != nil:
		if err := mount.ProveImage(c.Context, src, *root); err != nil {
			return err
		}
	case c.Bool("no-check"):
		return nil
	}
	return mount.CheckImage(c.Context, src)
}

func isDir(dir string) error {
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return fmt.Errorf("%q is not a directory", dir)
	}
	return nil
}

// mountSource returns the image that the arguments name.
func mountSource(c *cli.Context) (mount.Source, error) {
	name := c.Args().First()
	src := mount.Source{Key: name, Off: c.Int64("offset"), Size: c.Int64("size"), Restrict: !c.Bool("suid")}
	f, end, err := openMemory(name, &src.Region)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) && strings.Contains(name, ":") {
			return src, fmt.Errorf("%w; for an image of a pool give --pool", err)
		}
		return src, err
	}
	defer f.Close()
	if src.Off < 0 || src.Off >= end {
		return src, fmt.Errorf("offset %d of %q, which has %d bytes", src.Off, name, end)
	}
	if src.Size == 0 {
		src.Size = imageSize(f, src.Off, end-src.Off)
	}
	return src, nil
}

// imageSize returns the size of the image in room bytes at off: a device, or the file that is a
// virtual machine's memory, may be larger. If there is no image it returns room, and the check reports the error.
func imageSize(f io.ReaderAt, off, room int64) int64 {
	img, err := daxfs.Open(io.NewSectionReader(f, off, room), room)
	if err != nil {
		return room
	}
	return int64(img.Super().Blocks) * daxfs.BlockSize
}

// serve implements mount --foreground.
func (e *env) serve(c *cli.Context) error {
	if c.String("driver") != "fuse" {
		return wrongUse(c, "--foreground goes with --driver fuse: the other drivers leave no process behind")
	}
	conf := fusefs.Config{
		Path: c.Args().First(), Name: c.String("name"), Off: c.Int64("offset"), Size: c.Int64("size"),
		Dir: c.Args().Get(1), Restrict: !c.Bool("suid"), Log: e.stderr,
	}
	if fd := c.Int("ready-fd"); fd >= 0 {
		// The driver started this process. It has checked the image and resolved all names.
		return fusefs.Run(c.Context, conf, func(err error) { fusefs.Ready(os.NewFile(uintptr(fd), "ready"), err) })
	}
	src, err := mountSource(c)
	if err != nil {
		return err
	}
	if err := checkMount(c, src); err != nil {
		return err
	}
	if conf.Dir, err = drivers.Resolve(conf.Dir); err != nil {
		return err
	}
	if err := isDir(conf.Dir); err != nil {
		return err
	}
	conf.Path, conf.Off, conf.Size = src.Region.Path, src.Off, src.Size
	return fusefs.Run(context.WithoutCancel(c.Context), conf, func(err error) {
		if err == nil {
			fmt.Fprintf(e.stderr, "serving on %s\n", conf.Dir)
		}
	})
}
