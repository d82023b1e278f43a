package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/daemon"
	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// PoolReport describes the contents of a stopped daemon's pool.
type PoolReport struct {
	pool.Usage
	ImageKeys, LayerKeys []string
}

// PoolFile returns the default file of the daemon's pool.
func (s *Stack) PoolFile() string { return store.Pool{Kind: region.KindFile}.File(s.DaemonRoot()) }

// CheckPool opens the file pool of a stopped daemon, checks it and describes its contents.
func (s *Stack) CheckPool() (report PoolReport, err error) {
	r, err := region.Open(region.Config{Kind: region.KindFile, Path: s.PoolFile()})
	if err != nil {
		return report, fmt.Errorf("the daemon's region: %w", err)
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	indexes, err := filepath.Glob(filepath.Join(s.DaemonRoot(), "pool", "*.db"))
	if err != nil {
		return report, err
	}
	if len(indexes) != 1 {
		return report, fmt.Errorf("indexes of the daemon's pool: %q, expected one", indexes)
	}
	p, err := pool.Open(r, indexes[0], pool.Options{})
	if err != nil {
		return report, fmt.Errorf("the daemon's pool: %w", err)
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	var findings []error
	if err := p.Check(context.Background(), func(f pool.Finding) bool {
		findings = append(findings, errors.New(f.String()))
		return true
	}); err != nil {
		return report, err
	}
	report.Usage, report.LayerKeys = p.Usage(), p.Layers()
	for _, m := range p.Images() {
		report.ImageKeys = append(report.ImageKeys, m.Key)
	}
	return report, errors.Join(findings...)
}

// CollectPool makes the running daemon free unneeded space in its pool. name is a user's name of the
// pool. It returns the bytes of the remaining contents, used or not yet free.
func (s *Stack) CollectPool(name string) (int64, error) {
	control := s.Run + "/control.sock"
	if _, err := s.output("daxfs", "pool", "gc", "--control", control, name); err != nil {
		return 0, err
	}
	out, err := s.output("daxfs", "pool", "show", "--json", "--control", control, name)
	if err != nil {
		return 0, err
	}
	var state struct {
		Index struct{ Extents, Waiting int64 }
	}
	if err := json.Unmarshal([]byte(out), &state); err != nil {
		return 0, err
	}
	return state.Index.Extents + state.Index.Waiting, nil
}

// SnapshotDirs lists the directories with the snapshots' files.
func (s *Stack) SnapshotDirs() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.DaemonRoot(), "snapshots"))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// Left is the state that a stopped daemon left.
type Left struct {
	// Keys are the keys of the snapshots, as containerd's clients know them.
	Keys []string
	// Trees lists views of the committed snapshots.
	Trees map[string][]string
}

// CheckDaemon opens the state of a stopped daemon, completes its pending work, mounts every committed
// snapshot, and compares everything: snapshots, directories, layers, packs, images, mounts, loop
// devices. The error names each contradiction and each leftover.
func (s *Stack) CheckDaemon() (left Left, err error) {
	ctx := context.Background()
	c, err := config.Load(filepath.Join(s.Dir, "daxfs.toml"))
	if err != nil {
		return left, err
	}
	c.Root, c.Address, c.Containerd.Address = s.DaemonRoot(), s.daemonSocket(), s.Run+"/containerd.sock"
	d, err := daemon.Open(ctx, c)
	if err != nil {
		return left, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	sn := d.Snapshotter()
	var committed []string
	err = sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		left.Keys = append(left.Keys, clientKey(info.Name))
		if info.Kind == snapshots.KindCommitted {
			committed = append(committed, info.Name)
		}
		return nil
	})
	if err != nil {
		return left, err
	}
	left.Trees = map[string][]string{}
	for _, name := range committed {
		if left.Trees[clientKey(name)], err = viewTree(ctx, sn, name); err != nil {
			return left, fmt.Errorf("snapshot %q: %w", name, err)
		}
	}
	if err := errors.Join(sn.Flush(ctx), sn.Cleanup(ctx)); err != nil {
		return left, err
	}
	var findings []error
	err = d.Check(ctx, func(msg string) { findings = append(findings, errors.New(msg)) })
	return left, errors.Join(append(findings, err)...)
}

// clientKey returns the client's key of the snapshot "<namespace>/<number>/<key>".
func clientKey(name string) string {
	if parts := strings.SplitN(name, "/", 3); len(parts) == 3 {
		return parts[2]
	}
	return name
}

func viewTree(ctx context.Context, sn *snapshotter.Snapshotter, name string) (lines []string, err error) {
	const view = "check-view"
	mounts, err := sn.View(ctx, view, name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, sn.Remove(ctx, view)) }()
	err = mount.WithTempMount(ctx, mounts, func(dir string) error {
		lines, err = listing.Tree(dir, Comparable)
		return err
	})
	return lines, err
}
