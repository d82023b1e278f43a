package main

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
)

func init() { register(75, attachCommand) }

func attachCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "attach",
		Usage:     "make OCI images of shared pools known to containerd",
		ArgsUsage: "[NAME]...",
		Description: `
The daemon writes the manifest, configuration and name of an OCI image to the containerd of this
machine, and claims its layers in the pool of another owner (shared.pools in its configuration). It
asks no registry and copies no layer. Without NAME and --all the command lists the available images.

Examples:
   daxfs attach
   daxfs attach --all
   daxfs attach --namespace k8s.io docker.io/library/nginx:latest`,
		Flags:  append([]cli.Flag{&cli.BoolFlag{Name: "all", Usage: "attach all images"}}, attachFlags()...),
		Action: e.attach,
	}
}

func init() { register(76, detachCommand) }

func detachCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "detach",
		Usage:     "remove attached OCI images from containerd",
		ArgsUsage: "[NAME]...",
		Description: `
Running containers are not disturbed. Their images stay claimed in the pool until they are gone. The
daemon does not attach a detached image again by itself, unless its name then stands for another
image.

Example:
   daxfs detach docker.io/library/nginx:latest`,
		Flags: append([]cli.Flag{&cli.BoolFlag{Name: "all", Usage: "detach all images that were attached"}},
			attachFlags()...),
		Action: e.detach,
	}
}

func attachFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "namespace", Aliases: []string{"n"}, Value: "default", Usage: "containerd `NAMESPACE`"},
		&cli.StringFlag{Name: "control", Value: defaultControl, Usage: "ask the daemon at `SOCKET`"},
		&cli.BoolFlag{Name: "json", Usage: "print JSON"},
	}
}

func (e *env) attach(c *cli.Context) error {
	if !c.Args().Present() && !c.Bool("all") {
		return e.listShared(c)
	}
	return e.askAttach(c, http.MethodPost, "attached")
}

func (e *env) detach(c *cli.Context) error { return e.askAttach(c, http.MethodDelete, "detached") }

func (e *env) askAttach(c *cli.Context, method, did string) error {
	req := api.AttachRequest{Namespace: c.String("namespace"), Names: c.Args().Slice(), All: c.Bool("all")}
	if req.All == (len(req.Names) > 0) {
		return wrongUse(c, "%d names, with --all %v, expected either", len(req.Names), req.All)
	}
	var list []api.Attached
	if err := dialControl(c.String("control")).ask(c.Context, method, "attach", req, &list); err != nil {
		return err
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, list)
	}
	for _, a := range list {
		fmt.Fprintf(e.stdout, "%s %s %s\n", did, printable(a.Name), printable(a.Target.String()))
	}
	return nil
}

func (e *env) listShared(c *cli.Context) error {
	s, err := dialControl(c.String("control")).shared(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, s)
	}
	w := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "POOL\tGENERATION\tIMAGES\tCLAIMED\tMOUNTED\tDRIVER\tLEASE")
	for _, p := range s.Pools {
		lease := "none"
		if p.Leased {
			lease = "held"
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%s\t%s\n", printable(p.Name), p.Generation, p.Images, p.Claimed, p.Mounted,
			cmp.Or(p.Driver, "-"), lease)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, p := range s.Pools {
		if p.Error != "" {
			fmt.Fprintf(e.stderr, "daxfs: pool %s: %s\n", printable(p.Name), printable(p.Error))
		}
		if p.Lost != "" {
			fmt.Fprintf(e.stderr, "daxfs: pool %s: %s\n", printable(p.Name), printable(p.Lost))
		}
	}
	if len(s.Images) > 0 {
		fmt.Fprintln(w, "\nNAME\tOWNER'S NAMESPACE\tDIGEST\tPOOL")
	}
	for _, i := range s.Images {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", printable(i.Name), printable(i.Namespace), printable(i.Target.String()),
			printable(i.Pool))
	}
	return w.Flush()
}

func (d *daemonKeeper) shared(ctx context.Context) (s api.SharedAnswer, err error) {
	return s, d.ask(ctx, http.MethodGet, "shared", nil, &s)
}
