package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/containerd/platforms"
	"github.com/docker/go-units"
	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/converter/recompress"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/converter/source/remote"
	"github.com/daxfs/daxfs-snapshotter/converter/tree"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
)

func init() { register(10, convertCommand) }

func convertCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "convert",
		Usage:     "make an image out of an OCI image, or an OCI image whose files can be pulled alone",
		ArgsUsage: "SOURCE",
		Description: `
` + sourceHelp + `

Archives may be compressed with gzip or zstd; a compressed one is first unpacked to a file in
$TMPDIR. All digests are verified. The same layers give the same bytes, whatever the source. If the
command fails or is interrupted, IMAGE stays as it was.

With --to DESTINATION the result is an OCI image with the same layers in zstd:chunked. From such an
image, a daxfs host and podman fetch only the files that they lack. DESTINATION is
` + recompress.Kinds + `. Configurations stay as they are, and so do indexes
with all their images unless --platform chooses one. A layer that cannot be zstd:chunked is kept,
with the reason.

` + sizeHelp + `

Examples:
   daxfs convert docker://debian:12 -o debian.daxfs
   daxfs convert docker://debian:12 --to docker://registry.example.com/debian:12
   daxfs convert --platform linux/arm64 oci:layout:v1 -o app.daxfs
   daxfs convert containerd:docker.io/library/redis:7 --namespace k8s.io -o redis.daxfs
   daxfs convert --no-xattrs docker://debian:12 -o gvisor.daxfs
   mount -t erofs -o ro debian.daxfs /mnt`,
		Flags: append(append([]cli.Flag{
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "write the image to `IMAGE`"},
			&cli.StringFlag{Name: "to", Usage: "write an OCI image to `DESTINATION`"},
			&cli.StringFlag{Name: "format", Usage: "`FORMAT` of the layers of an OCI image", Value: formatChunked},
		}, sourceFlags()...),
			&cli.StringFlag{Name: "label", Usage: "volume `NAME` of the image, up to 15 bytes"},
			&cli.IntFlag{
				Name: "concurrency", Usage: "read `N` layers at the same time, at least 4",
				DefaultText: "one for each core",
			},
			&cli.StringFlag{
				Name:  "memory",
				Usage: "let at most `SIZE` of contents of a remote image wait in memory; more waits on disk",
				Value: size(converter.DefaultMemory),
			},
			&cli.StringFlag{
				Name: "max-size", Usage: "refuse images with more than `SIZE` of unpacked layers",
				Value: size(converter.DefaultMaxSize),
			},
			&cli.Int64Flag{
				Name: "max-entries", Usage: "refuse images with more than `N` files in all layers",
				Value: converter.DefaultMaxEntries,
			},
			&cli.BoolFlag{
				Name:  "no-align",
				Usage: "do not start files of 2 MiB and more at multiples of 2 MiB: for many big files and no DAX",
			},
			&cli.BoolFlag{
				Name:  "no-xattrs",
				Usage: "leave out extended attributes, and say which: gVisor reads no inode that has any",
			},
			&cli.BoolFlag{Name: "sync", Usage: "return only when the image is on disk"},
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "show no progress and no summary"},
			&cli.BoolFlag{Name: "json", Usage: "write the summary as JSON, also with --quiet"},
		),
		Action: e.convert,
	}
}

// sourceHelp explains SOURCE in the help of commands that take one.
const sourceHelp = `SOURCE is one of
   oci:DIR[:TAG]              an OCI image layout
   oci-archive:FILE[:TAG]     an OCI image layout in a tar file
   docker-archive:FILE[:REF]  the output of docker save; :@N in place of :REF is its image N, from 0
   docker://REF               an image in a registry, with the credentials of docker login
   containerd:REF             an image in containerd's image store
   rootfs:DIR                 a directory as it is; with --overlay-upper without overlayfs's own marks
   daxfs:FILE                 an image that daxfs convert wrote; it is verified first
oci and oci-archive also take @DIGEST in place of :TAG. Without a tag, name or digest, the source must
hold one image, at most one for each platform; other entries are skipped. docs/sources.md has the rules.`

// sizeHelp explains SIZE in the help of commands that take one: see sizeFlag.
const sizeHelp = `A SIZE is a number of bytes, or of KiB, MiB, GiB or TiB with k, m, g or t behind it.`

// sourceFlags select how to reach SOURCE and which image of it to take.
func sourceFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{
			Name: "platform", Usage: "choose `OS[(VERSION+FEATURE)]/ARCH[/VARIANT]` from a multi-platform image",
			DefaultText: "this machine's",
		},
		&cli.BoolFlag{Name: "overlay-upper", Usage: "the directory of rootfs:DIR is the upper directory of an overlay"},
		&cli.BoolFlag{Name: "plain-http", Usage: "talk to the registry without TLS"},
		&cli.StringSliceFlag{
			Name:  "hosts-dir",
			Usage: "find mirrors and certificates of registries (hosts.toml) in `DIR`; can be given more than once",
			Value: cli.NewStringSlice(remote.DefaultHostDirs()...),
		},
		&cli.StringFlag{
			Name: "address", Usage: "`SOCKET` of containerd", Value: source.DefaultAddress,
			EnvVars: []string{"CONTAINERD_ADDRESS"},
		},
		&cli.StringFlag{
			Name: "namespace", Usage: "`NAME` of containerd's namespace", Value: source.DefaultNamespace,
			EnvVars: []string{"CONTAINERD_NAMESPACE"},
		},
	}
}

// parseSource opens the SOURCE that the arguments name. The caller closes it. notify gets the reasons for delays.
func (e *env) parseSource(c *cli.Context, name string, maxSize int64,
	notify func(string),
) (source.Source, source.Platform, error) {
	e.useLog()
	platform, err := source.ParsePlatform(c.String("platform"))
	if err != nil {
		return nil, platform, wrongUse(c, "%v", err)
	}
	src, err := source.Parse(name, source.Config{
		PlainHTTP: c.Bool("plain-http"), HostDirs: c.StringSlice("hosts-dir"), Notify: notify,
		OverlayUpper: c.Bool("overlay-upper"),
		Address:      c.String("address"), Namespace: c.String("namespace"), MaxSize: maxSize,
	})
	if err != nil {
		return nil, platform, wrongUse(c, "%v", err)
	}
	return src, platform, nil
}

func (e *env) convert(c *cli.Context) error {
	if err := needArgs(c, "SOURCE"); err != nil {
		return err
	}
	if c.IsSet("to") {
		return e.recompress(c)
	}
	if c.IsSet("format") {
		return wrongUse(c, "--format is that of an OCI image, expected --to DESTINATION beside it")
	}
	if c.String("output") == "" {
		return wrongUse(c, "no output, expected -o IMAGE or --to DESTINATION")
	}
	o := converter.Options{
		Image:       daxfs.Options{Label: c.String("label")},
		Concurrency: c.Int("concurrency"),
		NoAlign:     c.Bool("no-align"),
		NoXattrs:    c.Bool("no-xattrs"),
		Sync:        c.Bool("sync"),
	}
	if label := o.Image.Label; len(label) > daxfs.MaxLabel { // checked before layers are read
		return wrongUse(c, "--label %q: %d bytes, expected at most %d", label, len(label), daxfs.MaxLabel)
	}
	if o.Concurrency < 0 {
		return wrongUse(c, "--concurrency %d, expected 1 or more", o.Concurrency)
	}
	var err error
	if o.Memory, err = sizeFlag(c, "memory"); err != nil {
		return err
	}
	if o.MaxSize, err = sizeFlag(c, "max-size"); err != nil {
		return err
	}
	if o.MaxEntries = c.Int64("max-entries"); o.MaxEntries <= 0 {
		return wrongUse(c, "--max-entries %d, expected 1 or more", o.MaxEntries)
	}
	var progress *progress
	src, platform, err := e.parseSource(c, c.Args().First(), o.MaxSize, func(m string) { progress.notify(m) })
	if err != nil {
		return err
	}
	defer src.Close()
	progress = newProgress(e.stderr, c.Bool("quiet"))
	o.Platform, o.Progress = platform, progress
	res, err := converter.Convert(c.Context, src, c.String("output"), o)
	progress.end(err == nil)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(e.stdout)
	switch {
	case c.Bool("json"):
		err = writeJSON(w, summaryOf(c.String("output"), res))
	case !c.Bool("quiet"):
		printSummary(w, c.String("output"), res)
		printOverlay(w, res.Dir, c.Bool("overlay-upper"))
	}
	if n := res.Dir.IgnoredXattrs; n > 0 { // a loss, so --quiet does not hide it
		fmt.Fprintf(e.stderr, "daxfs: left out %d extended attributes: "+
			"an image holds user.*, trusted.*, security.* and POSIX ACLs\n", n)
	}
	printLostXattrs(e.stderr, res.LostXattrs)
	if err = errors.Join(err, w.Flush()); err != nil {
		return fmt.Errorf("%s is complete, but the summary is not: %w", c.String("output"), err)
	}
	return nil
}

// size formats bytes as flags accept them.
func size(n int64) string {
	return units.CustomSize("%.4g%s", float64(n), 1024, []string{"", "k", "m", "g", "t"})
}

func sizeFlag(c *cli.Context, name string) (int64, error) {
	n, err := units.RAMInBytes(c.String(name))
	if err != nil || n <= 0 || n == math.MaxInt64 {
		return 0, wrongUse(c, "--%s %q, expected a size like 64m or 2g", name, c.String(name))
	}
	return n, nil
}

// summary is the output of convert --json. All sizes are bytes.
type summary struct {
	Image        string    `json:"image"`
	UUID         string    `json:"uuid"`
	RootHash     string    `json:"rootHash"`
	Digest       string    `json:"digest,omitempty"`
	Platform     string    `json:"platform,omitempty"`
	Layers       int       `json:"layers"`
	BytesIn      int64     `json:"bytesIn"`
	Unpacked     int64     `json:"bytesUnpacked"`
	BytesOut     int64     `json:"bytesOut"`
	Deduplicated int64     `json:"bytesDeduplicated"`
	Counts       counts    `json:"counts"`
	LeftOut      []leftOut `json:"leftOutOfDAXFS"`
	Whiteouts    int64     `json:"overlayWhiteouts,omitempty"`
	Overlay      int64     `json:"overlayXattrs,omitempty"`
	Ignored      int64     `json:"ignoredXattrs,omitempty"`

	LostXattrs []lostXattr `json:"lostXattrs,omitempty"`
}

// lostXattr is an attribute that --no-xattrs left out, and the first inode that had it.
type lostXattr struct {
	Name      string `json:"name"`
	NameBytes []byte `json:"nameBytes,omitempty"`
	Inodes    int    `json:"inodes"`
	Path      string `json:"path"`
	Bytes     []byte `json:"pathBytes,omitempty"`
}

type counts struct {
	Inodes      int   `json:"inodes"`
	Names       int   `json:"names"`
	Files       int   `json:"files"`
	Directories int   `json:"directories"`
	Symlinks    int   `json:"symlinks"`
	Others      int   `json:"others"`
	WithXattrs  int   `json:"withXattrs"`
	FileBytes   int64 `json:"fileBytes"`
}

// leftOut is a name that only the EROFS half has.
type leftOut struct {
	Path   string `json:"path"`
	Bytes  []byte `json:"pathBytes,omitempty"`
	Reason string `json:"reason"`
}

func countsOf(s daxfs.Stats) counts {
	return counts{s.Inodes, s.Names, s.Files, s.Directories, s.Symlinks, s.Others, s.Xattrs, s.FileBytes}
}

func summaryOf(image string, r *converter.Result) summary {
	s := summary{
		Image: image, UUID: uuid(r.UUID), RootHash: r.RootHash.String(), Digest: r.Digest.String(),
		Layers: r.Layers, BytesIn: r.BytesIn,
		Unpacked: r.Unpacked, BytesOut: r.BytesOut, Deduplicated: r.Deduplicated, Counts: countsOf(r.Stats),
		LeftOut: []leftOut{}, Whiteouts: r.Dir.Whiteouts, Overlay: r.Dir.OverlayXattrs, Ignored: r.Dir.IgnoredXattrs,
	}
	if r.Platform.OS != "" {
		s.Platform = platforms.Format(r.Platform)
	}
	for _, l := range r.LeftOut {
		s.LeftOut = append(s.LeftOut, leftOut{l.Path, bytesOf(l.Path), l.Reason})
	}
	for _, l := range r.LostXattrs {
		path := "/" + l.Path
		s.LostXattrs = append(s.LostXattrs, lostXattr{l.Name, bytesOf(l.Name), l.Inodes, path, bytesOf(path)})
	}
	return s
}

func uuid(b [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func printSummary(w io.Writer, image string, r *converter.Result) {
	fmt.Fprintf(w, "%s: %d files, %d directories, %d symbolic links, %d other nodes\n",
		printable(image), r.Stats.Files, r.Stats.Directories, r.Stats.Symlinks, r.Stats.Others)
	in := fmt.Sprintf("%s in %d layers", human(r.BytesIn), r.Layers)
	if r.Layers == 0 {
		in = human(r.BytesIn)
	}
	fmt.Fprintf(w, "in %s, unpacked %s, out %s, saved by deduplication %s\n",
		in, human(r.Unpacked), human(r.BytesOut), human(r.Deduplicated))
	printLosses(w, r.Stats.Xattrs, summaryOf(image, r).LeftOut, r.Stats.Names-r.Stats.V8Names)
}

// printLosses lists what the DAXFS half cannot show. left are the first of all names that it lacks. It
// never has times, so they are not listed.
func printLosses(w io.Writer, xattrs int, left []leftOut, all int) {
	if xattrs > 0 {
		fmt.Fprintf(w, "daxfs.ko will not show the extended attributes of %d inodes\n", xattrs)
	}
	if len(left) == 0 {
		return
	}
	fmt.Fprintf(w, "daxfs.ko will not show %d names:\n", all)
	const most = 10
	for i, l := range left {
		if i == most {
			fmt.Fprintf(w, "  and %d more\n", all-most)
			break
		}
		fmt.Fprintf(w, "  %s (%s)\n", printable(l.Path), l.Reason)
	}
}

// printLostXattrs lists the attributes that --no-xattrs left out. They are a loss, so --quiet does not hide them.
func printLostXattrs(w io.Writer, lost []tree.LostXattr) {
	const most = 10
	for i, l := range lost {
		if i == most {
			fmt.Fprintf(w, "daxfs: left out %d more extended attributes\n", len(lost)-most)
			break
		}
		fmt.Fprintf(w, "daxfs: left out the extended attribute %s of %d inodes, the first is %s\n",
			printable(l.Name), l.Inodes, printable("/"+l.Path))
	}
}

// printOverlay reports how overlayfs's own marks in a directory were handled.
func printOverlay(w io.Writer, s layer.Stats, upper bool) {
	if s.Whiteouts+s.OverlayXattrs == 0 {
		return
	}
	what := fmt.Sprintf("%d whiteouts (character devices 0:0) and %d attributes of overlayfs", s.Whiteouts,
		s.OverlayXattrs)
	if upper {
		fmt.Fprintf(w, "left out %s\n", what)
		return
	}
	fmt.Fprintf(w, "kept %s: an overlay over the image will obey them\n"+
		"for the upper directory of an overlay, there is --overlay-upper\n", what)
}

func human(n int64) string { return units.BytesSize(float64(n)) }
