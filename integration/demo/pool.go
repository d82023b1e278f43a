package main

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// poolFacts are findings from the pool's catalogue and images. Sizes are bytes of whole pages.
type poolFacts struct {
	images   int
	apart    int64 // contents of all images, if each had its own copies
	together int64 // contents in the pool
	// files maps a file to its addresses in the pool, image by image.
	files map[string][]int64
}

// readPool reads the pool like another kernel, without asking a daemon.
func (d *demo) readPool(files ...string) (facts poolFacts, err error) {
	r, err := region.Open(region.Config{Kind: d.pool, Path: d.poolPath(), ReadOnly: true})
	if err != nil {
		return facts, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	catalogue, err := pool.ReadCatalogue(r)
	if err != nil {
		return facts, err
	}
	live, err := daxfs.OpenLive(r, catalogue.Size)
	if err != nil {
		return facts, err
	}
	facts.images = len(catalogue.Images)
	facts.files = map[string][]int64{}
	all := map[int64]int64{}
	for _, m := range catalogue.Images {
		img, err := live.Image(m.Slot)
		if err != nil {
			return facts, fmt.Errorf("image %q: %w", m.Key, err)
		}
		own, err := extents(img)
		if err != nil {
			return facts, fmt.Errorf("image %q: %w", m.Key, err)
		}
		for off, size := range own {
			facts.apart += size
			all[off] = size
		}
		for _, name := range files {
			st, err := fs.Stat(img, name)
			if err != nil {
				return facts, fmt.Errorf("image %q: %w", m.Key, err)
			}
			facts.files[name] = append(facts.files[name], st.Sys().(*daxfs.Stat).Off)
		}
	}
	for _, size := range all {
		facts.together += size
	}
	return facts, nil
}

// extents maps the pool offsets of an image's contents to their sizes in bytes of whole pages.
func extents(img *daxfs.FS) (map[int64]int64, error) {
	found := map[int64]int64{}
	err := fs.WalkDir(img, ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if st := info.Sys().(*daxfs.Stat); st.Off >= 0 {
			found[st.Off] = (st.Size + pageSize - 1) / pageSize * pageSize
		}
		return nil
	})
	return found, err
}
