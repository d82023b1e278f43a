package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/urfave/cli/v2"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// withKeeper calls f with the owner of the pool that a command names.
func (e *env) withKeeper(c *cli.Context, f func(k keeper) error) error {
	k, err := e.openKeeper(c, poolArgsOf(c), "")
	if err != nil {
		return err
	}
	err = f(k)
	return errors.Join(err, k.Close())
}

func (e *env) poolPut(c *cli.Context) error {
	if err := needArgs(c, "POOL", "SOURCE"); err != nil {
		return err
	}
	name := c.Args().Get(1)
	notify := func(line string) { fmt.Fprintln(e.stderr, message(errors.New(line))) }
	src, platform, err := e.parseSource(c, name, 0, notify)
	if err != nil {
		return err
	}
	defer src.Close()
	return e.withKeeper(c, func(k keeper) error {
		img, err := src.Image(c.Context, platform)
		if err != nil {
			return err
		}
		pin, err := pinName(c, img)
		if err != nil {
			return err
		}
		before, err := k.Usage(c.Context)
		if err != nil {
			return err
		}
		from := putSource{
			image: img, name: name, platform: c.String("platform"), namespace: c.String("namespace"),
			plainHTTP: c.Bool("plain-http"), overlayUpper: c.Bool("overlay-upper"),
		}
		if c.IsSet("hosts-dir") { // otherwise the daemon's default applies
			from.hostDirs = c.StringSlice("hosts-dir")
		}
		info, err := k.Put(c.Context, from, pin)
		if err != nil {
			return err
		}
		after, err := k.Usage(c.Context)
		if err != nil {
			return err
		}
		return e.showPut(c, info, pin, after.Extents-before.Extents)
	})
}

// pinName returns the name under which an image is put.
func pinName(c *cli.Context, img *source.Image) (string, error) {
	switch {
	case c.String("name") != "":
		return c.String("name"), nil
	case img.Name != "":
		return img.Name, nil
	case img.Tree != nil:
		return "", wrongUse(c, "a tree has no name of its own: --name is needed")
	}
	var keys []string
	for _, l := range img.Layers {
		keys = append(keys, store.BlobKey(l.DiffID))
	}
	return store.ImageKey(keys), nil
}

// showPut reports the new image. It reads its size from the pool, as any reader can.
func (e *env) showPut(c *cli.Context, info store.Info, pin string, added int64) error {
	r, cat, err := poolArgsOf(c).open()
	if err != nil {
		return err
	}
	defer r.Close()
	shared, err := pool.ReadShared(r, cat)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(cat.Images, func(m pool.Image) bool { return m.Key == info.Key })
	if i < 0 {
		return fmt.Errorf("image %q: %w", info.Key, pool.ErrNotFound)
	}
	m := cat.Images[i]
	u := shared.Images[m.Key]
	if c.Bool("json") {
		return writeJSON(e.stdout, poolImage{m, uuid(m.UUID), info.Names, info.Holders, info.Brought, &u})
	}
	_, err = fmt.Fprintf(e.stdout, "%s: %s in %d distinct files, %s of them new\n",
		printable(pin), human(u.Extents), u.Files, human(added))
	return err
}

func (e *env) poolRemove(c *cli.Context) error {
	if c.NArg() < 2 {
		return wrongUse(c, "%d arguments, expected POOL IMAGE...", c.NArg())
	}
	return e.withKeeper(c, func(k keeper) error {
		images, err := k.Images(c.Context)
		if err != nil {
			return err
		}
		// Remove all or none: a misspelt name must not remove anything.
		pins := map[string]bool{}
		for _, name := range c.Args().Slice()[1:] {
			of, err := pinsOf(images, name)
			if err != nil {
				return err
			}
			for _, pin := range of {
				pins[pin] = true
			}
		}
		return e.freeing(c, k, func(ctx context.Context) error {
			for pin := range pins {
				if err := k.Unpin(ctx, pin); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// pinsOf returns the pins to remove for a name: the pin of that name, or all pins of the image with that name.
func pinsOf(images []store.Info, name string) ([]string, error) {
	info, err := store.Match(images, name)
	if err != nil {
		return nil, err
	}
	var pins, others []string
	for _, h := range info.Holders {
		if pin, ok := strings.CutPrefix(h, pinPrefix); ok {
			pins = append(pins, pin)
		} else {
			others = append(others, h)
		}
	}
	for _, h := range others {
		dir, ok := strings.CutPrefix(h, "mount/")
		if !ok {
			continue
		}
		// Somebody may have unmounted it without asking. The next sweep finds out.
		if mounted, err := mountinfo.Mounted(dir); err != nil || mounted {
			return nil, fmt.Errorf("image %q is mounted on %q: %w; unmount it first", name, dir, pool.ErrBusy)
		}
	}
	if len(pins) == 0 && len(others) > 0 {
		return nil, fmt.Errorf("image %q: nobody has put it there by hand, it is held by %s: %w",
			name, strings.Join(others, ", "), pool.ErrBusy)
	}
	if slices.Contains(pins, name) {
		return []string{name}, nil
	}
	return pins, nil
}

func (e *env) poolCollect(c *cli.Context) error {
	if err := needArgs(c, "POOL"); err != nil {
		return err
	}
	return e.withKeeper(c, func(k keeper) error {
		return e.freeing(c, k, func(context.Context) error { return nil })
	})
}

func (e *env) poolPin(c *cli.Context) error {
	if err := needArgs(c, "POOL", "IMAGE", "[NAME]"); err != nil {
		return err
	}
	return e.withKeeper(c, func(k keeper) error {
		images, err := k.Images(c.Context)
		if err != nil {
			return err
		}
		info, err := store.Match(images, c.Args().Get(1))
		if err != nil {
			return err
		}
		name := c.Args().Get(2)
		if name == "" && len(info.Names) > 0 {
			name = info.Names[0]
		}
		if name == "" {
			return wrongUse(c, "image %q has no name of its own: a NAME is needed", c.Args().Get(1))
		}
		if info, err = k.Pin(c.Context, info.Key, name); err != nil {
			return err
		}
		if c.Bool("json") {
			return writeJSON(e.stdout, info)
		}
		_, err = fmt.Fprintf(e.stdout, "%s is pinned as %s\n", shortKey(info.Key), printable(name))
		return err
	})
}

func (e *env) poolUnpin(c *cli.Context) error {
	if err := needArgs(c, "POOL", "NAME"); err != nil {
		return err
	}
	return e.withKeeper(c, func(k keeper) error {
		name := c.Args().Get(1)
		if err := k.Unpin(c.Context, name); err != nil {
			return err
		}
		if c.Bool("json") {
			return writeJSON(e.stdout, struct {
				Unpinned string `json:"unpinned"`
			}{name})
		}
		_, err := fmt.Fprintf(e.stdout, "%s is no longer pinned\n", printable(name))
		return err
	})
}

// poolReleased is the output of pool release --json.
type poolReleased struct {
	Claims int `json:"claims"` // the number of ended claims
}

func (e *env) poolRelease(c *cli.Context) error {
	if err := needArgs(c, "POOL", "READER"); err != nil {
		return err
	}
	return e.withKeeper(c, func(k keeper) error {
		n, err := k.Release(c.Context, c.Args().Get(1), c.Bool("earlier"))
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return writeJSON(e.stdout, poolReleased{n})
		}
		_, err = fmt.Fprintf(e.stdout, "ended %d claims of %s\n", n, printable(c.Args().Get(1)))
		return err
	})
}

// poolFreed is the output of pool rm --json and pool gc --json.
type poolFreed struct {
	Images int        `json:"images"`
	Layers int        `json:"layers"`
	Freed  int64      `json:"freed"`
	Usage  pool.Usage `json:"usage"`
}

// freeing calls f, frees what nothing holds, and reports how much that was.
func (e *env) freeing(c *cli.Context, k keeper, f func(context.Context) error) error {
	before, err := k.Usage(c.Context)
	if err != nil {
		return err
	}
	if err := f(c.Context); err != nil {
		return err
	}
	if err := k.Sweep(c.Context); err != nil {
		return err
	}
	after, err := k.Usage(c.Context)
	if err != nil {
		return err
	}
	images, layers := before.Images-after.Images, before.Layers-after.Layers
	// A new epoch frees space that appears only in this sum.
	taken := func(u pool.Usage) int64 { return u.Extents + u.Dead + u.Segments + u.Tree }
	freed := max(0, taken(before)-taken(after))
	if c.Bool("json") {
		return writeJSON(e.stdout, poolFreed{images, layers, freed, after})
	}
	fmt.Fprintf(e.stdout, "removed %d images and %d layers, %s are free again", images, layers, human(freed))
	if after.Dead > 0 {
		fmt.Fprintf(e.stdout, ", %s wait until nobody can read them", human(after.Dead))
	}
	_, err = fmt.Fprintln(e.stdout)
	return err
}
