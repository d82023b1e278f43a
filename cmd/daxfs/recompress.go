package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/converter/recompress"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
)

// formatChunked is the only value of --format.
const formatChunked = "zstd:chunked"

// imageOnly are the flags of convert that apply only to image files.
var imageOnly = []string{"label", "concurrency", "memory", "max-entries", "no-align", "sync", "overlay-upper"}

// recompress implements convert --to.
func (e *env) recompress(c *cli.Context) error {
	switch format := c.String("format"); {
	case c.IsSet("output"):
		return wrongUse(c, "-o IMAGE and --to DESTINATION, expected one of them")
	case format != formatChunked:
		return wrongUse(c, "--format %q, expected %s", format, formatChunked)
	}
	for _, name := range imageOnly {
		if c.IsSet(name) {
			return wrongUse(c, "--%s is about image files, and --to writes none", name)
		}
	}
	maxSize, err := sizeFlag(c, "max-size")
	if err != nil {
		return err
	}
	var progress *progress
	notify := func(m string) { progress.notify(m) }
	src, platform, err := e.parseSource(c, c.Args().First(), maxSize, notify)
	if err != nil {
		return err
	}
	defer src.Close()
	to, err := recompress.ParseDestination(c.String("to"), recompress.Config{
		PlainHTTP: c.Bool("plain-http"), HostDirs: c.StringSlice("hosts-dir"), Notify: notify, Source: c.Args().First(),
	})
	if err != nil {
		return wrongUse(c, "%v", err)
	}
	defer to.Close()
	o := recompress.Options{MaxSize: maxSize}
	if c.IsSet("platform") {
		o.Platform = &platform
	}
	progress = newProgress(e.stderr, c.Bool("quiet"))
	o.Progress = progress
	res, err := recompress.Convert(c.Context, src, to, o)
	progress.end(err == nil)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(e.stdout)
	switch {
	case c.Bool("json"):
		err = writeJSON(w, recompressedOf(to.String(), res))
	case !c.Bool("quiet"):
		printRecompressed(w, to.String(), res)
	}
	if err = errors.Join(err, w.Flush()); err != nil {
		return fmt.Errorf("%s is complete, but the summary is not: %w", to, err)
	}
	return nil
}

// recompressed is the output of convert --to --json. All sizes are bytes.
type recompressed struct {
	Image     string              `json:"image"`
	Digest    string              `json:"digest"`
	MediaType string              `json:"mediaType"`
	Images    int                 `json:"images"`
	Layers    []recompressedLayer `json:"layers"`
	Notes     []string            `json:"notes"`
	Sent      int64               `json:"bytesSent"`
	Mounted   int64               `json:"bytesMounted"`
	Present   int64               `json:"bytesPresent"`
}

type recompressedLayer struct {
	DiffID string `json:"diffID"`
	From   string `json:"from,omitempty"`
	To     string `json:"to"`
	In     int64  `json:"bytesIn"`
	Out    int64  `json:"bytesOut"`
	Kept   string `json:"kept,omitempty"`
}

func recompressedOf(image string, r *recompress.Result) recompressed {
	s := recompressed{
		Image: image, Digest: r.Digest.String(), MediaType: r.MediaType, Images: r.Images,
		Layers: []recompressedLayer{}, Notes: append([]string{}, r.Notes...),
		Sent: r.Sent, Mounted: r.Mounted, Present: r.Present,
	}
	for _, l := range r.Layers {
		s.Layers = append(s.Layers, recompressedLayer{
			l.DiffID.String(), l.From.Digest.String(), l.To.Digest.String(), l.From.Size, l.To.Size, l.Kept,
		})
	}
	return s
}

func printRecompressed(w io.Writer, image string, r *recompress.Result) {
	fmt.Fprintf(w, "%s: %s\n", printable(image), r.Digest)
	var in, out int64
	encoded := 0
	for _, l := range r.Layers {
		in, out = in+l.From.Size, out+l.To.Size
		if l.Kept == "" {
			encoded++
			continue
		}
		fmt.Fprintf(w, "layer %s is kept as it is: %s\n", short(source.Layer{Desc: l.From, DiffID: l.DiffID}),
			printable(l.Kept))
	}
	fmt.Fprintf(w, "%d of %d layers of %d images are %s now, in %s, out %s\n",
		encoded, len(r.Layers), r.Images, formatChunked, human(in), human(out))
	if strings.HasPrefix(image, "docker:") {
		fmt.Fprintf(w, "sent %s, mounted from another repository %s, there already %s\n",
			human(r.Sent), human(r.Mounted), human(r.Present))
	}
	for _, n := range r.Notes {
		fmt.Fprintln(w, printable(n))
	}
}
