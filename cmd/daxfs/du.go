package main

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func init() {
	register(53, duCommand)
	register(54, diffCommand)
}

func duCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "du",
		Usage:     "show what takes space in an image of a pool, and what of it other images have",
		ArgsUsage: "IMAGE",
		Description: `
Shows each directory down to --depth with the contents of all files below it, in whole pages, the
largest first. Contents with several names in the image count once, for the first name.

Examples:
   daxfs du docker.io/library/debian:12
   daxfs du --depth 3 --json web`,
		Flags: append([]cli.Flag{
			&cli.IntFlag{
				Name: "depth", Aliases: []string{"d"}, Value: 1,
				Usage: "show directories down to `N` names below the root",
			},
		}, poolFlags()...),
		Action: e.du,
	}
}

// imageSpace is the output of du --json.
type imageSpace struct {
	Image       string           `json:"image"`
	Names       []string         `json:"names"`
	Bytes       int64            `json:"bytes"`
	Shared      int64            `json:"shared"`
	Files       int              `json:"files"`
	Directories []directorySpace `json:"directories"`
}

// directorySpace is the space of the files below a directory.
type directorySpace struct {
	Path      string `json:"path"`
	PathBytes []byte `json:"pathBytes,omitempty"`
	Bytes     int64  `json:"bytes"`
	Shared    int64  `json:"shared"` // the part of Bytes that other images have too
	Files     int    `json:"files"`  // distinct contents
}

func (e *env) du(c *cli.Context) error {
	if err := needArgs(c, "IMAGE"); err != nil {
		return err
	}
	depth := c.Int("depth")
	if depth < 0 {
		return wrongUse(c, "--depth %d, expected 0 or more", depth)
	}
	p, err := e.openLook(c)
	if err != nil {
		return err
	}
	defer p.Close()
	m, err := p.find(c.Args().First())
	if err != nil {
		return err
	}
	others := map[int64]bool{}
	for _, other := range p.state.Images {
		if other.Key == m.Key {
			continue
		}
		if err := p.files(other, func(_ string, off, _ int64) { others[off] = true }); err != nil {
			fmt.Fprintf(e.stderr, "daxfs: what image %s shares is not known: %s\n", shortKey(other.Key), message(err))
		}
	}
	sum := map[string]*directorySpace{}
	seen := map[int64]bool{}
	err = p.files(m, func(name string, off, n int64) {
		if seen[off] {
			return
		}
		seen[off] = true
		for _, dir := range directoriesAbove(name, depth) {
			d := sum[dir]
			if d == nil {
				d = &directorySpace{Path: dir, PathBytes: bytesOf(dir)}
				sum[dir] = d
			}
			d.Bytes += n
			d.Files++
			if others[off] {
				d.Shared += n
			}
		}
	})
	if err != nil {
		return fmt.Errorf("image %s: %w", shortKey(m.Key), err)
	}
	out := imageSpace{Image: m.Key, Names: append([]string{}, m.Names...), Directories: []directorySpace{}}
	for _, d := range sum {
		out.Directories = append(out.Directories, *d)
	}
	slices.SortFunc(out.Directories, func(a, b directorySpace) int {
		return cmp.Or(cmp.Compare(b.Bytes, a.Bytes), cmp.Compare(a.Path, b.Path))
	})
	if root := sum["/"]; root != nil {
		out.Bytes, out.Shared, out.Files = root.Bytes, root.Shared, root.Files
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, out)
	}
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "SIZE\tSHARED\tFILES\tDIRECTORY")
	for _, d := range out.Directories {
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\n", human(d.Bytes), human(d.Shared), d.Files, printable(d.Path))
	}
	return w.Flush()
}

// directoriesAbove returns the directories above a file, from the root down to depth names below it.
func directoriesAbove(name string, depth int) []string {
	dirs := []string{"/"}
	parts := strings.Split(name, "/")
	for i := 1; i <= depth && i < len(parts); i++ {
		dirs = append(dirs, "/"+strings.Join(parts[:i], "/"))
	}
	return dirs
}

func diffCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "diff",
		Usage:     "show which files two images of a pool share, and which only one has",
		ArgsUsage: "IMAGE IMAGE",
		Description: `
Writes a line for each file with contents: "=" if both images have these contents, whatever the
names; "-" if only the first image has them, "+" if only the second. Sums follow at the end.

Examples:
   daxfs diff debian:12 debian:12-slim
   daxfs diff --only shared web jobs
   daxfs diff --json web jobs | jq .shared`,
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "only", Usage: "write `WHICH` lines only: shared, first, second or none"},
		}, poolFlags()...),
		Action: e.diff,
	}
}

// imageDiff is the output of diff --json.
type imageDiff struct {
	First  string     `json:"first"`
	Second string     `json:"second"`
	Shared diffSum    `json:"shared"`
	Lone   diffSum    `json:"onlyFirst"`
	Other  diffSum    `json:"onlySecond"`
	Files  []diffFile `json:"files"`
}

type diffSum struct {
	Files int   `json:"files"` // distinct contents
	Bytes int64 `json:"bytes"`
}

type diffFile struct {
	In        string `json:"in"` // shared, first or second
	Path      string `json:"path"`
	PathBytes []byte `json:"pathBytes,omitempty"`
	Other     string `json:"other,omitempty"` // the name in the second image, if it differs
	Bytes     int64  `json:"bytes"`
}

var diffMarks = map[string]string{"shared": "=", "first": "-", "second": "+"}

func (e *env) diff(c *cli.Context) error {
	if err := needArgs(c, "IMAGE", "IMAGE"); err != nil {
		return err
	}
	only := c.String("only")
	if only != "" && only != "none" && diffMarks[only] == "" {
		return wrongUse(c, "--only %q, expected shared, first, second or none", only)
	}
	p, err := e.openLook(c)
	if err != nil {
		return err
	}
	defer p.Close()
	var lists [2][]lookFile
	var keys [2]string
	for i := range lists {
		m, err := p.find(c.Args().Get(i))
		if err != nil {
			return err
		}
		keys[i] = m.Key
		if lists[i], err = p.distinct(m); err != nil {
			return fmt.Errorf("image %s: %w", shortKey(m.Key), err)
		}
	}
	out := compareFiles(lists)
	out.First, out.Second = keys[0], keys[1]
	if only != "" {
		out.Files = slices.DeleteFunc(out.Files, func(f diffFile) bool { return f.In != only })
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, out)
	}
	for _, f := range out.Files {
		fmt.Fprintf(e.stdout, "%s %s %s", diffMarks[f.In], human(f.Bytes), printable(f.Path))
		if f.Other != "" {
			fmt.Fprintf(e.stdout, " (%s)", printable(f.Other))
		}
		fmt.Fprintln(e.stdout)
	}
	_, err = fmt.Fprintf(e.stdout, "shared: %s in %d files; only the first: %s in %d; only the second: %s in %d\n",
		human(out.Shared.Bytes), out.Shared.Files, human(out.Lone.Bytes), out.Lone.Files, human(out.Other.Bytes),
		out.Other.Files)
	return err
}

// lookFile is one of an image's contents, with its first name.
type lookFile struct {
	path     string
	off, len int64
}

// compareFiles finds the contents that are in both lists or in one of them.
func compareFiles(lists [2][]lookFile) imageDiff {
	second := map[int64]string{}
	for _, f := range lists[1] {
		second[f.off] = f.path
	}
	out := imageDiff{Files: []diffFile{}}
	add := func(sum *diffSum, in string, f lookFile, other string) {
		sum.Files++
		sum.Bytes += f.len
		if other == f.path {
			other = ""
		}
		out.Files = append(out.Files,
			diffFile{In: in, Path: f.path, PathBytes: bytesOf(f.path), Other: other, Bytes: f.len})
	}
	for _, f := range lists[0] {
		if other, ok := second[f.off]; ok {
			add(&out.Shared, "shared", f, other)
			delete(second, f.off)
		} else {
			add(&out.Lone, "first", f, f.path)
		}
	}
	for _, f := range lists[1] {
		if _, ok := second[f.off]; ok {
			add(&out.Other, "second", f, f.path)
		}
	}
	slices.SortStableFunc(out.Files, func(a, b diffFile) int { return cmp.Compare(a.Path, b.Path) })
	return out
}

// look is a pool opened for reading. Nothing in it is changed, whoever owns it.
type look struct {
	region.Region
	cat   *pool.Catalogue
	state *poolState
}

// openLook opens the pool that the poolFlags select. The caller closes it.
func (e *env) openLook(c *cli.Context) (*look, error) {
	a, err := poolMeant(c)
	if err != nil {
		return nil, err
	}
	s, err := e.state(c, a)
	if err != nil {
		return nil, err
	}
	r, cat, err := a.open()
	if err != nil {
		return nil, err
	}
	return &look{r, cat, s}, nil
}

func (p *look) find(name string) (poolImage, error) { return p.state.find(name) }

// files calls fn with the name and place of each of an image's contents.
func (p *look) files(m poolImage, fn func(name string, off, n int64)) error {
	return pool.WalkFiles(p.Region, p.cat, m.Image, fn)
}

// distinct returns the contents of an image, each with its first name as a path from "/".
func (p *look) distinct(m poolImage) (list []lookFile, err error) {
	seen := map[int64]bool{}
	err = p.files(m, func(name string, off, n int64) {
		if !seen[off] {
			seen[off] = true
			list = append(list, lookFile{path.Join("/", name), off, n})
		}
	})
	return list, err
}
