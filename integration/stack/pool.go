package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// PoolReport is what a stopped daemon's pool holds.
type PoolReport struct {
	pool.Usage
	ImageKeys, LayerKeys []string
}

// CheckPool opens the file pool of the daemon, which must be stopped, proves it and tells what is in it.
func (s *Stack) CheckPool() (report PoolReport, err error) {
	dir := filepath.Join(s.DaemonRoot(), "pool")
	r, err := region.Open(region.Config{Kind: region.KindFile, Path: filepath.Join(dir, "region")})
	if err != nil {
		return report, fmt.Errorf("the daemon's region: %w", err)
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	p, err := pool.Open(r, filepath.Join(dir, "index.db"), pool.Options{})
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

// SnapshotDirs lists the directories in which the daemon keeps what snapshots wrote.
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
