package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

func poolDiffCommand(e *env, flags []cli.Flag) *cli.Command {
	return &cli.Command{
		Name: "diff", Usage: "show what a pull of an image would fetch here", ArgsUsage: "POOL SOURCE",
		Action: e.poolDiff,
		Description: `
` + sourceHelp + `

Fetches only the tables of layers in zstd:chunked, and changes nothing; a daemon may own the pool.
Shows for each layer: the bytes that a pull fetches, the size of the blob, and the files in the pool
and not in the pool. A layer without tables is fetched as a whole, even if the pool has that layer.
--files lists the missing files.

Examples:
   daxfs pool diff /var/lib/pool docker://registry.example.com/web:v2
   daxfs pool diff --json /var/lib/pool docker://registry.example.com/web:v2 | jq .bytesFetched`,
		Flags: append(append(flags, &cli.BoolFlag{Name: "files", Usage: "list the files that are fetched"}),
			sourceFlags()...),
	}
}

// poolDifference is the output of pool diff --json. All sizes are bytes.
type poolDifference struct {
	Image   string      `json:"image"`
	Fetched int64       `json:"bytesFetched"` // layer bytes that a pull fetches
	Blobs   int64       `json:"bytesBlobs"`   // and would fetch without the pool
	Layers  []layerDiff `json:"layers"`
}

type layerDiff struct {
	Digest  string     `json:"digest"`
	DiffID  string     `json:"diffID"`
	Blob    int64      `json:"bytesBlob"`
	Fetched int64      `json:"bytesFetched"`
	Ranges  int        `json:"ranges"`
	Have    int64      `json:"bytesHave"`    // of files in the pool
	Missing int64      `json:"bytesMissing"` // of files not in the pool
	Whole   string     `json:"whole,omitempty"`
	Files   []fileDiff `json:"files"` // files not in the pool
}

type fileDiff struct {
	Name  string `json:"name"`
	Bytes []byte `json:"nameBytes,omitempty"`
	Size  int64  `json:"size"`
}

func (e *env) poolDiff(c *cli.Context) error {
	if err := needArgs(c, "POOL", "SOURCE"); err != nil {
		return err
	}
	known, err := e.knownContents(poolArgsOf(c))
	if err != nil {
		return err
	}
	src, platform, err := e.parseSource(c, c.Args().Get(1), source.DefaultMaxSize, func(m string) {
		fmt.Fprintln(e.stderr, message(errors.New(m)))
	})
	if err != nil {
		return err
	}
	defer src.Close()
	img, err := src.Image(c.Context, platform)
	if err != nil {
		return err
	}
	if img.Tree != nil {
		return fmt.Errorf("%s: it has no layers, expected an OCI image", src)
	}
	d := poolDifference{Image: src.String(), Layers: []layerDiff{}}
	for i, l := range img.Layers {
		ld, err := diffLayer(c.Context, l, known)
		if err != nil {
			return fmt.Errorf("%s: layer %d (%s): %w", src, i, l.Name(), err)
		}
		d.Layers = append(d.Layers, *ld)
		d.Fetched, d.Blobs = d.Fetched+ld.Fetched, d.Blobs+ld.Blob
	}
	w := bufio.NewWriter(e.stdout)
	if c.Bool("json") {
		err = writeJSON(w, d)
	} else {
		printDiff(w, d, c.Bool("files"))
	}
	return errors.Join(err, w.Flush())
}

// knownContents reads the contents of a pool, whoever owns it.
func (e *env) knownContents(a poolArgs) (pool.Known, error) {
	rc, err := a.region(true)
	if err != nil {
		return nil, err
	}
	cat, err := catalogue(rc)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a.Pool, err)
	}
	sure, candidates := a.indexes(rc)
	if sure != "" {
		candidates = []string{sure}
	}
	for _, path := range candidates {
		known, kerr := pool.ReadKnown(path, cat.PoolID, cat.Size)
		if kerr == nil {
			return known, nil
		}
		err = kerr
	}
	if err == nil {
		err = errNoIndex
	}
	return nil, fmt.Errorf("%s: %w", a.Pool, err)
}

// diffLayer determines which parts of a layer a pull would fetch.
func diffLayer(ctx context.Context, l source.Layer, known pool.Known) (*layerDiff, error) {
	d := &layerDiff{
		Digest: l.Desc.Digest.String(), DiffID: l.DiffID.String(), Blob: l.Desc.Size, Fetched: l.Desc.Size, Ranges: 1,
		Files: []fileDiff{},
	}
	layout, err := chunked.ParseLayout(l.Desc)
	if err != nil {
		d.Whole = err.Error()
		return d, nil
	}
	parts, err := l.Parts(ctx)
	if err != nil {
		return nil, err
	}
	tables, err := chunked.ReadTables(ctx, parts, layout)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		d.Whole = err.Error()
		return d, nil
	}
	p := chunked.NewPlan(tables, known)
	d.Fetched, d.Ranges, d.Have, d.Missing = p.Fetch+tables.Stored, p.Ranges+1, p.Have, p.Missing
	if !p.Pays(d.Blob) {
		d.Fetched, d.Ranges, d.Whole = d.Blob+tables.Stored, 2, "most of its files are missing"
	}
	seen := map[[32]byte]bool{}
	for _, f := range tables.Files {
		if _, ok := known.Find(f.Sum, f.Size); !ok && !seen[f.Sum] {
			seen[f.Sum] = true
			d.Files = append(d.Files, fileDiff{f.Name, bytesOf(f.Name), f.Size})
		}
	}
	return d, nil
}

func printDiff(w io.Writer, d poolDifference, files bool) {
	for _, l := range d.Layers {
		name := l.Digest
		if name == "" {
			name = l.DiffID
		}
		fmt.Fprintf(w, "%.19s  fetches %s of %s", name, human(l.Fetched), human(l.Blob))
		if l.Whole != "" {
			fmt.Fprintf(w, ", all of it: %s\n", printable(l.Whole))
			continue
		}
		fmt.Fprintf(w, " in %d requests: %d files of %s are missing, %s are there\n",
			l.Ranges, len(l.Files), human(l.Missing), human(l.Have))
		if files {
			for _, f := range l.Files {
				fmt.Fprintf(w, "  %12s  %s\n", human(f.Size), printable(strings.TrimPrefix(f.Name, "./")))
			}
		}
	}
	fmt.Fprintf(w, "%s: a pull fetches %s of %s\n", printable(d.Image), human(d.Fetched), human(d.Blobs))
}
