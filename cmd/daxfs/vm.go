package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/vmm"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

func init() { register(65, vmCommand) }

func vmCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "vm",
		Usage:     "hand pools and images to virtual machines",
		ArgsUsage: "COMMAND",
		Description: `
A guest maps the memory of a pool, or of one image, read-only, and a lease region to write to.
docs/virtual-machines.md explains how to start containers from them.

Example:
   daxfs vm args --pool /var/lib/pool --lease /var/lib/guest1.lease`,
		Subcommands: []*cli.Command{{
			Name: "args", Usage: "print the arguments that give a guest a pool or an image as persistent memory",
			Action: e.vmArgs,
			Description: `
The guest sees the image, the pool and the lease region as /dev/pmem0 and so on, in this order. It
maps the pages of the files themselves, and can change only those of the lease region. The command
first checks files, sizes and the guest's memory: extend an image with truncate --size=%2M, make a
pool with pool init --dax yes. It prints one argument per line.

Firecracker takes a configuration file; for it the lines are the JSON for that file.

` + sizeHelp + `

Examples:
   daxfs vm args --pool /var/lib/pool --lease /var/lib/guest1.lease
   daxfs vm args --image root.daxfs --memory 512m --vmm firecracker
   mapfile -t args < <(daxfs vm args --pool /var/lib/pool); qemu-system-x86_64 "${args[@]}" ...`,
			Flags: []cli.Flag{
				&cli.StringFlag{
					Name: "vmm", Value: vmm.Names()[0],
					Usage: "for this `MONITOR`: " + strings.Join(vmm.Names(), ", "),
				},
				&cli.StringFlag{Name: "image", Usage: "give the image in `FILE`, which daxfs convert wrote"},
				&cli.StringFlag{Name: "pool", Usage: "give the pool in `FILE`"},
				&cli.StringFlag{Name: "lease", Usage: "give the lease region in `FILE`, which the guest writes"},
				&cli.StringFlag{Name: "memory", Value: "1g", Usage: "the guest has `SIZE` of memory of its own"},
				&cli.BoolFlag{Name: "json", Usage: "write JSON; sizes are bytes"},
			},
		}},
	}
}

// vmArgs is the output of vm args --json.
type vmArgs struct {
	VMM         string     `json:"vmm"`
	Args        []string   `json:"args"`
	Memory      int64      `json:"memory"`
	PageStructs int64      `json:"pageStructs"`
	Devices     []vmDevice `json:"devices"`
}

type vmDevice struct {
	Guest    string `json:"guest"`
	Path     string `json:"path"`
	Size     int64  `json:"size"`
	ReadOnly bool   `json:"readOnly"`
}

func (e *env) vmArgs(c *cli.Context) error {
	if err := needArgs(c); err != nil {
		return err
	}
	if c.String("image") == "" && c.String("pool") == "" {
		return wrongUse(c, "neither --image nor --pool: there is nothing to give to a guest")
	}
	if c.String("lease") != "" && c.String("pool") == "" {
		return wrongUse(c, "--lease goes with --pool")
	}
	memory, err := sizeFlag(c, "memory")
	if err != nil {
		return err
	}
	if memory%(1<<20) != 0 {
		return wrongUse(c, "--memory %d, expected a multiple of 1 MiB", memory)
	}
	out := vmArgs{VMM: c.String("vmm"), Memory: memory}
	var devices []vmm.Device
	for _, d := range []struct {
		flag  string
		check func(f *os.File, size int64) error
	}{{"image", checkVMImage}, {"pool", checkVMPool}, {"lease", nil}} {
		path := c.String(d.flag)
		if path == "" {
			continue
		}
		size, err := checkVMFile(path, d.check)
		if err != nil {
			return fmt.Errorf("--%s: %w", d.flag, err)
		}
		if path, err = filepath.Abs(path); err != nil {
			return err
		}
		out.Devices = append(out.Devices,
			vmDevice{fmt.Sprintf("/dev/pmem%d", len(devices)), path, size, d.check != nil})
		devices = append(devices, vmm.Device{ID: "daxfs-" + d.flag, Path: path, Size: size, ReadOnly: d.check != nil})
		out.PageStructs += vmm.PageStructs(size)
	}
	if out.PageStructs > memory/2 {
		return fmt.Errorf("the guest needs %s of its memory of %s to describe the pages that it is given "+
			"(1/64 of their size); expected at most half: give it more with --memory, or a smaller pool, "+
			"or one image with --image",
			human(out.PageStructs), human(memory))
	}
	if out.Args, err = vmm.Args(out.VMM, memory, devices); err != nil {
		return wrongUse(c, "%v", err)
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, out)
	}
	for _, a := range out.Args {
		fmt.Fprintln(e.stdout, a)
	}
	return nil
}

// checkVMFile checks a file for a guest and returns its size. check, if not nil, checks its contents.
func checkVMFile(path string, check func(f *os.File, size int64) error) (int64, error) {
	var st unix.Stat_t // before it is opened: opening a FIFO waits
	if err := unix.Stat(path, &st); err != nil {
		return 0, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, fmt.Errorf("%q is a %s, expected a file", path, typeName(st.Mode))
	}
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if check != nil {
		if err := check(f, st.Size); err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
	}
	if st.Size == 0 || st.Size%vmm.Align != 0 {
		return 0,
			fmt.Errorf("%q has %d bytes, expected a multiple of 2 MiB: fill it up with truncate --size=%%2M", path,
				st.Size)
	}
	return st.Size, nil
}

func checkVMImage(f *os.File, size int64) error {
	_, err := (&image{f, size}).fs()
	return err
}

func checkVMPool(f *os.File, size int64) error {
	cat, err := pool.ReadCatalogue(io.NewSectionReader(f, 0, size))
	switch {
	case err != nil:
		return err
	case cat.Size > size:
		return fmt.Errorf("the pool has %d bytes, the file %d", cat.Size, size)
	case !cat.DAX:
		return errors.New("the pool is not prepared for guests, which mount it with DAX: " +
			"make it with daxfs pool init --dax yes")
	}
	return nil
}
