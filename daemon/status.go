package daemon

import (
	"context"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/internal/version"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
)

func (d *Daemon) status(ctx context.Context) (api.Status, error) {
	room, err := d.store.Room()
	if err != nil {
		return api.Status{}, err
	}
	list, err := d.containers(ctx)
	if err != nil {
		return api.Status{}, err
	}
	info, p := d.store.Region(), d.poolAnswer()
	s := api.Status{
		Version: version.String(), PID: os.Getpid(), Started: d.started.UTC(), Root: d.cfg.Root, Address: d.cfg.Address,
		Containerd: d.cfg.Containerd.Address, Memory: ownMemory(), Pool: p, Taken: taken(info), Room: room,
		Free: room.Free(), Saved: p.Usage.Unshared - p.Usage.ImageExtents, Drivers: mount.Explain(ctx, d.drivers, info),
		Mounted: len(d.store.Mounted()), Containers: len(list), Damaged: d.store.Pool().DamagedCount(),
		Fallbacks: map[string]int64{}, Evictions: map[string]int64{}, Failures: map[string]int64{},
	}
	for _, c := range list {
		if !c.Shared {
			s.Unshared++
		}
	}
	s.Readers, s.Shared = d.readers(), d.sharedStatus()
	if err := d.Healthy(ctx); err != nil {
		s.Health = err.Error()
	}
	counts := map[string]map[string]int64{
		"daxfs_fallbacks_total": s.Fallbacks, "daxfs_evictions_total": s.Evictions,
		"daxfs_phase_failures_total": s.Failures,
	}
	families, err := d.metrics.registry.Gather()
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if into := counts[f.GetName()]; into != nil && len(m.GetLabel()) == 1 {
				into[m.GetLabel()[0].GetValue()] = int64(m.GetCounter().GetValue())
			}
		}
	}
	return s, err
}

// readers returns the readers of the daemon's pool.
func (d *Daemon) readers() api.Readers {
	list, err := d.store.LeaseUsers()
	r := api.Readers{Mode: d.store.ReadersMode(), List: list}
	if err != nil {
		r.Error = err.Error()
	}
	return r
}

// ownMemory returns the resident memory of this process, in bytes; 0 without /proc.
func ownMemory() int64 {
	raw, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(raw))
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.ParseInt(fields[1], 10, 64)
	return pages * int64(os.Getpagesize())
}

// taken returns what a pool takes of the disk or memory below it, in bytes; -1 if that is the pool's own.
func taken(info region.Info) int64 {
	var st unix.Stat_t
	if !info.Sparse || unix.Stat(info.Path, &st) != nil {
		return -1
	}
	return st.Blocks * 512
}

// images lists the images with their size and users.
func (d *Daemon) images(ctx context.Context) ([]api.Image, error) {
	list, err := d.containers(ctx)
	if err != nil {
		return nil, err
	}
	on := map[string][]string{}
	for _, c := range list {
		if !c.Copy {
			on[c.Image] = append(on[c.Image], c.Namespace+"/"+c.Name)
		}
	}
	mounted := map[string]mount.Mounted{}
	for _, m := range d.store.Mounted() {
		mounted[m.Key] = m
	}
	images := []api.Image{}
	readers := d.readers()
	for _, info := range d.store.Images() {
		info.Holders = slices.Clone(info.Holders)
		for _, u := range readers.List {
			if slices.Contains(u.Images, info.Key) || slices.Contains(u.Earlier, info.Key) {
				info.Holders = append(info.Holders, u.Holder())
			}
		}
		u, err := d.store.Pool().ImageUsage(info.Key)
		if err != nil {
			continue // removed meanwhile
		}
		users := append([]string{}, on[store.CanonicalKey(info.Key)]...)
		slices.Sort(users)
		m := mounted[info.Key]
		images = append(images, api.Image{Info: info, Usage: u, Driver: m.Driver, Dir: m.Dir, Containers: users})
	}
	return images, nil
}

// containers lists the snapshots that can be mounted, with their lowers.
func (d *Daemon) containers(ctx context.Context) ([]api.Container, error) {
	standing, err := d.sn.Standing(ctx)
	if err != nil {
		return nil, err
	}
	names, drivers := map[string][]string{}, map[string]string{}
	for _, info := range d.store.Images() {
		names[store.CanonicalKey(info.Key)] = info.Names
	}
	for _, m := range d.store.Mounted() {
		drivers[store.CanonicalKey(m.Key)] = m.Driver
	}
	list := []api.Container{}
	for _, s := range standing {
		c := api.Container{
			Namespace: s.Namespace, Name: s.Name, View: s.View, Since: s.Since.UTC(), Shared: s.Image != "" &&
				s.Dirs == 0 && !s.Plain,
			Image: s.Image, Names: names[s.Image], Directories: s.Dirs, Copy: s.Plain, Why: s.Why,
		}
		if !s.Plain {
			c.Driver = drivers[s.Image]
		}
		if !c.Shared && c.Why == "" {
			c.Why = "the reason was not recorded: the snapshot was made by an earlier version"
		}
		list = append(list, c)
	}
	return list, nil
}
