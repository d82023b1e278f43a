//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu/task"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// kept is the number of images mounted at a time.
const kept = 6

// churn makes the host add an image Rounds times and remove surplus ones. Meanwhile the mounted images
// are verified repeatedly, the kernel has to drop its caches, and another goroutine reads the device.
// All goroutines leave the emulated processors time for the others.
func (g *guest) churn() error {
	s, err := g.openPool(erofs.DAX{})
	if err != nil {
		return err
	}
	c := &churn{g: g, s: s}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var work sync.WaitGroup
	for i := range 2 {
		work.Go(func() { c.verifyAll(ctx, i) })
	}
	work.Go(func() { c.note(pressure(ctx)) })
	work.Go(func() { c.note(readDevice(ctx)) })
	for i := range g.Rounds {
		if err := c.round(ctx, i); err != nil {
			c.note(fmt.Errorf("round %d: %w", i, err))
		}
		if c.failed.Load() {
			break
		}
	}
	stop()
	work.Wait()
	g.answer.Verified = c.verified.Load()
	return errors.Join(c.errs...)
}

// churn is the shared state of the goroutines of that task.
type churn struct {
	hostLine
	g        *guest
	s        *shared
	verified atomic.Int64
	failed   atomic.Bool

	mu     sync.Mutex
	images []*used
	errs   []error
}

// used is a mounted image. It is read-locked while it is verified.
type used struct {
	mount.Mounted
	sync.RWMutex
	removed bool
}

func (c *churn) note(err error) {
	if err == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.errs = append(c.errs, err)
	c.failed.Store(true)
}

// round adds an image, mounts it, and removes the oldest.
func (c *churn) round(ctx context.Context, i int) error {
	reply, err := c.ask(task.Request{Op: task.OpAdd, Image: i})
	if err != nil {
		return err
	}
	m, err := c.s.mount(reply.Key)
	if err != nil {
		return err
	}
	n, err := verify(m.Dir, m.Key)
	if err != nil {
		return fmt.Errorf("image %q, just added: %w", m.Key, err)
	}
	c.verified.Add(n)
	c.mu.Lock()
	c.images = append(c.images, &used{Mounted: m})
	var old *used
	if len(c.images) > kept {
		old, c.images = c.images[0], c.images[1:]
	}
	c.mu.Unlock()
	if old == nil {
		return nil
	}
	old.Lock()
	old.removed = true
	old.Unlock()
	return c.remove(ctx, old.Key)
}

// remove removes an unused image and frees its space, as far as this kernel has forgotten the files.
func (c *churn) remove(ctx context.Context, key string) error {
	if err := c.s.table.Unmount(ctx, key); err != nil {
		return err
	}
	reply, err := c.ask(task.Request{Op: task.OpRemove, Key: key})
	if err != nil {
		return err
	}
	dead := reply.Dead
	extents := make([]mount.Extent, len(dead))
	for i, d := range dead {
		extents[i].Nids = d.Nids
	}
	unused, err := c.s.table.Unused(ctx, extents, func() error {
		reply, err := c.ask(task.Request{Op: task.OpErase, Dead: dead})
		if err == nil && len(reply.Dead) != len(dead) {
			err = fmt.Errorf("%d of %d dead extents were erased", len(reply.Dead), len(dead))
		}
		return err
	})
	if err != nil {
		return err
	}
	var free []pool.Dead
	for i, d := range dead {
		if unused[i] {
			free = append(free, d)
		}
	}
	_, err = c.ask(task.Request{Op: task.OpFree, Dead: free})
	return err
}

// hostLine sends requests to the host. It is not safe for concurrent use.
type hostLine struct{ asked int }

func (c *hostLine) ask(q task.Request) (reply task.Reply, err error) {
	c.asked++
	b, err := json.Marshal(q)
	if err != nil {
		return reply, err
	}
	name := fmt.Sprintf("%s%d", host+task.RequestFile, c.asked)
	if err := errors.Join(os.WriteFile(name+".new", b, 0o644), os.Rename(name+".new", name)); err != nil {
		return reply, err
	}
	name = fmt.Sprintf("%s%d", host+task.ReplyFile, c.asked)
	for range 60_000 {
		b, err = os.ReadFile(name)
		if err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		return reply, fmt.Errorf("no reply of the host: %w", err)
	}
	if err := json.Unmarshal(b, &reply); err != nil {
		return reply, err
	}
	if reply.Error != "" {
		return reply, fmt.Errorf("the host: %s: %s", q.Op, reply.Error)
	}
	return reply, nil
}

// verifyAll verifies images until ctx ends.
func (c *churn) verifyAll(ctx context.Context, seed int) {
	for i := seed; ctx.Err() == nil && !c.failed.Load(); i++ {
		time.Sleep(100 * time.Millisecond)
		c.mu.Lock()
		var u *used
		if len(c.images) > 0 {
			u = c.images[i%len(c.images)]
		}
		c.mu.Unlock()
		if u == nil || !u.TryRLock() {
			continue
		}
		if !u.removed {
			n, err := verify(u.Dir, u.Key)
			if err != nil {
				c.note(fmt.Errorf("image %q: %w", u.Key, err))
			}
			c.verified.Add(n)
		}
		u.RUnlock()
	}
}

// verify compares an image with its key, and returns the number of its files.
func verify(dir, key string) (int64, error) {
	var names []string
	for _, way := range task.Ways {
		list, err := os.ReadDir(filepath.Join(dir, way))
		if err != nil {
			return 0, err
		}
		for _, e := range list {
			name := filepath.Join(way, e.Name())
			b, err := contents(filepath.Join(dir, name), way)
			if err != nil {
				return 0, err
			}
			if want := task.NameOf(way, b); want != name {
				return 0, fmt.Errorf("WRONG BYTES: %q has %d bytes with the digest of %q", name, len(b), want)
			}
			names = append(names, name)
		}
	}
	if got := task.KeyOf(names); got != key {
		return 0, fmt.Errorf("its %d files are those of image %q", len(names), got)
	}
	return int64(len(names)), nil
}

// contents returns a copy of a file.
func contents(path, way string) ([]byte, error) {
	if way == task.Read {
		return os.ReadFile(path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	b := append([]byte(nil), m...)
	return b, unix.Munmap(m)
}

// pressure makes the kernel drop its caches: inodes, directory entries and pages of devices.
func pressure(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			return err
		}
		time.Sleep(500 * time.Millisecond)
	}
	return nil
}

// readDevice reads the device like blkid and udev, so that its page cache holds data from before an image was added.
func readDevice(ctx context.Context) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	for ctx.Err() == nil {
		if _, err := io.Copy(io.Discard, io.NewSectionReader(f, 0, 2<<20)); err != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return nil
}
