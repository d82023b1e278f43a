package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func init() { register(60, poolCommand) }

func poolCommand(e *env) *cli.Command {
	index := &cli.StringFlag{Name: "index", Usage: "the owner's index is `FILE`"}
	kind := &cli.StringFlag{Name: "kind", Usage: "the pool is a `KIND` of region: " + strings.Join(region.Kinds(), ", ")}
	asJSON := &cli.BoolFlag{Name: "json", Usage: "write JSON; sizes are bytes"}
	with := func(more ...cli.Flag) []cli.Flag { return append([]cli.Flag{index, kind, asJSON}, more...) }
	return &cli.Command{
		Name:      "pool",
		Usage:     "look after a pool, which holds many images in shared memory",
		ArgsUsage: "COMMAND POOL",
		Description: `
POOL is a file on a disk, on tmpfs or on hugetlbfs, a /dev/pmem or /dev/dax device, or a reserved range of physical memory
as ADDRESS+SIZE. The kind follows from it, unless --kind says so.

A pool has one owner at a time, usually the snapshotter daemon. Its index says what the pool holds; without --index it is
index.db beside a file where there is one, as the daemon makes it, else POOL.index; a device needs --index.
ls and show read what the pool itself says, also while a daemon owns it; all else needs the pool to be free.

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
   daxfs pool init --index /var/lib/pmem0.index /dev/pmem0
   daxfs pool init --index /var/lib/range.index 0x300000000+4294967296`, Flags: with(
				&cli.StringFlag{Name: "size", Usage: "make it `SIZE` large, as 64g; a device may be used whole"},
				&cli.BoolFlag{Name: "force", Usage: "destroy what the region holds, and an old index"})},
			{Name: "ls", Usage: "list the images in a pool", ArgsUsage: "POOL", Action: e.poolList, Description: `
For each image: the key to mount it by, the offset and size of its window, its contents, those of them that other images
have as well, its metadata, and when it was added.

Examples:
   daxfs pool ls /var/lib/pool
   daxfs pool ls --json /var/lib/pool | jq -r '.images[].key'`, Flags: with()},
			{Name: "show", Usage: "show what a pool, or an image in it, takes and shares", ArgsUsage: "POOL [KEY]", Action: e.poolShow, Description: `
Examples:
   daxfs pool show /var/lib/pool
   daxfs pool show /var/lib/pool web
   daxfs pool show --json /var/lib/pool | jq .saved`, Flags: with()},
			{Name: "put", Usage: "add an image from an OCI image or a directory", ArgsUsage: "POOL SOURCE", Action: e.poolPut, Description: `
` + sourceHelp + `

Files and layers that the pool has are not stored again. An image with the same key has to have the same contents; remove
it first to put others in its place. A directory needs --key. When the command fails, the pool holds the images that it
held before; layers that were read whole stay, for the next attempt.

Examples:
   daxfs pool put /var/lib/pool docker://debian:12
   daxfs pool put --key web /var/lib/pool oci-archive:web.tar
   daxfs pool put --key llama /var/lib/pool rootfs:llama`, Flags: with(append([]cli.Flag{
				&cli.StringFlag{Name: "key", Usage: "call it `KEY`", DefaultText: "its chain ID"},
			}, sourceFlags()...)...)},
			{Name: "rm", Usage: "remove images; they must not be mounted", ArgsUsage: "POOL KEY...", Action: e.poolRemove, Description: `
If one of the images is not there or is mounted, none is removed. Layers stay until gc.

Example:
   daxfs pool rm /var/lib/pool web jobs`, Flags: with()},
			{Name: "gc", Usage: "remove layers that no image uses", ArgsUsage: "POOL", Action: e.poolCollect, Description: `
Layers are kept so that images on the same ones need not read them again.

Example:
   daxfs pool gc /var/lib/pool`, Flags: with(
				&cli.BoolFlag{Name: "all", Usage: "remove all layers; images stay as they are"})},
			{Name: "check", Usage: "prove that everything in a pool is consistent", ArgsUsage: "POOL", Action: e.poolCheck, Description: `
Reads all contents and metadata. Writes every finding with its rule (docs/pool.md and docs/format.md explain the rules), and
ends with status 1 if there are any.

Examples:
   daxfs pool check /var/lib/pool
   daxfs pool check --json /var/lib/pool | jq '.findings[].rule'`, Flags: with()},
		},
	}
}

// regionOf turns the POOL argument into a region.
func regionOf(c *cli.Context, readOnly bool) (region.Config, error) {
	rc, err := regionAt(c.String("kind"), c.Args().First())
	rc.ReadOnly = readOnly
	return rc, err
}

// regionAt is the region that a POOL argument stands for, of the kind that follows from it unless one is given.
func regionAt(kind, arg string) (region.Config, error) {
	rc := region.Config{Kind: kind, Path: arg}
	if addr, size, ok := strings.Cut(arg, "+"); ok && (kind == "" || kind == region.KindPhys) && !strings.Contains(arg, "/") {
		phys, err1 := strconv.ParseUint(addr, 0, 64)
		n, err2 := strconv.ParseInt(size, 0, 64)
		if err := errors.Join(err1, err2); err != nil {
			return rc, &usageError{"pool", fmt.Sprintf("physical range %q, expected ADDRESS+SIZE: %v", arg, err)}
		}
		// Whoever opens a pool does not take the range: init did, and had to be forced where the kernel does not reserve it.
		return region.Config{Kind: region.KindPhys, Phys: phys, Size: n, Force: true}, nil
	}
	if kind != "" {
		if !slices.Contains(region.Kinds(), kind) {
			return rc, &usageError{"pool", fmt.Sprintf("--kind %q, expected one of %s", kind, strings.Join(region.Kinds(), ", "))}
		}
		return rc, nil
	}
	info, err := describe("/", arg)
	if errors.Is(err, os.ErrNotExist) {
		// One that is to be made is of the kind of its directory.
		dir, derr := filepath.EvalSymlinks(filepath.Dir(arg))
		if derr != nil {
			return rc, derr
		}
		info, err = fileRegion(dir)
	}
	rc.Kind = info.Kind
	return rc, err
}

// indexOf is the index of a pool.
func indexOf(c *cli.Context, rc region.Config) (string, error) {
	if c.IsSet("index") {
		return c.String("index"), nil
	}
	switch rc.Kind {
	case region.KindFile, region.KindTmpfs:
		if beside := filepath.Join(filepath.Dir(rc.Path), "index.db"); fileExists(beside) {
			return beside, nil
		}
		return rc.Path + ".index", nil
	}
	return "", wrongUse(c, "a pool of kind %q needs --index", rc.Kind)
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// openPool opens the pool as its owner. close closes both.
func (e *env) openPool(c *cli.Context) (p *pool.Pool, closePool func() error, err error) {
	rc, err := regionOf(c, false)
	if err != nil {
		return nil, nil, err
	}
	index, err := indexOf(c, rc)
	if err != nil {
		return nil, nil, err
	}
	r, err := region.Open(rc)
	if err != nil {
		return nil, nil, err
	}
	p, err = pool.Open(r, index, e.poolOptions())
	if err != nil {
		return nil, nil, errors.Join(err, r.Close())
	}
	return p, func() error { return errors.Join(p.Close(), r.Close()) }, nil
}

func (e *env) poolOptions() pool.Options {
	return pool.Options{Warn: func(err error) { fmt.Fprintln(e.stderr, "daxfs:", message(err)) }}
}

// withPool opens a pool, calls f and closes the pool; f's error comes first.
func (e *env) withPool(c *cli.Context, f func(p *pool.Pool) error) error {
	p, closePool, err := e.openPool(c)
	if err != nil {
		return err
	}
	err = f(p)
	return errors.Join(err, closePool())
}

func (e *env) poolInit(c *cli.Context) error {
	if err := needArgs(c, "POOL"); err != nil {
		return err
	}
	rc, err := regionOf(c, false)
	if err != nil {
		return err
	}
	if c.IsSet("size") {
		if rc.Size, err = sizeFlag(c, "size"); err != nil {
			return err
		}
	}
	made := !fileExists(rc.Path)
	rc.Create, rc.Force = true, c.Bool("force")
	switch rc.Kind {
	case region.KindPmem, region.KindDevDAX, region.KindPhys:
		rc.Create = false
	case region.KindDMABuf:
		return wrongUse(c, "a DMA buffer ends with the process that has it open: only the daemon can make such a pool")
	}
	if made && rc.Create && rc.Size == 0 {
		return wrongUse(c, "no file %q, so one is made: --size is needed", rc.Path)
	}
	index, err := indexOf(c, rc)
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
	o := e.poolOptions()
	o.Force = c.Bool("force")
	p, err := pool.Create(r, index, o)
	if err != nil {
		return errors.Join(err, r.Close(), unmake())
	}
	defer r.Close()
	defer p.Close()
	u := p.Usage()
	if c.Bool("json") {
		id := p.ID()
		return writeJSON(e.stdout, poolMade{hex.EncodeToString(id[:]), index, r.Info(), u})
	}
	fmt.Fprintf(e.stdout, "%s: empty pool of %s, index %s\n", printable(c.Args().First()), human(u.Size), printable(index))
	return nil
}

// poolMade is what pool init --json writes.
type poolMade struct {
	ID     string      `json:"id"`
	Index  string      `json:"index"`
	Region region.Info `json:"region"`
	Usage  pool.Usage  `json:"usage"`
}

// poolFreed is what pool rm --json and pool gc --json write.
type poolFreed struct {
	Images int        `json:"images"`
	Layers int        `json:"layers"`
	Freed  int64      `json:"freed"`
	Usage  pool.Usage `json:"usage"`
}

// poolChecked is what pool check --json writes.
type poolChecked struct {
	OK       bool           `json:"ok"`
	Findings []pool.Finding `json:"findings"`
}

// poolImage is an image in pool ls --json and pool show --json.
type poolImage struct {
	pool.Image
	UUID  string           `json:"uuid"`
	Usage *pool.ImageUsage `json:"usage,omitempty"`
}

// poolState is pool ls --json and pool show --json.
type poolState struct {
	ID         string      `json:"id"`
	Generation uint64      `json:"generation"`
	Size       int64       `json:"size"`
	Usage      *pool.Usage `json:"usage,omitempty"` // only known to the owner
	Unshared   int64       `json:"unshared"`        // what the images' contents would take apart
	Contents   int64       `json:"contents"`        // and what they take
	Saved      int64       `json:"saved"`
	Images     []poolImage `json:"images"`
}

// state reads the catalogue, and what the owner knows if the pool has none at the moment.
func (e *env) state(c *cli.Context) (*poolState, error) {
	rc, err := regionOf(c, true)
	if err != nil {
		return nil, err
	}
	r, err := region.Open(rc)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cat, err := pool.ReadCatalogue(r)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.Args().First(), err)
	}
	shared, err := pool.ReadShared(r, cat)
	if err != nil {
		fmt.Fprintf(e.stderr, "daxfs: what these images share is not known: %s\n", message(err))
	}
	s := &poolState{ID: hex.EncodeToString(cat.PoolID[:]), Generation: cat.Generation, Size: cat.Size, Images: []poolImage{}}
	for _, m := range cat.Images {
		im := poolImage{Image: m, UUID: uuid(m.UUID)}
		if u, ok := shared.Images[m.Key]; ok {
			im.Usage = &u
		}
		s.Images = append(s.Images, im)
	}
	s.Unshared, s.Contents, s.Saved = shared.Unshared, shared.ImageExtents, shared.Unshared-shared.ImageExtents
	p, closePool, err := e.openPool(c)
	if err != nil {
		// It belongs to a process that runs, here or on another machine: what readers may know stays.
		fmt.Fprintf(e.stderr, "daxfs: layers and free space are known to the owner only: %s\n", message(err))
		return s, nil
	}
	u := p.Usage()
	s.Usage = &u
	return s, closePool()
}

func (e *env) poolList(c *cli.Context) error {
	if err := needArgs(c, "POOL"); err != nil {
		return err
	}
	s, err := e.state(c)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, s)
	}
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "KEY\tOFFSET\tWINDOW\tCONTENTS\tSHARED\tMETADATA\tADDED")
	for _, m := range s.Images {
		contents, shared := "-", "-"
		if m.Usage != nil {
			contents, shared = human(m.Usage.Extents), human(m.Usage.Shared)
		}
		fmt.Fprintf(w, "%s\t%#x\t%s\t%s\t%s\t%s\t%s\n", printable(m.Key), m.Off, human(m.Size), contents, shared, human(m.Seg),
			m.Created.Local().Format(time.DateTime))
	}
	return w.Flush()
}

func (e *env) poolShow(c *cli.Context) error {
	if err := needArgs(c, "POOL", "[KEY]"); err != nil {
		return err
	}
	s, err := e.state(c)
	if err != nil {
		return err
	}
	if key := c.Args().Get(1); key != "" {
		return e.showImage(c, s, key)
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, s)
	}
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	defer w.Flush()
	fmt.Fprintf(w, "Pool\t%s, generation %d\n", s.ID, s.Generation)
	fmt.Fprintf(w, "Size\t%s\n", human(s.Size))
	fmt.Fprintf(w, "Images\t%d\n", len(s.Images))
	if u := s.Usage; u != nil {
		fmt.Fprintf(w, "Contents\t%s in %d distinct files\n", human(u.Extents), u.ExtentCount)
		fmt.Fprintf(w, "Metadata\t%s\n", human(u.Segments))
		fmt.Fprintf(w, "Free\t%s, %s in one piece\n", human(u.Free), human(u.LongestFree))
		fmt.Fprintf(w, "Layers\t%d, holding %s that no image uses\n", u.Layers, human(u.Reclaimable))
	}
	fmt.Fprintf(w, "Saved\t%s: the images' contents would take %s apart, and take %s\n", human(s.Saved), human(s.Unshared), human(s.Contents))
	return nil
}

func (e *env) showImage(c *cli.Context, s *poolState, key string) error {
	for _, m := range s.Images {
		if m.Key != key {
			continue
		}
		if c.Bool("json") {
			return writeJSON(e.stdout, m)
		}
		w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
		fmt.Fprintf(w, "Key\t%s\nUUID\t%s\nAdded\t%s\n", printable(m.Key), m.UUID, m.Created.Local().Format(time.DateTime))
		fmt.Fprintf(w, "Window\t%d bytes at %d (%#x)\nMetadata\t%s\n", m.Size, m.Off, m.Off, human(m.Seg))
		if u := m.Usage; u != nil {
			fmt.Fprintf(w, "Contents\t%s in %d distinct files\n", human(u.Extents), u.Files)
			fmt.Fprintf(w, "Shared\t%s with other images, %s of its own\n", human(u.Shared), human(u.Extents-u.Shared))
		}
		return w.Flush()
	}
	return fmt.Errorf("%s: image %q: %w", c.Args().First(), key, pool.ErrNotFound)
}

func (e *env) poolRemove(c *cli.Context) error {
	if c.NArg() < 2 {
		return wrongUse(c, "%d arguments, expected POOL KEY...", c.NArg())
	}
	return e.withPool(c, func(p *pool.Pool) error {
		before := p.Usage()
		// All of them or none: a misspelt key removes nothing.
		for _, key := range c.Args().Slice()[1:] {
			m, err := p.Image(key)
			if err != nil {
				return err
			}
			if err := region.WindowInUse(p.Region(), m.Off); err != nil {
				return fmt.Errorf("image %q: %w; unmount it first", key, err)
			}
		}
		for _, key := range slices.Compact(slices.Sorted(slices.Values(c.Args().Slice()[1:]))) {
			if err := p.RemoveImage(c.Context, key); err != nil {
				return err
			}
		}
		return e.freed(c, before, p.Usage())
	})
}

func (e *env) poolCollect(c *cli.Context) error {
	if err := needArgs(c, "POOL"); err != nil {
		return err
	}
	return e.withPool(c, func(p *pool.Pool) error {
		before := p.Usage()
		keys := p.UnusedLayers()
		if c.Bool("all") {
			keys = p.Layers()
		}
		for _, key := range keys {
			if err := p.RemoveLayer(c.Context, key); err != nil {
				return err
			}
		}
		return e.freed(c, before, p.Usage())
	})
}

// freed says what removing has freed.
func (e *env) freed(c *cli.Context, before, after pool.Usage) error {
	images, layers := before.Images-after.Images, before.Layers-after.Layers
	bytes := before.Extents + before.Segments - after.Extents - after.Segments
	if c.Bool("json") {
		return writeJSON(e.stdout, poolFreed{images, layers, bytes, after})
	}
	fmt.Fprintf(e.stdout, "removed %d images and %d layers, %s are free again\n", images, layers, human(bytes))
	return nil
}

func (e *env) poolCheck(c *cli.Context) error {
	if err := needArgs(c, "POOL"); err != nil {
		return err
	}
	findings := []pool.Finding{}
	err := e.withPool(c, func(p *pool.Pool) error {
		return p.Check(c.Context, func(f pool.Finding) bool {
			findings = append(findings, f)
			return true
		})
	})
	if err != nil {
		return err
	}
	if c.Bool("json") {
		err = writeJSON(e.stdout, poolChecked{len(findings) == 0, findings})
	} else {
		err = printFindings(e.stdout, findings)
	}
	if err == nil && len(findings) > 0 {
		return errSilent
	}
	return err
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
