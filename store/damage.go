package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/log"

	"github.com/daxfs/daxfs-snapshotter/pool"
)

// An image with damaged contents stays in the pool while containers use it, and nobody else gets it.
// The image is built again beside it, with another key in the pool: its own, a "+" and a number. A
// sweep removes the damaged one once nothing uses it.

// CanonicalKey returns the key of an image from its key in the pool. A damaged image and its rebuilt
// copy have different keys in the pool.
func CanonicalKey(key string) string { return canonical(key) }

// canonical is CanonicalKey.
func canonical(key string) string {
	key, _, _ = strings.Cut(key, "+")
	return key
}

// poolKey returns the key that an image has in the pool, or will have once it is built.
func (s *Store) poolKey(key string) string {
	if _, err := s.pool.Image(key); err == nil && !s.pool.ImageDamaged(key) {
		return key
	}
	taken := map[string]bool{}
	for _, m := range s.pool.Images() {
		if canonical(m.Key) != key {
			continue
		}
		if !s.pool.ImageDamaged(m.Key) {
			return m.Key
		}
		taken[m.Key] = true
	}
	free := key
	for n := 1; taken[free]; n++ {
		free = key + "+" + strconv.Itoa(n)
	}
	return free
}

// retired tells whether nobody gets an image of the pool any more: it is damaged, or was rebuilt.
func (s *Store) retired(key string) bool {
	_, err := s.pool.Image(key)
	return err == nil && key != s.poolKey(canonical(key))
}

// retireGrace delays removal after damage was found: an overlay may be about to use the image.
const retireGrace = time.Minute

func (s *Store) mayRetire() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.damaged) > retireGrace
}

// Scrub reads the contents of the pool, at most rate bytes per second unless rate is 0, and logs
// changed contents. Nobody gets those from then on: see pool.Scrub and Heal.
func (s *Store) Scrub(ctx context.Context, rate int64) (pool.Scrubbed, error) {
	return s.pool.Scrub(ctx, pool.ScrubOptions{Rate: rate}, func(d pool.Damage) {
		s.mu.Lock()
		s.damaged = time.Now()
		s.mu.Unlock()
		log.G(ctx).WithField("offset", d.Off).WithField("images", d.Images).WithField("layers", d.Layers).
			Error("contents in the pool have changed: " + d.Finding().Msg)
	})
}

// Heal rebuilds images with damaged contents, beside the containers that use them. layers lists the
// layers of images for which more is known than their keys. Heal returns the failures, which Healthy
// also reports from then on.
func (s *Store) Heal(ctx context.Context, layers map[string][]Layer) error {
	lost := map[string]error{}
	for _, m := range s.pool.Images() {
		key := canonical(m.Key)
		if !s.pool.ImageDamaged(m.Key) || lost[key] != nil {
			continue
		}
		if _, err := s.pool.Image(s.poolKey(key)); err == nil {
			continue // rebuilt already
		}
		img := s.recorded(key)
		if len(layers[key]) > 0 {
			img.Layers = layers[key]
		}
		if err := s.rebuildOne(ctx, img); err != nil {
			lost[key] = fmt.Errorf("image %q %q holds damaged contents and cannot be made again: %w",
				key, s.imageRecord(key).Names, err)
			log.G(ctx).Error(lost[key])
			continue
		}
		log.G(ctx).WithField("image", key).Warn("made an image with damaged contents again")
	}
	s.mu.Lock()
	s.lost = lost
	s.mu.Unlock()
	return joinSorted(lost)
}

// unhealed returns the failures of Heal for images that are still damaged.
func (s *Store) unhealed() error {
	s.mu.Lock()
	lost := maps.Clone(s.lost)
	s.mu.Unlock()
	maps.DeleteFunc(lost, func(key string, _ error) bool {
		_, err := s.pool.Image(s.poolKey(key))
		return err == nil ||
			!slices.ContainsFunc(s.pool.Images(), func(m pool.Image) bool { return canonical(m.Key) == key })
	})
	return joinSorted(lost)
}

func joinSorted(list map[string]error) error {
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(list)) {
		errs = append(errs, list[key])
	}
	return errors.Join(errs...)
}

// recorded returns an image according to its record.
func (s *Store) recorded(key string) Image {
	img := Image{Key: key}
	for _, l := range s.imageRecord(key).Layers {
		img.Layers = append(img.Layers, Layer{Key: l})
	}
	return img
}
