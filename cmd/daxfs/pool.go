package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/mount/drivers"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
)

func init() { register(60, poolCommand) }

func poolCommand(e *env) *cli.Command {
	index := &cli.StringFlag{Name: "index", Usage: "the owner's index is `FILE`"}
	kind := &cli.StringFlag{
		Name:  "kind",
		Usage: "the pool is a `KIND` of region: " + strings.Join(region.Kinds(), ", "),
	}
	asJSON := &cli.BoolFlag{Name: "json", Usage: "write JSON; sizes are bytes"}
	with := func(more ...cli.Flag) []cli.Flag { return append([]cli.Flag{index, kind, asJSON}, more...) }
	read := func() []cli.Flag { return with(keeperFlags()...) }
	return &cli.Command{
		Name:      "pool",
		Usage:     "look after a pool, which holds many images in shared memory",
		ArgsUsage: "COMMAND POOL",
		Description: `
POOL is a file on a disk, on tmpfs or on hugetlbfs, a /dev/pmem or /dev/dax device, or a reserved
range of physical memory as ADDRESS+SIZE. Its kind follows from that, unless --kind is given.

A pool has one owner at a time, usually the snapshotter daemon. ls and show read a pool whoever owns
it. The other commands ask the daemon if it owns the pool, and become the owner if nobody does. init
needs a pool that is free.

The index records who holds which image. Without --index it is POOL.index beside a file, or that of
a daemon; a device needs --index.

An IMAGE is given by the name under which it was put, by the reference of the OCI image, or by the
beginning of its key.

Examples:
   daxfs pool init --size 64g /var/lib/pool
   daxfs pool put /var/lib/pool docker://debian:12
   daxfs pool ls /var/lib/pool
   daxfs pool init --index /var/lib/pmem0.index /dev/pmem0`,
		Subcommands: []*cli.Command{
			{Name: "init", Usage: "make an empty pool", ArgsUsage: "POOL", Action: e.poolInit, Description: `
init makes the file if there is none, and then needs --size; the file takes only the blocks that are
used. Without --force, init does not overwrite data in the region. If the command fails, it leaves
no new file behind.

` + sizeHelp + `

Examples:
   daxfs pool init --size 64g /var/lib/pool
   daxfs pool init --size 1g --dax yes --readers leases --lease /var/lib/guest1.lease /var/lib/pool
   daxfs pool init --index /var/lib/pmem0.index --windows no /dev/pmem0
   daxfs pool init --index /var/lib/range.index 0x300000000+4294967296`, Flags: with(
				&cli.StringFlag{
					Name: "dax", Value: "auto",
					Usage: "prepare it for kernels that mount it with DAX: `YES|NO`, or auto: if it is such a device " +
						"here; say yes for a file that virtual machines get as virtio-pmem",
				},
				&cli.StringFlag{
					Name: "windows", Value: "auto",
					Usage: "give every image a window for daxfs.ko: `YES|NO`, or auto: " +
						"for memory that other kernels may reach by address",
				},
				&cli.StringFlag{Name: "size", Usage: "make it `SIZE` large, as 64g; a device may be used whole"},
				&cli.StringFlag{
					Name: "readers", Value: store.ReadersNone,
					Usage: "others read the pool: `MODE` none, keep (all images stay until they are removed) or leases",
				},
				&cli.StringSliceFlag{
					Name: "lease",
					Usage: "with --readers leases, a reader says in `REGION` what it uses: " +
						"a file, a device, a directory, or flock:FILE",
				},
				&cli.BoolFlag{Name: "force", Usage: "destroy what the region holds, and an old index"})},
			{Name: "ls", Usage: "list the images in a pool", ArgsUsage: "POOL", Action: e.poolList, Description: `
Shows for each image: the beginning of its key, its slot (the name of its directory in the pool,
when all of the pool is mounted), its contents, the part of them that other images have as well,
when it was added, and its names.

Examples:
   daxfs pool ls /var/lib/pool
   daxfs pool ls --json /var/lib/pool | jq -r '.images[].key'`, Flags: read()},
			{
				Name: "show", Usage: "show what a pool, or an image in it, takes and shares",
				ArgsUsage: "POOL [IMAGE]", Action: e.poolShow, Description: `
Examples:
   daxfs pool show /var/lib/pool
   daxfs pool show /var/lib/pool web
   daxfs pool show --json /var/lib/pool | jq .saved`, Flags: read(),
			},
			{Name: "put", Usage: "add an image and keep it", ArgsUsage: "POOL SOURCE", Action: e.poolPut, Description: `
` + sourceHelp + `

Files and layers in the pool are not stored again. The image stays until rm, whatever containerd
does. If another image has the name, the name moves to the new one; gc frees the other if nothing
else holds it. A directory and an image file need --name. If the command fails, the pool holds the
same images as before.

Examples:
   daxfs pool put /var/lib/pool docker://debian:12
   daxfs pool put --name web /var/lib/pool oci-archive:web.tar
   daxfs pool put --name llama /var/lib/pool rootfs:llama`, Flags: with(append(append([]cli.Flag{
				&cli.StringFlag{Name: "name", Usage: "call it `NAME`", DefaultText: "its reference, else its key"},
			}, keeperFlags()...), sourceFlags()...)...)},
			poolDiffCommand(e, with()),
			{
				Name: "rm", Usage: "remove images that were put; they must not be mounted",
				ArgsUsage: "POOL IMAGE...", Action: e.poolRemove, Description: `
If one of the images does not exist or is mounted, none is removed. An image that containers use or
another name holds stays. An open file stays until it is closed; then its space comes back by
itself.

Example:
   daxfs pool rm /var/lib/pool web jobs`, Flags: read(),
			},
			{
				Name: "pin", Usage: "keep an image that is in the pool",
				ArgsUsage: "POOL IMAGE [NAME]", Action: e.poolPin, Description: `
The image stays, whatever containerd does, until unpin or rm. NAME becomes its name; without NAME it
keeps its present one. If another image has NAME, the name moves to this one.

Example:
   daxfs pool pin /var/lib/pool docker.io/library/debian:12`, Flags: read(),
			},
			{
				Name: "unpin", Usage: "no longer keep an image",
				ArgsUsage: "POOL NAME", Action: e.poolUnpin, Description: `
Nothing is removed at once: gc, or the daemon at its next sweep, frees the image if nothing else
holds it.

Example:
   daxfs pool unpin /var/lib/pool docker.io/library/debian:12`, Flags: read(),
			},
			{Name: "move", Usage: "move the file of a pool", ArgsUsage: "POOL PATH", Action: e.poolMove, Description: `
The pool must have no owner and must not be mounted: stop the daemon and its containers first. An
index beside the pool moves with it; a daemon's index stays where it is and is found. PATH is on a
file system of the same kind. If the move fails, everything stays at its old place.

Example:
   daxfs pool move /var/lib/pool /srv/pool`, Flags: with()},
			{
				Name: "grow", Usage: "make the file of a pool larger",
				ArgsUsage: "POOL SIZE", Action: e.poolGrow, Description: `
SIZE is the new size. The file is sparse: it takes no more of the disk than before. The pool must
have no owner and must not be mounted: stop the daemon and its containers first. Images, holders and
names stay. A pool does not shrink. The number of slots stays as well.

` + sizeHelp + `

Example:
   daxfs pool grow /var/lib/pool 128g`, Flags: with(keeperFlags()...),
			},
			{Name: "gc", Usage: "free what nothing holds", ArgsUsage: "POOL", Action: e.poolCollect, Description: `
Frees images and layers that nothing holds, and contents that nobody can read any more.

Example:
   daxfs pool gc /var/lib/pool`, Flags: read()},
			{
				Name: "release", Usage: "say that a reader on another machine is gone",
				ArgsUsage: "POOL READER", Action: e.poolRelease, Description: `
READER is the name of the reader, as pool ls shows it, or its lease region. The next gc, or the
daemon, frees what it had claimed. A reader that is still alive may then read wrong bytes: use this
only when its machine is off.

Examples:
   daxfs pool release /var/lib/pool guest1
   daxfs pool release --earlier /var/lib/pool guest1`, Flags: with(append([]cli.Flag{
					&cli.BoolFlag{Name: "earlier", Usage: "end only the claims from before its last boot"},
				}, keeperFlags()...)...),
			},
			{
				Name: "check", Usage: "prove that everything in a pool is consistent",
				ArgsUsage: "POOL", Action: e.poolCheck, Description: `
Reads all contents and metadata. A daemon that owns the pool does the work, and adds and removes no
image meanwhile. Writes every finding with its rule (docs/pool.md and docs/format.md explain the
rules), and ends with status 3 if there are any; status 1 means that the pool could not be read.

With --contents it reads all contents and nothing else, while the pool is in use; a daemon that owns
the pool does the work. From then on nobody gets contents that have changed. Images that hold them
are rebuilt where possible.

Examples:
   daxfs pool check /var/lib/pool
   daxfs pool check --contents /var/lib/pool
   daxfs pool check --json /var/lib/pool | jq '.findings[].rule'`, Flags: with(append([]cli.Flag{
					&cli.BoolFlag{Name: "contents", Usage: "read contents only, also while the pool is in use"},
				}, keeperFlags()...)...),
			},
		},
	}
}

func (e *env) poolOptions() pool.Options {
	return pool.Options{Warn: func(err error) { fmt.Fprintln(e.stderr, "daxfs:", message(err)) }}
}

func (e *env) poolInit(c *cli.Context) error {
	if err := needArgs(c, "POOL"); err != nil {
		return err
	}
	a := poolArgsOf(c)
	rc, err := a.region(false)
	if err != nil {
		return err
	}
	for _, flag := range []string{"dax", "windows"} {
		if _, ok := choices[c.String(flag)]; !ok {
			return wrongUse(c, "--%s %q, expected yes, no or auto", flag, c.String(flag))
		}
	}
	if c.IsSet("size") {
		if rc.Size, err = sizeFlag(c, "size"); err != nil {
			return err
		}
	}
	readers, err := readersFlags(c)
	if err != nil {
		return err
	}
	made := !fileExists(rc.Path)
	rc.Create, rc.Force = !region.TraitsOf(rc.Kind).ByAddress, c.Bool("force")
	if rc.Kind == region.KindDMABuf {
		return wrongUse(c, "a DMA buffer ends with the process that has it open: only the daemon can make such a pool")
	}
	if made && rc.Create && rc.Size == 0 {
		return wrongUse(c, "no file %q, so one is made: --size is needed", rc.Path)
	}
	index, err := a.newIndex(rc)
	if err != nil {
		return err
	}
	unmake := func() error {
		if !made || !rc.Create {
			return nil
		}
		if err := os.Remove(rc.Path); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	r, err := region.Open(rc)
	if err != nil {
		return errors.Join(err, unmake())
	}
	o := store.PoolOptions(c.Context, drivers.All(), r.Info(), c.String("windows"))
	o.Warn, o.Force, o.DAX = e.poolOptions().Warn, c.Bool("force"), choices[c.String("dax")]
	p, err := pool.Create(r, index, o)
	if err != nil {
		return errors.Join(err, r.Close(), unmake())
	}
	defer r.Close()
	defer p.Close()
	if readers.Mode != store.ReadersNone {
		if err := store.SetReaders(p, readers); err != nil {
			return errors.Join(err, unmake())
		}
	}
	u := p.Usage()
	if c.Bool("json") {
		id := p.ID()
		return writeJSON(e.stdout, poolMade{hex.EncodeToString(id[:]), index, r.Info(), u})
	}
	fmt.Fprintf(e.stdout, "%s: empty pool of %s, index %s\n", printable(c.Args().First()), human(u.Size),
		printable(index))
	return nil
}

// readersFlags returns the readers of a new pool. A daemon takes those of its own pool from its configuration.
func readersFlags(c *cli.Context) (store.Readers, error) {
	r := store.Readers{Mode: c.String("readers")}
	for _, spec := range c.StringSlice("lease") {
		path, launched := strings.CutPrefix(spec, "flock:")
		if _, isRange, _ := region.PhysRange(path); !isRange {
			abs, err := filepath.Abs(path)
			if err != nil {
				return r, err
			}
			path = abs
		}
		if launched {
			path = "flock:" + path
		}
		r.Leases = append(r.Leases, path)
	}
	if err := r.Validate(); err != nil {
		return r, wrongUse(c, "--readers, --lease: %v", err)
	}
	return r, nil
}

var choices = map[string]pool.Choice{"auto": pool.Auto, "yes": pool.Yes, "no": pool.No}

// poolMade is the output of pool init --json.
type poolMade struct {
	ID     string      `json:"id"`
	Index  string      `json:"index"`
	Region region.Info `json:"region"`
	Usage  pool.Usage  `json:"usage"`
}

// poolChecked is the output of pool check --json.
type poolChecked struct {
	OK       bool           `json:"ok"`
	Findings []pool.Finding `json:"findings"`
	// Lost names the images that cannot be rebuilt, and why.
	Lost string `json:"lost,omitempty"`
}

func (e *env) poolCheck(c *cli.Context) error {
	if err := needArgs(c, "POOL"); err != nil {
		return err
	}
	a := poolArgsOf(c)
	if c.Bool("contents") {
		return e.poolScrub(c, a)
	}
	rc, err := a.region(false)
	if err != nil {
		return err
	}
	if cat, cerr := catalogue(rc); cerr == nil {
		if d := dialControl(c.String("control")); d.owns(c.Context, hex.EncodeToString(cat.PoolID[:])) {
			findings, err := d.check(c.Context)
			if err != nil {
				return err
			}
			return e.tellFindings(c, findings, "")
		}
	}
	index, err := a.newIndex(rc)
	if cat, cerr := catalogue(rc); cerr == nil {
		if found := a.findIndex(rc, cat); found != "" {
			index, err = found, nil
		}
	}
	if err != nil {
		return err
	}
	findings, err := e.check(c.Context, rc, index)
	if err != nil {
		return err
	}
	return e.tellFindings(c, findings, "")
}

// poolScrub implements pool check --contents.
func (e *env) poolScrub(c *cli.Context, a poolArgs) error {
	k, err := e.openKeeper(c, a, "auto")
	if err != nil {
		return err
	}
	findings, lost, err := k.Scrub(c.Context)
	if err = errors.Join(err, k.Close()); err != nil {
		return err
	}
	return e.tellFindings(c, findings, lost)
}

func (e *env) tellFindings(c *cli.Context, findings []pool.Finding, lost string) (err error) {
	if c.Bool("json") {
		err = writeJSON(e.stdout, poolChecked{len(findings) == 0, findings, lost})
	} else {
		err = printFindings(e.stdout, findings)
	}
	if lost != "" {
		fmt.Fprintf(e.stderr, "daxfs: %s\n", message(errors.New(lost)))
	}
	if err == nil && len(findings) > 0 {
		return errFindings
	}
	return err
}

// check checks a pool as its owner, without a store: a damaged pool cannot always be opened as one.
func (e *env) check(ctx context.Context, rc region.Config, index string) (findings []pool.Finding, err error) {
	r, err := region.Open(rc)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	p, err := pool.Open(r, index, e.poolOptions())
	if err != nil {
		return nil, err
	}
	findings = []pool.Finding{}
	err = p.Check(ctx, func(f pool.Finding) bool {
		findings = append(findings, f)
		return true
	})
	return findings, errors.Join(err, p.Close())
}

func printFindings(w io.Writer, findings []pool.Finding) error {
	for _, f := range findings {
		if _, err := fmt.Fprintln(w, f); err != nil {
			return err
		}
	}
	if len(findings) == 0 {
		_, err := fmt.Fprintln(w, "the pool is consistent")
		return err
	}
	return nil
}
