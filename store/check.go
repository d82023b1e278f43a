package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/pool"
)

// Check compares the store with the pool and the kernel, and with what containerd needs: use, and the
// layers of each of its images. It calls report for each contradiction and each leftover. It is exact
// after a Sweep while nothing else runs.
func (s *Store) Check(ctx context.Context, use Uses, images map[string][]Layer, report func(msg string)) error {
	err := s.pool.Check(ctx, func(f pool.Finding) bool {
		report("pool: " + f.String())
		return true
	})
	if err != nil {
		return fmt.Errorf("pool: %w", err)
	}
	w := &sweep{Store: s, use: use}
	w.findHeld()
	w.checkStored(images, report)
	if err := w.checkPacks(report); err != nil {
		return err
	}
	if err := w.checkPlain(report); err != nil {
		return err
	}
	if err := w.checkMounts(report); err != nil {
		return err
	}
	return s.checkLoops(ctx, report)
}

// checkStored compares layers and images with the records.
func (w *sweep) checkStored(images map[string][]Layer, report func(string)) {
	bad := func(format string, args ...any) { report(fmt.Sprintf(format, args...)) }
	inPool := map[string]bool{}
	for _, key := range w.pool.Layers() {
		inPool[key] = true
		if w.needOfLayer(key) == Unused {
			bad("layer %q in the pool is left over", key)
		}
		if _, _, err := w.load(key); err != nil {
			report(err.Error())
		}
	}
	for key := range w.layerRecords() {
		if !inPool[key] && w.needOfLayer(key) == Unused {
			bad("record of layer %q is left over", key)
		}
	}
	for _, img := range w.pool.Images() {
		if w.needOfImage(img.Key) == Unused && !w.retired(img.Key) {
			bad("image %q in the pool is left over", img.Key)
		}
	}
	for key := range w.imageRecords() {
		if w.needOfImage(key) == Unused {
			bad("record of image %q is left over", key)
		}
	}
	for key, layers := range images {
		for _, f := range layers {
			if !inPool[f.Key] && f.Dir == "" && !w.restorable(f.Key) {
				bad("image %q: layer %q is neither in the pool nor in a pack", key, f.Key)
			}
		}
	}
}

func (w *sweep) checkPacks(report func(string)) error {
	if w.packs == nil {
		return nil
	}
	entries, err := os.ReadDir(w.packs.dir)
	if err != nil {
		return err
	}
	ids, err := w.packs.list()
	if err != nil {
		return err
	}
	known := map[string]digest.Digest{}
	for _, id := range ids {
		known[filepath.Base(w.packs.path(id))] = id
	}
	for _, e := range entries {
		id, ok := known[e.Name()]
		if !ok || w.needOfLayer(BlobKey(id)) == Unused {
			report(fmt.Sprintf("layer pack %q is left over", filepath.Join(w.packs.dir, e.Name())))
		}
	}
	return nil
}

func (w *sweep) checkPlain(report func(string)) error {
	entries, err := os.ReadDir(w.plainDir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if !w.use.Plain(imagePrefix + e.Name()) {
			report(fmt.Sprintf("plain copy %q is left over", filepath.Join(w.plainDir(), e.Name())))
		}
	}
	return err
}

// checkMounts compares the kernel's mounts, the table and the pool with each other.
func (w *sweep) checkMounts(report func(string)) error {
	bad := func(format string, args ...any) { report(fmt.Sprintf(format, args...)) }
	images := filepath.Join(w.cfg.Root, "images")
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(images))
	if err != nil {
		return err
	}
	table, known := map[string]bool{}, map[string]bool{}
	for _, m := range w.Mounted() {
		table[m.Dir], known[m.Dir] = true, true
		if _, err := w.pool.Image(m.Key); err != nil {
			bad("image %q is mounted, but: %v", m.Key, err)
		}
		if w.needOfImage(m.Key) == Unused && !w.retired(m.Key) {
			bad("mount of image %q is left over", m.Key)
		}
		if _, err := os.ReadDir(m.Dir); err != nil {
			bad("image %q: %v", m.Key, err)
		}
	}
	for _, m := range infos {
		if !table[m.Mountpoint] {
			bad("mount %q is in no table, or there twice", m.Mountpoint)
		}
		delete(table, m.Mountpoint)
	}
	for dir := range table {
		bad("the table says that %q is a mount, and it is not", dir)
	}
	entries, err := os.ReadDir(images)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !known[filepath.Join(images, e.Name(), "mnt")] {
			bad("image directory %q is left over", filepath.Join(images, e.Name()))
		}
	}
	return nil
}

// loopsLag is how long a loop device may outlive its mount. A runtime that is starting a container has
// a copy of all mounts until it changes its root, and that copy keeps the device.
const loopsLag = 10 * time.Second

// checkLoops reports loop devices over the pool without a mount. One device serves all images.
func (s *Store) checkLoops(ctx context.Context, report func(string)) error {
	deadline := time.Now().Add(loopsLag)
	for {
		loops, err := loopsOver(s.region.Info().Path)
		if err != nil {
			return err
		}
		if loops <= 1 {
			return nil
		}
		if time.Now().After(deadline) {
			report(fmt.Sprintf("%d loop devices over %q, expected one at most", loops, s.region.Info().Path))
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
		// An unreadable one was detached meanwhile.
		if err == nil && strings.TrimSuffix(strings.TrimSpace(string(raw)), " (deleted)") == path {
			n++
		}
	}
	return n, nil
}
