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
POOL is a file on a disk, on tmpfs or on hugetlbfs, a /dev/pmem or /dev/dax device, or a reserved range of physical memory
as ADDRESS+SIZE. The kind follows from it, unless --kind says so.

A pool has one owner at a time, usually the snapshotter daemon. ls and show read, whoever owns the pool; the others ask
the daemon if it owns the pool, and become the owner if nobody does. init needs the pool to be free.

The index says who holds what. Without --index it is POOL.index beside a file, or that of a daemon; a device needs --index.

An IMAGE is named as it was put, by the reference of the OCI image, or by the beginning of its key.

Examples:
   daxfs pool init --size 64g /var/lib/pool
   daxfs pool put /var/lib/pool docker://debian:12
   daxfs pool ls /var/lib/pool
   daxfs pool init --index /var/lib/pmem0.index /dev/pmem0`,
		Subcommands: []*cli.Command{
			{Name: "init", Usage: "make an empty pool", ArgsUsage: "POOL", Action: e.poolInit, Description: `
A file is made if there is none, and then needs --size; it takes only the blocks that are used. What the region holds is
not overwritten without --force. When the command fails, no file is left that was not there before.

` + sizeHelp + `

Examples:
   daxfs pool init --size 64g /var/lib/pool
   daxfs pool init --size 1g --dax yes --readers leases --lease /var/lib/guest1.lease /var/lib/pool
   daxfs pool init --index /var/lib/pmem0.index --windows no /dev/pmem0
   daxfs pool init --index /var/lib/range.index 0x300000000+4294967296`, Flags: with(
				&cli.StringFlag{
					Name: "dax", Value: "auto",
					Usage: "prepare it for kernels that mount it with DAX: `YES|NO`, or auto: if it is such a device here; say yes for a file that virtual machines get as virtio-pmem",
				},
				&cli.StringFlag{
					Name: "windows", Value: "auto",
					Usage: "give every image a window for daxfs.ko: `YES|NO`, or auto: for memory that other kernels may reach by address",
				},
				&cli.StringFlag{Name: "size", Usage: "make it `SIZE` large, as 64g; a device may be used whole"},
				&cli.StringFlag{
					Name: "readers", Value: store.ReadersNone,
					Usage: "others read the pool: `MODE` none, keep (all images stay until they are removed) or leases",
				},
				&cli.StringSliceFlag{
					Name:  "lease",
					Usage: "with --readers leases, a reader says in `REGION` what it uses: a file, a device, a directory, or flock:FILE",
				},
				&cli.BoolFlag{Name: "force", Usage: "destroy what the region holds, and an old index"})},
			{Name: "ls", Usage: "list the images in a pool", ArgsUsage: "POOL", Action: e.poolList, Description: `
For each image: the beginning of its key, its slot (the name of its directory in the pool, when all of that is mounted), its
contents, those of them that other images have as well, when it was added, and the names that it has.

Examples:
   daxfs pool ls /var/lib/pool
   daxfs pool ls --json /var/lib/pool | jq -r '.images[].key'`, Flags: read()},
			{Name: "show", Usage: "show what a pool, or an image in it, takes and shares", ArgsUsage: "POOL [IMAGE]", Action: e.poolShow, Description: `
Examples:
   daxfs pool show /var/lib/pool
   daxfs pool show /var/lib/pool web
   daxfs pool show --json /var/lib/pool | jq .saved`, Flags: read()},
			{Name: "put", Usage: "add an image and keep it", ArgsUsage: "POOL SOURCE", Action: e.poolPut, Description: `
` + sourceHelp + `

Files and layers that the pool has are not stored again. The image stays until rm, whatever containerd does. A name that
another image has moves to the new one; the other is freed by gc if nothing else holds it. A directory and an image file
need --name. When the command fails, the pool holds the images that it held before.

Examples:
   daxfs pool put /var/lib/pool docker://debian:12
   daxfs pool put --name web /var/lib/pool oci-archive:web.tar
   daxfs pool put --name llama /var/lib/pool rootfs:llama`, Flags: with(append(append([]cli.Flag{
				&cli.StringFlag{Name: "name", Usage: "call it `NAME`", DefaultText: "its reference, else its key"},
			}, keeperFlags()...), sourceFlags()...)...)},
			poolDiffCommand(e, with()),
			{Name: "rm", Usage: "remove images that were put; they must not be mounted", ArgsUsage: "POOL IMAGE...", Action: e.poolRemove, Description: `
If one of the images is not there or is mounted, none is removed. What containers use, or another name holds, stays. What
somebody has open stays until he closes it: its space comes back by itself.

Example:
   daxfs pool rm /var/lib/pool web jobs`, Flags: read()},
			{Name: "pin", Usage: "keep an image that is in the pool", ArgsUsage: "POOL IMAGE [NAME]", Action: e.poolPin, Description: `
The image stays, whatever containerd does, until unpin or rm. NAME is what it is called then; without one, the name that it has.
A NAME that another image has moves to this one.

Example:
   daxfs pool pin /var/lib/pool docker.io/library/debian:12`, Flags: read()},
			{Name: "unpin", Usage: "no longer keep an image", ArgsUsage: "POOL NAME", Action: e.poolUnpin, Description: `
Nothing is removed at once: gc, or the daemon when it next looks, frees the image if nothing else holds it.

Example:
   daxfs pool unpin /var/lib/pool docker.io/library/debian:12`, Flags: read()},
			{Name: "move", Usage: "move the file of a pool", ArgsUsage: "POOL PATH", Action: e.poolMove, Description: `
The pool has no owner and is not mounted meanwhile: stop the daemon and its containers first. An index beside the pool goes with it;
that of a daemon stays where it is and is found. PATH is on a file system of the same kind. What cannot be moved as a whole stays.

Example:
   daxfs pool move /var/lib/pool /srv/pool`, Flags: with()},
			{Name: "grow", Usage: "make the file of a pool larger", ArgsUsage: "POOL SIZE", Action: e.poolGrow, Description: `
SIZE is what the pool has then. The file is sparse: it takes no more of the disk than before. The pool has no owner and is not
mounted meanwhile: stop the daemon and its containers first. Images, holders and names stay. A pool does not shrink. The number
of slots stays as well.

` + sizeHelp + `

Example:
   daxfs pool grow /var/lib/pool 128g`, Flags: with(keeperFlags()...)},
			{Name: "gc", Usage: "free what nothing holds", ArgsUsage: "POOL", Action: e.poolCollect, Description: `
Images and layers that nothing holds, and contents that waited until nobody could read them.

Example:
   daxfs pool gc /var/lib/pool`, Flags: read()},
			{Name: "release", Usage: "say that a reader on another machine is gone", ArgsUsage: "POOL READER", Action: e.poolRelease, Description: `
READER is the name of the reader, as pool ls shows it, or its lease region. What it had claimed is freed by the next gc, or by
the daemon. A reader that lives after all may read other bytes than before: only say so when its machine is off.

Examples:
   daxfs pool release /var/lib/pool guest1
   daxfs pool release --earlier /var/lib/pool guest1`, Flags: with(append([]cli.Flag{
				&cli.BoolFlag{Name: "earlier", Usage: "end only what it claimed before it booted the last time"},
			}, keeperFlags()...)...)},
			{Name: "check", Usage: "prove that everything in a pool is consistent", ArgsUsage: "POOL", Action: e.poolCheck, Description: `
Reads all contents and metadata; a daemon that owns the pool does so, and adds and removes no image meanwhile. Writes every finding with its rule (docs/pool.md and docs/format.md explain the rules), and
ends with status 3 if there are any; 1 means that it could not be read.

With --contents it reads all contents and nothing else, while the pool is in use: a daemon that owns it does so. Contents that
have changed are given to nobody from then on. Images that hold them are made again where that is possible.

Examples:
   daxfs pool check /var/lib/pool
   daxfs pool check --contents /var/lib/pool
   daxfs pool check --json /var/lib/pool | jq '.findings[].rule'`, Flags: with(append([]cli.Flag{
				&cli.BoolFlag{Name: "contents", Usage: "read contents only, also while the pool is in use"},
			}, keeperFlags()...)...)},
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

// readersFlags says who reads a new pool. A daemon that has one says so in its configuration.
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

// poolMade is what pool init --json writes.
type poolMade struct {
	ID     string      `json:"id"`
	Index  string      `json:"index"`
	Region region.Info `json:"region"`
	Usage  pool.Usage  `json:"usage"`
}

// poolChecked is what pool check --json writes.
type poolChecked struct {
	OK       bool           `json:"ok"`
	Findings []pool.Finding `json:"findings"`
	// Lost says which images cannot be made again, and why.
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

// poolScrub is pool check --contents.
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

// check checks a pool as its owner, which no store needs to be: what is damaged cannot always be opened as one.
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
