package store

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
)

// PutNamespace is the namespace, in documents, of OCI images that Put added.
const PutNamespace = "daxfs.put"

// kindPut has a putRecord under the name of each pin whose image has a manifest.
const kindPut = "put"

// putRecord is an OCI image that was put by hand.
type putRecord struct {
	// Key is the key of the image.
	Key   string   `json:"key"`
	Image OCIImage `json:"image"`
}

// putOCIImage returns the description for readers of an image that is put under a name. ok is false if
// its source has no manifest, or if neither of its names is a reference.
func putOCIImage(src *source.Image, name string) (_ OCIImage, ok bool) {
	if len(src.Manifest) == 0 || len(src.Config) == 0 {
		return OCIImage{}, false
	}
	m := OCIImage{
		Namespace: PutNamespace,
		Target: ocispec.Descriptor{
			MediaType: src.ManifestType, Digest: digest.FromBytes(src.Manifest), Size: int64(len(src.Manifest)),
		},
		Blobs: [][]byte{src.Manifest, src.Config},
	}
	for _, m.Name = range []string{name, src.Name} {
		if _, err := reference.ParseAnyReference(m.Name); err != nil || strings.HasPrefix(m.Name, imagePrefix) {
			continue
		}
		if _, err := m.Parts(); err == nil {
			return m, true
		}
	}
	return OCIImage{}, false
}

// notePut records the image put under a name; nil deletes the record. Durable after FlushRecords.
func (s *Store) notePut(name, key string, src *source.Image) error {
	defer s.puts.Add(1)
	if src != nil {
		if m, ok := putOCIImage(src, name); ok {
			return s.note(kindPut, name, putRecord{Key: key, Image: m})
		}
	}
	return s.note(kindPut, name, nil)
}

// Puts rises when images are put or unpinned by hand, which gives Publish work without a new image.
func (s *Store) Puts() uint64 { return s.puts.Load() }

// putImages returns the OCI images that were put by hand and are still pinned, by chain ID.
func (s *Store) putImages() (map[digest.Digest][]OCIImage, error) {
	raw, err := s.pool.Records(kindPut)
	if err != nil {
		return nil, err
	}
	out := map[digest.Digest][]OCIImage{}
	for name, text := range raw {
		var r putRecord
		if err := json.Unmarshal(text, &r); err != nil {
			return nil, fmt.Errorf("record of %q: %w", name, err)
		}
		parts, err := r.Image.Parts()
		if err != nil || !slices.Contains(s.imageRecord(r.Key).Holders, holderPin+name) {
			continue // the pin has moved
		}
		id := identity.ChainID(parts.DiffIDs)
		if !slices.ContainsFunc(out[id], r.Image.named) { // two pins of one image without a name of its own
			out[id] = append(out[id], r.Image)
		}
	}
	return out, nil
}

// named reports whether another OCI image has the same name.
func (m OCIImage) named(other OCIImage) bool {
	return m.Namespace == other.Namespace && m.Name == other.Name
}
