package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"

	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/urfave/cli/v2"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/store"
)

func init() { register(55, estimateCommand) }

func estimateCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "estimate",
		Usage:     "estimate what images would take and save in a pool, without storing them",
		ArgsUsage: "[SOURCE...]",
		Description: `
` + sourceHelp + `

Reads all layers and writes nothing. --all takes the images in a namespace of containerd, whatever
snapshotter they are unpacked for. The space under overlayfs comes from containerd, for images
unpacked for it; for others it is the files of their layers, without directories. The pool is
assumed to be empty. Once the contents are read, they take as much memory as space.

Examples:
   daxfs estimate docker://debian:12 docker://redis:7
   daxfs estimate --all --namespace k8s.io
   daxfs estimate --json --all | jq .saved`,
		Flags: append([]cli.Flag{
			&cli.BoolFlag{
				Name:  "all",
				Usage: "take all images in the namespace of containerd, too; those that are not whole are left out",
			},
			&cli.StringFlag{
				Name: "snapshotter", Value: "overlayfs",
				Usage: "compare with what the snapshotter `NAME` of containerd takes",
			},
			&cli.BoolFlag{Name: "json", Usage: "write JSON; sizes are bytes"},
		}, sourceFlags()...),
		Action: e.estimate,
	}
}

// estimation is the output of estimate --json.
type estimation struct {
	Images []imageEstimate `json:"images"`
	// LeftOut are the images that cannot be read, with the reasons.
	LeftOut []leftOutImage `json:"leftOut"`
	store.Estimate
	// Takes is the size of a pool with the images.
	Takes int64 `json:"takes"`
	// Overlay is the unpacked size of the images: according to containerd, or else of their files.
	Overlay int64 `json:"overlay"`
	Saved   int64 `json:"saved"`
}

// imageEstimate is the space of an image in addition to the images before it.
type imageEstimate struct {
	Source string `json:"source"`
	store.Estimate
	Overlay int64 `json:"overlay"`
}

type leftOutImage struct {
	Source string `json:"source"`
	Why    string `json:"why"`
}

func (e *env) estimate(c *cli.Context) error {
	names := c.Args().Slice()
	if c.Bool("all") {
		found, err := source.ContainerdImages(c.Context, c.String("address"), c.String("namespace"))
		if err != nil {
			return err
		}
		for _, name := range found {
			names = append(names, "containerd:"+name)
		}
	}
	if len(names) == 0 {
		return wrongUse(c, "no SOURCE and no --all, or no images")
	}
	unpacked := unpackedLayers{seen: map[digest.Digest]bool{}}
	defer unpacked.close()
	est := store.NewEstimator(layer.Limits{})
	out := estimation{Images: []imageEstimate{}, LeftOut: []leftOutImage{}}
	for i, name := range names {
		one, err := e.estimateOne(c, est, &unpacked, name)
		if err != nil && i < c.NArg() {
			return err
		}
		if err != nil {
			if c.Context.Err() != nil {
				return err
			}
			out.LeftOut = append(out.LeftOut, leftOutImage{name, err.Error()})
			fmt.Fprintf(e.stderr, "daxfs: left out: %s\n", message(err))
			continue
		}
		out.Images = append(out.Images, one)
		out.Contents += one.Contents
		out.Metadata += one.Metadata
		out.Unpacked += one.Unpacked
		out.Layers += one.Layers
		out.Overlay += one.Overlay
	}
	out.Takes = out.Contents + out.Metadata
	out.Saved = out.Overlay - out.Takes
	if c.Bool("json") {
		return writeJSON(e.stdout, out)
	}
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "TAKES\tNEW LAYERS\tUNPACKED\tIMAGE")
	for _, m := range out.Images {
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\n", human(m.Contents+m.Metadata), m.Layers, human(m.Overlay),
			printable(m.Source))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(e.stdout, "%d images take %s in a pool, and %s unpacked: %s saved\n",
		len(out.Images), human(out.Takes), human(out.Overlay), human(out.Saved))
	return err
}

func (e *env) estimateOne(c *cli.Context, est *store.Estimator, unpacked *unpackedLayers,
	name string,
) (imageEstimate, error) {
	out := imageEstimate{Source: name}
	notify := func(line string) { fmt.Fprintln(e.stderr, message(errors.New(line))) }
	src, platform, err := e.parseSource(c, name, 0, notify)
	if err != nil {
		return out, err
	}
	defer src.Close()
	img, err := src.Image(c.Context, platform)
	if err != nil {
		return out, err
	}
	if out.Estimate, err = est.Add(c.Context, img); err != nil {
		return out, fmt.Errorf("%s: %w", src, err)
	}
	out.Overlay = out.Unpacked
	if strings.HasPrefix(name, "containerd:") {
		known, ok, err := unpacked.usage(c, img)
		if err != nil {
			return out, fmt.Errorf("%s: %w", src, err)
		}
		if ok {
			out.Overlay = known
		}
	}
	return out, nil
}

// unpackedLayers asks containerd for the space of layers' snapshots.
type unpackedLayers struct {
	client snapshots.SnapshotsClient
	closer func() error
	seen   map[digest.Digest]bool // counted chains
}

func (u *unpackedLayers) close() {
	if u.closer != nil {
		u.closer()
	}
}

// usage returns the space of an image's snapshots that were not counted before. ok is false if the
// image is not unpacked for the snapshotter.
func (u *unpackedLayers) usage(c *cli.Context, img *source.Image) (n int64, ok bool, err error) {
	if u.client == nil {
		conn, err := dialUnix(strings.TrimPrefix(c.String("address"), "unix://"))
		if err != nil {
			return 0, false, err
		}
		u.client, u.closer = snapshots.NewSnapshotsClient(conn), conn.Close
	}
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(c.Context, c.String("namespace")), doctorTimeout)
	defer cancel()
	var chain []digest.Digest
	fresh := map[digest.Digest]bool{}
	for _, l := range img.Layers {
		chain = append(chain, l.DiffID)
		id := identity.ChainID(chain)
		if u.seen[id] {
			continue
		}
		resp, err := u.client.Usage(ctx,
			&snapshots.UsageRequest{Snapshotter: c.String("snapshotter"), Key: id.String()})
		if grpcstatus.Code(err) == codes.NotFound || grpcstatus.Code(err) == codes.InvalidArgument {
			return 0, false, nil
		}
		if err != nil {
			return 0, false, err
		}
		fresh[id] = true
		n += resp.Size
	}
	for id := range fresh {
		u.seen[id] = true
	}
	return n, true, nil
}
