package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
)

func init() {
	register(50, statusCommand)
	register(51, imagesCommand)
	register(52, explainCommand)
}

// poolFlags select a pool for commands without a POOL argument.
func poolFlags() []cli.Flag {
	return append([]cli.Flag{
		&cli.StringFlag{
			Name: "pool", Usage: "look at the pool `POOL`, as for daxfs pool",
			DefaultText: "that of the daemon",
		},
		&cli.StringFlag{Name: "kind", Usage: "the pool is a `KIND` of region"},
		&cli.StringFlag{Name: "index", Usage: "the owner's index is `FILE`"},
		&cli.BoolFlag{Name: "json", Usage: "write JSON; sizes are bytes"},
	}, keeperFlags()...)
}

// poolMeant returns the pool that the poolFlags select: the named one, else the daemon's, else the one
// that the daemon would use by default.
func poolMeant(c *cli.Context) (poolArgs, error) {
	a := poolArgs{Pool: c.String("pool"), Kind: c.String("kind"), Index: c.String("index")}
	if a.Pool != "" {
		return a, nil
	}
	answer, err := dialControl(c.String("control")).pool(c.Context)
	if err == nil {
		a.Pool, a.Kind = answer.Path, answer.Kind
		if answer.Kind == region.KindPhys {
			a.Pool = fmt.Sprintf("%#x+%d", answer.Region.Phys, answer.Usage.Size)
		}
		return a, nil
	}
	if file := (store.Pool{Kind: region.KindFile}).File(defaultRoot); fileExists(file) {
		a.Pool = file
		return a, nil
	}
	return a, fmt.Errorf("no daemon answers (%w); name a pool with --pool", err)
}

func statusCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "show the state of the snapshotter daemon, and what its pool holds, saves and has free",
		Description: `
Without a daemon, or with --pool, it shows the pool alone.

Examples:
   daxfs status
   daxfs status --json | jq .free`,
		Flags:  poolFlags(),
		Action: e.status,
	}
}

func (e *env) status(c *cli.Context) error {
	if err := needArgs(c); err != nil {
		return err
	}
	if c.String("pool") == "" {
		s, err := dialControl(c.String("control")).status(c.Context)
		if err == nil {
			if c.Bool("json") {
				return writeJSON(e.stdout, s)
			}
			return showStatus(e.stdout, s)
		}
		fmt.Fprintf(e.stderr, "daxfs: no daemon answers, showing the pool alone: %s\n", message(err))
	}
	a, err := poolMeant(c)
	if err != nil {
		return err
	}
	s, err := e.state(c, a)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, s)
	}
	return s.show(e.stdout)
}

func showStatus(out io.Writer, s api.Status) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(w, name+"\t"+format+"\n", args...) }
	health := "ok"
	if s.Health != "" {
		health = message(errors.New(s.Health))
	}
	u := s.Pool.Usage
	row("Daemon", "%s, process %d, since %s, %s of memory", printable(s.Version), s.PID,
		s.Started.Local().Format(time.DateTime), human(s.Memory))
	row("Health", "%s", health)
	row("Pool", "%s %s, %s", s.Pool.Kind, printable(s.Pool.Path), human(u.Size))
	row("Free", "%s", freeText(s))
	row("Taken", "%s", takenText(s))
	row("Images", "%d, %d mounted; %d layers", u.Images, s.Mounted, u.Layers)
	row("Contents", "%s in %d distinct files; %s wait until nobody can read them", human(u.Extents),
		u.ExtentCount, human(u.Dead))
	row("Saved", "%s: the images' contents would take %s apart, and take %s", human(s.Saved), human(u.Unshared),
		human(u.ImageExtents))
	row("Containers", "%d, %d of them share less than they could", s.Containers, s.Unshared)
	for _, d := range s.Drivers {
		if d.Picked {
			row("Driver", "%s: %s", d.Driver, d.Sharing)
		}
	}
	for _, d := range s.Drivers {
		if d.Picked {
			break // the drivers after it were not needed
		}
		row("", "not %s: %s", d.Driver, d.Why)
	}
	row("Fallbacks", "%s", countText(s.Fallbacks))
	row("Evictions", "%s", countText(s.Evictions))
	row("Failures", "%s", countText(s.Failures))
	if s.Damaged > 0 {
		row("Damaged", "%d contents have changed in memory; daxfs pool check --contents", s.Damaged)
	}
	readerRows(row, s.Readers)
	sharedRows(row, s.Shared)
	return w.Flush()
}

// freeText describes how much can be stored, and the limit.
func freeText(s api.Status) string {
	switch {
	case s.Room.Disk < 0:
		return human(s.Free)
	case s.Room.Disk < s.Room.Pool:
		return fmt.Sprintf("%s: the disk below the pool has no more; the pool itself has %s", human(s.Free),
			human(s.Room.Pool))
	}
	return fmt.Sprintf("%s; the disk below the pool has %s", human(s.Free), human(s.Room.Disk))
}

func takenText(s api.Status) string {
	if s.Taken < 0 {
		return "all of it"
	}
	where := "disk"
	if region.TraitsOf(s.Pool.Kind).Volatile {
		where = "memory"
	}
	return human(s.Taken) + " of " + where
}

// countText formats numbers by name.
func countText(m map[string]int64) string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(m)) {
		list = append(list, fmt.Sprintf("%s %d", printable(name), m[name]))
	}
	return strings.Join(list, ", ")
}

func imagesCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "images",
		Usage:     "list the images of the snapshotter daemon: what each takes, brought and shares, and who uses it",
		ArgsUsage: "[IMAGE]",
		Description: `
NEW is the space that the pool took when the image came; SHARED is the part that other images have
as well; HOLDERS are the namespaces of containerd, pins, mounts and readers in other kernels that
keep it. With IMAGE, only that image. Only the daemon knows containers and readers.

Examples:
   daxfs images
   daxfs images --json | jq -r '.[] | select(.containers == []) | .key'`,
		Flags:  poolFlags(),
		Action: e.images,
	}
}

func (e *env) images(c *cli.Context) error {
	if err := needArgs(c, "[IMAGE]"); err != nil {
		return err
	}
	list, err := e.imageList(c)
	if err != nil {
		return err
	}
	if name := c.Args().First(); name != "" {
		i, err := matchImage(list, name)
		if err != nil {
			return err
		}
		list = list[i : i+1]
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, list)
	}
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "IMAGE\tSIZE\tNEW\tSHARED\tCONTAINERS\tHOLDERS\tNAMES")
	for _, m := range list {
		var holders []string
		for _, h := range m.Holders {
			holders = append(holders, printable(h))
		}
		if len(holders) == 0 {
			holders = []string{"-"}
		}
		names := poolImage{Image: m.Image, Names: m.Names, Holders: m.Holders}.label()
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", shortKey(m.Key), human(m.Usage.Extents), human(m.Brought),
			human(m.Usage.Shared), len(m.Containers), strings.Join(holders, ", "), names)
	}
	return w.Flush()
}

// imageList returns the images of the selected pool, from the daemon that owns it or from the pool.
func (e *env) imageList(c *cli.Context) ([]api.Image, error) {
	if c.String("pool") == "" {
		if list, err := dialControl(c.String("control")).images(c.Context); err == nil {
			return list, nil
		}
	}
	a, err := poolMeant(c)
	if err != nil {
		return nil, err
	}
	s, err := e.state(c, a)
	if err != nil {
		return nil, err
	}
	list := []api.Image{}
	for _, m := range s.Images {
		info := store.Info{Image: m.Image, Names: m.Names, Holders: m.Holders, Layers: []string{}}
		image := api.Image{Info: info, Containers: []string{}}
		image.Brought = m.Brought
		if m.Usage != nil {
			image.Usage = *m.Usage
		}
		list = append(list, image)
	}
	return list, nil
}

// matchImage returns the index of the image that a user names.
func matchImage(list []api.Image, name string) (int, error) {
	infos := make([]store.Info, len(list))
	for i, m := range list {
		infos[i] = m.Info
	}
	found, err := store.Match(infos, name)
	if err != nil {
		return 0, err
	}
	return slices.IndexFunc(list, func(m api.Image) bool { return m.Key == found.Key }), nil
}

func explainCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "explain",
		Usage:     "show what a container stands on, since when, and why it does not share more",
		ArgsUsage: "CONTAINER",
		Description: `
CONTAINER is a container's name in containerd or its beginning, also as NAMESPACE/NAME. What a container stands on never
changes: one that was started while the pool was full keeps its plain directories until it is made anew.

Examples:
   daxfs explain hello
   daxfs explain --json k8s.io/0123456789ab`,
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "json", Usage: "write JSON"},
		}, keeperFlags()...),
		Action: e.explainContainer,
	}
}

func (e *env) explainContainer(c *cli.Context) error {
	if err := needArgs(c, "CONTAINER"); err != nil {
		return err
	}
	list, err := dialControl(c.String("control")).containers(c.Context)
	if err != nil {
		return err
	}
	found, err := matchContainer(list, c.Args().First())
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return writeJSON(e.stdout, found)
	}
	return showContainer(e.stdout, found)
}

func matchContainer(list []api.Container, name string) (api.Container, error) {
	var same, begin []api.Container
	for _, c := range list {
		full := c.Namespace + "/" + c.Name
		switch {
		case c.Name == name || full == name:
			same = append(same, c)
		case name != "" && (strings.HasPrefix(c.Name, name) || strings.HasPrefix(full, name)):
			begin = append(begin, c)
		}
	}
	if len(same) == 0 {
		same = begin
	}
	switch len(same) {
	case 1:
		return same[0], nil
	case 0:
		return api.Container{}, fmt.Errorf("container %q: %w; the daemon knows %d", name, pool.ErrNotFound, len(list))
	}
	var names []string
	for _, c := range same[:min(len(same), 5)] {
		names = append(names, c.Namespace+"/"+c.Name)
	}
	return api.Container{}, fmt.Errorf("container %q: %d have that name or begin with it, such as %q: %w",
		name, len(same), names, pool.ErrInvalid)
}

func showContainer(out io.Writer, c api.Container) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "Container\t%s/%s\nSince\t%s\n", printable(c.Namespace), printable(c.Name),
		c.Since.Local().Format(time.DateTime))
	var stands []string
	if c.Directories > 0 {
		stands = append(stands, fmt.Sprintf("%d plain directories", c.Directories))
	}
	switch {
	case c.Image != "" && c.Copy:
		stands = append(stands, "a copy of image "+shortKey(c.Image)+" in a directory")
	case c.Image != "":
		stands = append(stands, "the shared image "+shortKey(c.Image))
	}
	fmt.Fprintf(w, "Stands on\t%s\n", strings.Join(stands, " over "))
	for _, n := range c.Names {
		fmt.Fprintf(w, "Name\t%s\n", printable(n))
	}
	if c.Driver != "" {
		fmt.Fprintf(w, "Driver\t%s\n", c.Driver)
	}
	if c.Shared {
		fmt.Fprintf(w, "Shares\teverything below its own changes\n")
	} else {
		fmt.Fprintf(w, "Shares less\t%s\n", message(errors.New(c.Why)))
	}
	return w.Flush()
}
