package service

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// Check compares everything that the daemon knows with everything there is: snapshots, directories, records, layers,
// packs, images, mounts, loop devices. It tells report of each contradiction and of each thing that is left over. It is
// exact when nothing else is under way, after Flush and Cleanup.
func (s *Service) Check(ctx context.Context, report func(msg string)) error {
	facts, err := s.sn.Check(ctx, report)
	if err != nil {
		return err
	}
	err = s.pool.Check(ctx, func(f pool.Finding) bool {
		report("pool: " + f.String())
		return true
	})
	if err != nil {
		return fmt.Errorf("pool: %w", err)
	}
	s.lowers.checkStored(facts, report)
	if err := s.lowers.checkPacks(facts.Uses, report); err != nil {
		return err
	}
	if err := s.checkMounts(facts.Uses, report); err != nil {
		return err
	}
	return s.checkLoops(ctx, report)
}

// checkStored holds layers and images against the records.
func (l *lowers) checkStored(facts snapshotter.Facts, report func(string)) {
	for _, key := range l.pool.Layers() {
		if facts.Uses.Layer(key) == snapshotter.Unused {
			report(fmt.Sprintf("layer %q in the pool is left over", key))
		}
		if _, _, err := l.load(key); err != nil {
			report(err.Error())
		}
	}
	for _, img := range l.pool.Images() {
		if facts.Uses.Image(img.Key) == snapshotter.Unused {
			report(fmt.Sprintf("image of chain %q in the pool is left over", img.Key))
		}
	}
	for chain, layers := range facts.Chains {
		for _, f := range layers {
			if _, err := l.pool.Layer(f.Key); err == nil {
				continue
			}
			if f.Dir == "" && !l.restorable(f.Key) {
				report(fmt.Sprintf("chain %q: layer %q is neither in the pool nor in a pack", chain, f.Key))
			}
		}
	}
}

func (l *lowers) checkPacks(uses snapshotter.Uses, report func(string)) error {
	if l.packs == nil {
		return nil
	}
	entries, err := os.ReadDir(l.packs.dir)
	if err != nil {
		return err
	}
	ids, err := l.packs.list()
	if err != nil {
		return err
	}
	known := map[string]digest.Digest{}
	for _, id := range ids {
		known[filepath.Base(l.packs.path(id))] = id
	}
	for _, e := range entries {
		id, ok := known[e.Name()]
		if !ok || uses.Layer(blobPrefix+id.String()) == snapshotter.Unused {
			report(fmt.Sprintf("layer pack %q is left over", filepath.Join(l.packs.dir, e.Name())))
		}
	}
	return nil
}

// checkMounts holds the kernel's mounts, the table and the pool against each other.
func (s *Service) checkMounts(uses snapshotter.Uses, report func(string)) error {
	images := filepath.Join(filepath.Dir(filepath.Dir(filepath.Dir(s.table.Dir("x")))), "images")
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(images))
	if err != nil {
		return err
	}
	table := map[string]bool{}
	for _, m := range s.table.List() {
		table[m.Dir] = true
		img, err := s.pool.Image(m.Key)
		if err != nil {
			report(fmt.Sprintf("chain %q is mounted, but: %v", m.Key, err))
		} else if img.Off != m.Source.Off || img.Size != m.Source.Size {
			report(fmt.Sprintf("chain %q is mounted from window %d+%d, its image has %d+%d", m.Key, m.Source.Off, m.Source.Size, img.Off, img.Size))
		}
		if uses.Image(m.Key) == snapshotter.Unused {
			report(fmt.Sprintf("mount of chain %q is left over", m.Key))
		}
		if _, err := os.ReadDir(m.Dir); err != nil {
			report(fmt.Sprintf("chain %q: %v", m.Key, err))
		}
	}
	for _, m := range infos {
		if !table[m.Mountpoint] {
			report(fmt.Sprintf("mount %q is in no table", m.Mountpoint))
		}
		delete(table, m.Mountpoint)
	}
	for dir := range table {
		report(fmt.Sprintf("the table says that %q is a mount, or mounted once, and it is not", dir))
	}
	entries, err := os.ReadDir(images)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if mnt := filepath.Join(images, e.Name(), "mnt"); !s.inTable(mnt) {
			report(fmt.Sprintf("image directory %q is left over", filepath.Dir(mnt)))
		}
	}
	return nil
}

func (s *Service) inTable(dir string) bool {
	for _, m := range s.table.List() {
		if m.Dir == dir {
			return true
		}
	}
	return false
}

// loopsLag is how long a loop device may outlive its mount. A runtime that starts a container at the same moment has a
// copy of all mounts until it changed its root, and with it the device.
const loopsLag = 10 * time.Second

// checkLoops finds loop devices over the pool that belong to no mount.
func (s *Service) checkLoops(ctx context.Context, report func(string)) error {
	deadline := time.Now().Add(loopsLag)
	for {
		loops, err := loopsOver(s.region.Info().Path)
		if err != nil {
			return err
		}
		mounts := 0
		for _, m := range s.table.List() {
			if m.Driver == "erofs-loop" {
				mounts++
			}
		}
		if loops == mounts {
			return nil
		}
		if time.Now().After(deadline) {
			report(fmt.Sprintf("%d loop devices over %q for %d mounts", loops, s.region.Info().Path, mounts))
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// loopsOver counts the loop devices over a file.
func loopsOver(path string) (int, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return 0, err
	}
	n := 0
	for _, f := range files {
		raw, err := os.ReadFile(f)
		// One that can not be read was detached meanwhile.
		if err == nil && strings.TrimSuffix(strings.TrimSpace(string(raw)), " (deleted)") == path {
			n++
		}
	}
	return n, nil
}
