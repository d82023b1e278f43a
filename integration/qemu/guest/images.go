//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// device is the shared memory as a block device.
const device = "/dev/pmem0"

// list mounts images with DAX and lists their trees.
func (g *guest) list() error {
	dirs, err := g.mountImages(erofs.DAX{}, g.Images)
	if err != nil {
		return err
	}
	if err := g.listTrees(dirs, listing.Options{}); err != nil {
		return err
	}
	if g.Pause {
		return pause()
	}
	return nil
}

func (g *guest) listTrees(dirs []string, o listing.Options) error {
	for _, d := range dirs {
		tree, err := listing.Tree(d, o)
		if err != nil {
			return err
		}
		g.answer.Trees = append(g.answer.Trees, tree)
	}
	return nil
}

// shared is the pool of another kernel, opened here.
type shared struct {
	region region.Region
	table  *mount.Table
}

// open opens the shared memory, like a node that maps another one's pool.
func (g *guest) open() (region.Region, error) {
	config := region.Config{Kind: region.KindPhys, Phys: g.Phys, Size: g.Size, ReadOnly: true}
	if g.Phys == 0 {
		if err := awaitDevice(); err != nil {
			return nil, err
		}
		config = region.Config{Kind: region.KindPmem, Path: device, ReadOnly: true}
	}
	r, err := region.Open(config)
	if err != nil {
		return nil, fmt.Errorf("open the shared memory: %w", err)
	}
	g.later("close the shared memory", r.Close)
	return r, nil
}

// openPool opens the pool, for mounts with a driver.
func (g *guest) openPool(driver mount.Driver) (*shared, error) {
	r, err := g.open()
	if err != nil {
		return nil, err
	}
	c, err := pool.ReadCatalogue(r)
	if err != nil {
		return nil, fmt.Errorf("read the catalogue: %w", err)
	}
	ctx := context.Background()
	table, err := mount.Open(ctx, "/run/"+driver.Name(), []mount.Driver{driver},
		mount.Pool{Region: r.Info(), Size: c.Size, UUID: c.Geometry.UUID},
		mount.Options{Warn: func(format string, args ...any) { fmt.Printf("guest: "+format+"\n", args...) }})
	if err != nil {
		return nil, err
	}
	g.later("unmount the pool", func() error { return table.UnmountPool(ctx) })
	g.later("unmount the images", func() error {
		for _, m := range table.List() {
			if err := table.Unmount(ctx, m.Key); err != nil {
				return err
			}
		}
		return nil
	})
	return &shared{region: r, table: table}, nil
}

func (s *shared) mount(key string) (mount.Mounted, error) {
	c, err := pool.ReadCatalogue(s.region)
	if err != nil {
		return mount.Mounted{}, fmt.Errorf("read the catalogue: %w", err)
	}
	for _, m := range c.Images {
		if m.Key == key {
			return s.table.Mount(context.Background(), mount.Image{
				Key: m.Key, Name: m.Name(), Nid: c.Geometry.SlotNid(m.Slot), Window: m.Window, WindowSize: m.WindowSize,
				UUID: m.UUID, Created: m.Created,
			})
		}
	}
	return mount.Mounted{}, fmt.Errorf("image %q is not in the catalogue of %d images", key, len(c.Images))
}

// mountImages mounts images of the pool, or the single image in the memory, and returns the directories.
func (g *guest) mountImages(driver mount.Driver, keys []string) ([]string, error) {
	if len(keys) == 0 {
		r, err := g.open()
		if err != nil {
			return nil, err
		}
		dir := "/run/" + driver.Name()
		return []string{dir},
			g.mountSource(driver, mount.Source{Key: "image", Region: r.Info(), Size: g.ImageSize}, dir)
	}
	s, err := g.openPool(driver)
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, key := range keys {
		dir, err := g.mountImage(s, key)
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, dir)
	}
	return dirs, nil
}

func (g *guest) mountImage(s *shared, key string) (dir string, err error) {
	m, err := s.mount(key)
	if err != nil {
		return "", err
	}
	return m.Dir, g.addOptions(m.Dir)
}

// mountSource mounts an image that is in no pool.
func (g *guest) mountSource(driver mount.Driver, src mount.Source, dir string) error {
	ctx := context.Background()
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := driver.Probe(ctx, src.Region); err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	if err := mount.CheckImage(ctx, src); err != nil {
		return err
	}
	if err := driver.Mount(ctx, src, dir); err != nil {
		return fmt.Errorf("mount %q: %w", src.Key, err)
	}
	g.later("unmount the image", func() error { return driver.Unmount(ctx, dir) })
	if err := driver.Match(ctx, src, dir); err != nil {
		return fmt.Errorf("find the mount of %q again: %w", src.Key, err)
	}
	return g.addOptions(dir)
}

// awaitDevice waits until the driver has found the memory, some time after it was loaded.
func awaitDevice() error {
	for range 600 {
		// The device node appears a moment before the device can be opened.
		if f, err := os.Open(device); err == nil {
			return f.Close()
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("no %q after a minute", device)
}

// addOptions adds the line of a mount in /proc/mounts without its device.
func (g *guest) addOptions(dir string) error {
	b, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return err
	}
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 3 && f[1] == dir {
			g.answer.Options = append(g.answer.Options, f[2]+" "+f[3])
			return nil
		}
	}
	return fmt.Errorf("%q is not mounted", dir)
}

// overlay mounts a writable layer over an image, like containerd, and returns the container's root.
func (g *guest) overlay(lower string) (string, error) {
	base, err := os.MkdirTemp("/tmp", "overlay-")
	if err != nil {
		return "", err
	}
	for _, d := range []string{"/upper", "/work", "/root"} {
		if err := os.Mkdir(base+d, 0o755); err != nil {
			return "", err
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work,index=off,xino=auto", lower, base, base)
	if err := unix.Mount("overlay", base+"/root", "overlay", 0, options); err != nil {
		return "", fmt.Errorf("overlay over %q: %w", lower, err)
	}
	g.later("unmount an overlay", func() error { return unix.Unmount(base+"/root", 0) })
	return base + "/root", nil
}
