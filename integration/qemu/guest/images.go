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
	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// device is the shared memory as a block device.
const device = "/dev/pmem0"

// list mounts the images with the driver for DAX and lists their trees.
func list(t task.Task, answer *task.Answer) error {
	dirs, err := mountImages(t, erofs.DAX{}, answer)
	if err != nil {
		return err
	}
	if err := listTrees(dirs, listing.Options{}, answer); err != nil {
		return err
	}
	if t.Pause {
		return pause()
	}
	return nil
}

func listTrees(dirs []string, o listing.Options, answer *task.Answer) error {
	for _, d := range dirs {
		tree, err := listing.Tree(d, o)
		if err != nil {
			return err
		}
		answer.Trees = append(answer.Trees, tree)
	}
	return nil
}

// mountImages mounts the images that the task names, as a node does that shares the pool of another, and returns the
// directories.
func mountImages(t task.Task, driver mount.Driver, answer *task.Answer) ([]string, error) {
	ctx := context.Background()
	sources, err := sources(t)
	if err != nil {
		return nil, err
	}
	var dirs []string
	for i, src := range sources {
		dir := fmt.Sprintf("/run/%s%d", driver.Name(), i)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
		if err := driver.Probe(ctx, src.Region); err != nil {
			return nil, fmt.Errorf("probe: %w", err)
		}
		if err := mount.CheckImage(ctx, src); err != nil {
			return nil, err
		}
		if err := driver.Mount(ctx, src, dir); err != nil {
			return nil, fmt.Errorf("mount %q: %w", src.Key, err)
		}
		if err := driver.Match(ctx, src, dir); err != nil {
			return nil, fmt.Errorf("find the mount of %q again: %w", src.Key, err)
		}
		options, err := mountOptions(dir)
		if err != nil {
			return nil, err
		}
		answer.Options = append(answer.Options, options)
		dirs = append(dirs, dir)
	}
	return dirs, nil
}

// awaitDevice waits for the driver, which finds the memory some time after it was loaded.
func awaitDevice() error {
	for range 600 {
		if _, err := os.Stat(device); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("no %q after a minute", device)
}

// sources finds the windows of the images in the catalogue of the pool, or makes one of the image that is all there is.
func sources(t task.Task) ([]mount.Source, error) {
	config := region.Config{Kind: region.KindPhys, Phys: t.Phys, Size: t.Size, ReadOnly: true}
	if t.Phys == 0 {
		if err := awaitDevice(); err != nil {
			return nil, err
		}
		config = region.Config{Kind: region.KindPmem, Path: device, ReadOnly: true}
	}
	r, err := region.Open(config)
	if err != nil {
		return nil, fmt.Errorf("open the shared memory: %w", err)
	}
	defer r.Close()
	if len(t.Images) == 0 {
		return []mount.Source{{Key: "image", Region: r.Info(), Size: t.ImageSize}}, nil
	}
	catalogue, err := pool.ReadCatalogue(r)
	if err != nil {
		return nil, fmt.Errorf("read the catalogue: %w", err)
	}
	var list []mount.Source
	for _, key := range t.Images {
		found := false
		for _, m := range catalogue.Images {
			if m.Key == key {
				list = append(list, mount.Source{Key: key, Region: r.Info(), Off: m.Off, Size: m.Size})
				found = true
			}
		}
		if !found {
			return nil, fmt.Errorf("image %q is not in the catalogue of %d images", key, len(catalogue.Images))
		}
	}
	return list, nil
}

// mountOptions returns the line of a mount in /proc/mounts without its device.
func mountOptions(dir string) (string, error) {
	b, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return "", err
	}
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 3 && f[1] == dir {
			return f[2] + " " + f[3], nil
		}
	}
	return "", fmt.Errorf("%q is not mounted", dir)
}

// overlay puts a writable layer over an image, as containerd would, and returns the container's root.
func overlay(lower string) (string, error) {
	base, err := os.MkdirTemp("/tmp", "overlay-")
	if err != nil {
		return "", err
	}
	for _, d := range []string{"/upper", "/work", "/root"} {
		if err := os.Mkdir(base+d, 0o755); err != nil {
			return "", err
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work,index=off", lower, base, base)
	if err := unix.Mount("overlay", base+"/root", "overlay", 0, options); err != nil {
		return "", fmt.Errorf("overlay over %q: %w", lower, err)
	}
	return base + "/root", nil
}
