package store

import (
	"context"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// maxRead limits how many layers have their read times kept until an image is made of them.
const maxRead = 10_000

// noteBrought records how many bytes a committed layer added, and how long reading it took.
// Preconditions: the layer was not in the pool before.
func (s *Store) noteBrought(key string, began time.Time) error {
	_, alone, err := s.pool.LayerUsage(key)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if len(s.reading) < maxRead {
		s.reading[key] = time.Since(began)
	}
	s.mu.Unlock()
	return s.amendLayer(key, func(r *layerRecord) { r.Brought = alone })
}

// readTime returns how long reading the layers of an image took.
func (s *Store) readTime(layers []string) (sum time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range layers {
		sum += s.reading[key]
	}
	return sum
}

// forgetRead deletes the read times of layers: further images do not wait for them.
func (s *Store) forgetRead(layers []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range layers {
		delete(s.reading, key)
	}
}

// broughtBy returns how many bytes a new image added to the pool: its metadata, and the contents that
// came with layers which no other image has.
func (s *Store) broughtBy(key string, layers []string, u pool.ImageUsage) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := map[string]bool{}
	for other, r := range s.records.images {
		if other == key || r.Brought == 0 { // an image that was never built added nothing
			continue
		}
		for _, l := range r.Layers {
			taken[l] = true
		}
	}
	n := u.Tree + u.Segment
	for _, l := range slices.Compact(slices.Sorted(slices.Values(layers))) {
		if !taken[l] {
			n += s.records.layers[l].Brought
		}
	}
	return n
}

// addition describes an image that was just added to the pool.
type addition struct {
	image  pool.Image
	layers []string
	name   string
	read   time.Duration // time to read the layers
	build  time.Duration // time to merge them and write the metadata
}

// noteMade records how many bytes a new image added.
func (s *Store) noteMade(b *addition) error {
	u, err := s.pool.ImageUsage(b.image.Key)
	if err != nil {
		return err
	}
	key := canonical(b.image.Key)
	brought := s.broughtBy(key, b.layers, u)
	return s.amendImage(key, func(r *imageRecord) {
		if r.Brought == 0 { // a rebuilt image adds nothing new
			r.Brought = brought
		}
	})
}

// logMade logs one line about a new image. m is nil if it was not mounted.
func (s *Store) logMade(ctx context.Context, b *addition, m *mount.Mounted, mounting time.Duration) {
	key := canonical(b.image.Key)
	r := s.imageRecord(key)
	name := b.name
	if name == "" && len(r.Names) > 0 {
		name = r.Names[0]
	}
	logger := log.G(ctx).WithField("image", key).WithField("name", name).WithField("layers", len(b.layers)).
		WithField("new", r.Brought).WithField("read", rounded(b.read)).WithField("build", rounded(b.build))
	if u, err := s.pool.ImageUsage(b.image.Key); err == nil {
		logger = logger.WithField("bytes", u.Extents+u.Tree+u.Segment)
	}
	if m == nil {
		logger.Info("image added to the pool")
		return
	}
	logger.WithField("mount", rounded(mounting)).WithField("driver",
		m.Driver).Info("image added to the pool and mounted")
}

func rounded(d time.Duration) string { return d.Round(100 * time.Microsecond).String() }

// Room says how many bytes can be stored.
type Room struct {
	// Pool is the space for contents that is free in the pool.
	Pool int64 `json:"pool"`
	// Disk is the free space of the file system below a sparse pool; -1 for other pools.
	Disk int64 `json:"disk"`
}

// Free returns the smaller of both.
func (r Room) Free() int64 {
	if r.Disk < 0 {
		return r.Pool
	}
	return min(r.Pool, r.Disk)
}

// Room returns how much can be stored now.
func (s *Store) Room() (Room, error) {
	r := Room{Pool: s.pool.Usage().Free, Disk: -1}
	info := s.region.Info()
	if !info.Sparse || info.Path == "" {
		return r, nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(info.Path), &st); err != nil {
		return r, fmt.Errorf("free space of the file system of %q: %w", info.Path, err)
	}
	if st.Bavail < math.MaxInt64/uint64(st.Bsize) {
		r.Disk = int64(st.Bavail) * st.Bsize
	}
	return r, nil
}
