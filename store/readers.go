package store

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/lease"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Modes of keeping the images of a pool for its readers.
const (
	// ReadersNone means that nobody else reads the pool.
	ReadersNone = "none"
	// ReadersKeep means that images stay in the pool until somebody asks for their removal.
	ReadersKeep = "keep"
	// ReadersLeases means that images stay while lease regions name them.
	ReadersLeases = "leases"
)

// Readers describes who else reads the pool.
type Readers struct {
	// Mode is one of the constants.
	Mode string `json:"mode"`
	// Leases are the lease regions, in the notation of lease.NewRegions.
	Leases []string `json:"leases,omitempty"`
}

// kindReaders has one record, the Readers of the pool, so that a temporary owner knows them.
const (
	kindReaders = "readers"
	readersKey  = "pool"
)

// loadReaders takes the readers of the pool from the configuration, or else from the last record.
func (s *Store) loadReaders() error {
	raw, err := s.pool.Records(kindReaders)
	if err != nil {
		return err
	}
	was := raw[readersKey]
	switch c := s.cfg.Readers; {
	case c != nil:
		s.readers = *c
	case was != nil:
		if err := json.Unmarshal(was, &s.readers); err != nil {
			return fmt.Errorf("record of readers: %w", err)
		}
	}
	if err := s.readers.checkBeside(s.region); err != nil {
		return err
	}
	if s.cfg.Readers != nil {
		now, err := json.Marshal(s.readers)
		if err != nil {
			return err
		}
		if string(now) != string(was) {
			if err := s.pool.SetRecord(kindReaders, readersKey, now); err != nil {
				return err
			}
		}
	}
	if s.readers.Mode != ReadersLeases {
		return nil
	}
	if s.leases, err = lease.NewRegions(s.readers.Leases); err != nil {
		return err
	}
	s.pool.SetLeases(s.leases)
	return nil
}

// checkBeside returns an error if a lease region lies in the memory of the pool. Errors: pool.ErrInvalid.
func (r Readers) checkBeside(mem region.Region) error {
	for _, spec := range r.Leases {
		in, err := lease.Within(spec, mem.Info(), mem.Size())
		if err != nil {
			return err
		}
		if in {
			return fmt.Errorf("the lease region lies in the pool, expected memory beside it: %q: %w", spec,
				pool.ErrInvalid)
		}
	}
	return nil
}

// Validate returns an error if the mode or the lease regions are invalid. Errors: pool.ErrInvalid.
func (r Readers) Validate() error {
	if !slices.Contains([]string{ReadersNone, ReadersKeep, ReadersLeases}, r.Mode) {
		return fmt.Errorf("readers %q, expected none, keep or leases: %w", r.Mode, pool.ErrInvalid)
	}
	if (r.Mode == ReadersLeases) != (len(r.Leases) > 0) {
		return fmt.Errorf("readers %q with %d lease regions, expected some with %q and none else: %w",
			r.Mode, len(r.Leases), ReadersLeases, pool.ErrInvalid)
	}
	if _, err := lease.NewRegions(r.Leases); err != nil {
		return fmt.Errorf("%w: %w", pool.ErrInvalid, err)
	}
	return nil
}

// SetReaders records readers for stores without a configured value. Errors: pool.ErrInvalid.
func SetReaders(p *pool.Pool, r Readers) error {
	if err := errors.Join(r.Validate(), r.checkBeside(p.Region())); err != nil {
		return err
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return p.SetRecord(kindReaders, readersKey, raw)
}

// Shared reports whether others read the pool.
func (s *Store) Shared() bool {
	return s.readers.Mode == ReadersKeep || s.readers.Mode == ReadersLeases
}

// ReadersMode returns the mode: one of the constants.
func (s *Store) ReadersMode() string {
	return cmp.Or(s.readers.Mode, ReadersNone)
}

// LeaseUser is a reader with its claims.
type LeaseUser struct {
	Reader string `json:"reader"` // name of the reader; empty if nobody has opened the region
	Region string `json:"region"` // lease region of the reader
	// Images are the keys of the claimed images, sorted.
	Images []string `json:"images"`
	// Earlier are the images that it claimed before its last boot, but not since.
	Earlier []string `json:"earlier"`
	// Torn is the number of unreadable entries; they hold all images.
	Torn int `json:"torn,omitempty"`
}

// Holder returns the name of the reader as a holder of images.
func (u LeaseUser) Holder() string { return holderReader + cmp.Or(u.Reader, u.Region) }

// LeaseUsers returns the readers and their claims. The error names unreadable lease regions.
func (s *Store) LeaseUsers() ([]LeaseUser, error) {
	out := []LeaseUser{}
	if s.leases == nil {
		return out, nil
	}
	states, err := s.leases.List()
	return leaseUsers(states, s.pool.ID(), s.pool.Images()), err
}

// PeekReaders is LeaseUsers for a process that does not own the pool but has read its index. It only
// reads. Claims of a reader that has ended remain until the owner looks.
func PeekReaders(p *pool.Peek) ([]LeaseUser, error) {
	out := []LeaseUser{}
	text := p.Records[kindReaders][readersKey]
	if text == nil {
		return out, nil
	}
	var r Readers
	if err := json.Unmarshal(text, &r); err != nil {
		return out, fmt.Errorf("record of readers: %w", err)
	}
	if r.Mode != ReadersLeases {
		return out, nil
	}
	regions, err := lease.NewRegions(r.Leases)
	if err != nil {
		return out, err
	}
	states, err := regions.Peek()
	return leaseUsers(states, p.ID, p.Images), err
}

// leaseUsers matches the claims in lease regions with the images of a pool.
func leaseUsers(states []lease.State, id [16]byte, images []pool.Image) []LeaseUser {
	type tree struct { // index by tree: a reader that lies may fill its whole region with claims
		uuid [16]byte
		slot int
	}
	out := []LeaseUser{}
	for _, st := range states {
		now, earlier := map[tree]bool{}, map[tree]bool{}
		for _, c := range st.Claims {
			switch {
			case c.PoolID != id:
			case c.Earlier:
				earlier[tree{c.UUID, c.Slot}] = true
			default:
				now[tree{c.UUID, c.Slot}] = true
			}
		}
		u := LeaseUser{Reader: st.Reader, Region: st.Region, Torn: st.Torn, Images: []string{}, Earlier: []string{}}
		for _, m := range images {
			if earlier[tree{m.UUID, m.Slot}] {
				u.Earlier = add(u.Earlier, m.Key)
			}
			if now[tree{m.UUID, m.Slot}] {
				u.Images = add(u.Images, m.Key)
			}
		}
		out = append(out, u)
	}
	return out
}

// Release ends the claims of a reader that is gone, named by its name or its lease region; with
// earlier, only those from before its last boot. Errors: pool.ErrNotFound, pool.ErrInvalid.
func (s *Store) Release(reader string, earlier bool) (int, error) {
	if s.leases == nil {
		return 0, fmt.Errorf("reader %q: the pool has no lease regions: %w", reader, pool.ErrNotFound)
	}
	return s.leases.Void(reader, earlier)
}

type commandKey struct{}

// ByCommand marks an explicit request for space. With ReadersKeep nothing else frees images.
func ByCommand(ctx context.Context) context.Context {
	return context.WithValue(ctx, commandKey{}, true)
}

// keeps reports whether images stay although nobody here needs them.
func (s *Store) keeps(ctx context.Context) bool {
	return s.readers.Mode == ReadersKeep && ctx.Value(commandKey{}) == nil
}

// diffIDsOf returns diff IDs by layer keys. ok is false unless the store computed all of them.
func diffIDsOf(layers []string) (ids []digest.Digest, ok bool) {
	for _, key := range layers {
		id, isBlob := blobDiffID(key)
		if !isBlob {
			return nil, false
		}
		ids = append(ids, id)
	}
	return ids, len(ids) > 0
}

// Publish writes the documents that tell readers about the images of the pool. found are the OCI
// images in containerd; nil means that containerd does not answer, and keeps the images found earlier.
// Images put by hand are in PutNamespace. Every prefix of a chain becomes an image of its own.
//
// Failures are logged, and the next call tries again.
func (s *Store) Publish(ctx context.Context, found []OCIImage) error {
	if !s.Shared() {
		return nil
	}
	s.publishing.Lock()
	defer s.publishing.Unlock()
	byChain := map[digest.Digest][]OCIImage{}
	for _, m := range found {
		parts, err := m.Parts()
		if err != nil {
			log.G(ctx).WithError(err).WithField("image", m.Name).Debug("not told to readers")
			continue
		}
		id := identity.ChainID(parts.DiffIDs)
		byChain[id] = append(byChain[id], m)
	}
	put, err := s.putImages()
	if err != nil {
		return err
	}
	s.addPrefixes(ctx)
	type telling struct {
		image pool.Image
		doc   Document
		gains bool // it gets a new name
	}
	var list []telling
	for _, m := range s.pool.Images() {
		ids, ok := s.published(m)
		if !ok {
			continue
		}
		d := Document{ChainID: identity.ChainID(ids), DiffIDs: ids, Images: byChain[identity.ChainID(ids)]}
		had := s.documented(m)
		if found == nil {
			d.Images = had
		}
		d.Images = slices.DeleteFunc(slices.Clone(d.Images),
			func(o OCIImage) bool { return o.Namespace == PutNamespace })
		d.Images = append(d.Images, put[d.ChainID]...)
		gains := slices.ContainsFunc(d.Images, func(o OCIImage) bool { return !slices.ContainsFunc(had, o.sameName) })
		list = append(list, telling{m, d, gains})
	}
	// Remove a moved name from its old image first, so that readers never find it twice.
	slices.SortStableFunc(list, func(a, b telling) int {
		switch {
		case a.gains == b.gains:
			return 0
		case a.gains:
			return 1
		}
		return -1
	})
	for _, t := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := s.setDocument(ctx, t.image, t.doc)
		if err != nil && !errors.Is(err, pool.ErrNotFound) { // removed meanwhile
			log.G(ctx).WithError(err).WithField("image", t.image.Key).Warn("cannot tell readers about an image")
		}
	}
	return nil
}

func (m OCIImage) sameName(o OCIImage) bool { return m.Namespace == o.Namespace && m.Name == o.Name }

// published returns the diff IDs of an image, if readers are told about it.
func (s *Store) published(m pool.Image) ([]digest.Digest, bool) {
	if s.pool.Unlisted(m.Key) || s.retired(m.Key) || s.pool.ImageDamaged(m.Key) {
		return nil, false
	}
	return diffIDsOf(s.imageRecord(canonical(m.Key)).Layers)
}

// addPrefixes makes an image of each prefix of each chain.
func (s *Store) addPrefixes(ctx context.Context) {
	for _, m := range s.pool.Images() {
		ids, ok := s.published(m)
		if !ok {
			continue
		}
		layers := s.imageRecord(canonical(m.Key)).Layers
		for n := len(ids) - 1; n > 0; n-- {
			img := Image{Key: ImageKey(layers[:n])}
			if _, err := s.pool.Image(s.poolKey(img.Key)); err == nil {
				continue
			}
			for _, key := range layers[:n] {
				img.Layers = append(img.Layers, Layer{Key: key})
			}
			if err := s.rebuildOne(ctx, img); err != nil {
				log.G(ctx).WithError(err).WithField("image", m.Key).WithField("layers", n).
					Warn("readers cannot use the first layers of an image alone")
				break
			}
		}
	}
}

// documented returns the OCI images in the document of an image.
func (s *Store) documented(m pool.Image) []OCIImage {
	raw, err := pool.ReadDocument(s.region, m)
	if err != nil {
		return nil
	}
	d, err := ParseDocument(raw)
	if err != nil {
		return nil
	}
	return d.Images
}

func (s *Store) setDocument(ctx context.Context, m pool.Image, d Document) error {
	d.Images = d.Images[:min(len(d.Images), maxDocumentImages)]
	raw, err := d.Marshal()
	for err != nil && len(d.Images) > 0 { // too many names for one document
		d.Images = d.Images[:len(d.Images)/2]
		raw, err = d.Marshal()
	}
	if err != nil {
		return err
	}
	return s.pool.SetDocument(ctx, m.Key, raw)
}

// findPrefixes finds the images that are prefixes of a needed one.
func (w *sweep) findPrefixes() {
	w.prefixes = map[string]bool{}
	if !w.Shared() {
		return
	}
	for key, r := range w.imageRecords() {
		if _, ok := diffIDsOf(r.Layers); !ok || len(r.Layers) < 2 || w.needOf(key) == Unused &&
			!slices.ContainsFunc(r.Holders, lasting) {
			continue
		}
		for n := 1; n < len(r.Layers); n++ {
			w.prefixes[ImageKey(r.Layers[:n])] = true
		}
	}
}
