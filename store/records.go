package store

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Kinds of records in the index of the pool.
const (
	kindImage = "image"
	kindLayer = "layer"
	// kindLoose has one record, named by the UUID of an epoch, if an image was removed in that epoch that
	// something other than overlays of snapshots had used: see reclaim.
	kindLoose = "loose"
	// kindStray has one record if a file system of the pool may live unmounted: see unmountAll.
	kindStray = "stray"
)

// strayKey is the key of that record.
const strayKey = "pool"

// imageRecord is the store's record of an image. A new epoch of the pool removes only the image.
type imageRecord struct {
	// Layers are the keys of its layers, bottom first.
	Layers []string `json:"layers"`
	// Names are references of OCI images, sorted.
	Names []string `json:"names,omitempty"`
	// Holders are sorted.
	Holders []string `json:"holders,omitempty"`
	// Brought is how many bytes the image added to the pool.
	Brought int64 `json:"brought,omitempty"`
}

// layerRecord is the store's record of a layer.
type layerRecord struct {
	Holders []string `json:"holders,omitempty"`
	// Blobs are the digests of the blobs from which the layer was read, sorted.
	Blobs []digest.Digest `json:"blobs,omitempty"`
	// Brought is how many bytes of contents the layer added to the pool.
	Brought int64 `json:"brought,omitempty"`
}

// records is the store's copy of its records in the index. Store.mu guards it.
type records struct {
	images map[string]imageRecord
	layers map[string]layerRecord
	// proven maps the digest of a blob to the key of the layer that was read from it.
	proven map[digest.Digest]string
	// loose and stray say whether the index has a kindLoose record of this epoch, or a kindStray record.
	loose, stray bool
}

// Prefixes of holders.
const (
	holderContainerd = "containerd/"
	holderPin        = "pin/"
	holderMount      = "mount/"
	holderReader     = "reader/"
)

// ContainerdHolder returns the holder for a namespace of containerd.
func ContainerdHolder(namespace string) string { return holderContainerd + namespace }

func (s *Store) loadRecords() error {
	s.records = records{
		images: map[string]imageRecord{}, layers: map[string]layerRecord{}, proven: map[digest.Digest]string{},
	}
	if err := load(s, kindImage, s.records.images); err != nil {
		return err
	}
	if err := load(s, kindLayer, s.records.layers); err != nil {
		return err
	}
	for key, r := range s.records.layers {
		for _, d := range r.Blobs {
			s.records.proven[d] = key
		}
	}
	loose, err := s.pool.Records(kindLoose)
	if err != nil {
		return err
	}
	stray, err := s.pool.Records(kindStray)
	if err != nil {
		return err
	}
	s.records.loose, s.records.stray = loose[s.epochName()] != nil, stray[strayKey] != nil
	return nil
}

func load[R any](s *Store, kind string, into map[string]R) error {
	raw, err := s.pool.Records(kind)
	if err != nil {
		return err
	}
	for key, text := range raw {
		var r R
		if err := json.Unmarshal(text, &r); err != nil {
			return fmt.Errorf("record of %s %q: %w", kind, key, err)
		}
		into[key] = r
	}
	return nil
}

// note writes a record with the next change of the index, or with FlushRecords; nil removes it. Most
// records change together with their subject, and each change of the index waits for the disk.
func (s *Store) note(kind, key string, r any) error {
	if r == nil {
		return s.pool.NoteRecord(kind, key, nil)
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return s.pool.NoteRecord(kind, key, raw)
}

// amendImage changes or creates the record of an image. It is durable after FlushRecords.
func (s *Store) amendImage(key string, change func(*imageRecord)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, had := s.records.images[key]
	now := old
	now.Names, now.Holders = slices.Clone(old.Names), slices.Clone(old.Holders)
	change(&now)
	if had && slices.Equal(old.Layers, now.Layers) && slices.Equal(old.Names, now.Names) &&
		slices.Equal(old.Holders, now.Holders) && old.Brought == now.Brought {
		return nil
	}
	if err := s.note(kindImage, key, now); err != nil {
		return err
	}
	s.records.images[key] = now
	return nil
}

// amendLayer changes or creates the record of a layer. It is durable after FlushRecords.
func (s *Store) amendLayer(key string, change func(*layerRecord)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, had := s.records.layers[key]
	now := old
	now.Holders, now.Blobs = slices.Clone(old.Holders), slices.Clone(old.Blobs)
	change(&now)
	if had && slices.Equal(old.Holders, now.Holders) && slices.Equal(old.Blobs, now.Blobs) &&
		old.Brought == now.Brought {
		return nil
	}
	if err := s.note(kindLayer, key, now); err != nil {
		return err
	}
	s.records.layers[key] = now
	for _, d := range now.Blobs {
		s.records.proven[d] = key
	}
	return nil
}

func (s *Store) forgetImage(key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.records.images[key]; !ok {
		return nil
	}
	if err := s.note(kindImage, key, nil); err != nil {
		return err
	}
	delete(s.records.images, key)
	return nil
}

func (s *Store) forgetLayer(key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.records.layers[key]
	if !ok {
		return nil
	}
	if err := s.note(kindLayer, key, nil); err != nil {
		return err
	}
	delete(s.records.layers, key)
	delete(s.reading, key)
	for _, d := range r.Blobs {
		delete(s.records.proven, d)
	}
	return nil
}

// provenLayer returns the key of the layer that was read from a blob, or "".
func (s *Store) provenLayer(blob digest.Digest) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.records.proven[blob]
}

func (s *Store) imageRecord(key string) imageRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.records.images[key]
}

// imageRecords returns a copy of all image records.
func (s *Store) imageRecords() map[string]imageRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.records.images)
}

func (s *Store) layerRecords() map[string]layerRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.records.layers)
}

// add adds a value to a sorted list.
func add[S ~[]E, E ~string](list S, value E) S {
	if value == "" {
		return list
	}
	at, found := slices.BinarySearch(list, value)
	if found {
		return list
	}
	return slices.Insert(list, at, value)
}

// without removes the values from a list for which drop returns true.
func without(list []string, drop func(string) bool) []string { return slices.DeleteFunc(list, drop) }

// ofContainerd reports whether a holder is a namespace of containerd.
func ofContainerd(holder string) bool { return strings.HasPrefix(holder, holderContainerd) }
