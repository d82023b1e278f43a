package source

import (
	"context"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// dockerArchive is the output of docker save: a manifest.json that names configurations and tars of layers.
type dockerArchive struct {
	name, file, ref string
	limit           int64
	*archive
}

func (s *dockerArchive) String() string { return s.name }

func (s *dockerArchive) Close() error { return s.archive.close() }

// dockerManifestFile is the member of a docker archive that lists its images.
const dockerManifestFile = "manifest.json"

type dockerEntry struct {
	Config   string
	RepoTags []string
	Layers   []string

	index int
}

func (s *dockerArchive) Image(ctx context.Context, p Platform) (*Image, error) {
	var err error
	if s.archive == nil {
		if s.archive, err = openArchive(ctx, s.file, s.limit); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	img, err := s.choose(p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	return img, nil
}

func (s *dockerArchive) choose(p Platform) (*Image, error) {
	list, err := s.entries()
	if err != nil {
		return nil, err
	}
	found, err := pickDocker(list, s.ref)
	if err != nil {
		return nil, err
	}
	if len(found) == 1 {
		img, err := s.image(found[0])
		if err != nil {
			return nil, err
		}
		return img, p.accept(img.Platform)
	}
	images := map[digest.Digest]*Image{}
	var all []candidate
	for _, e := range found {
		img, err := s.image(e)
		if err != nil {
			return nil, fmt.Errorf("image @%d: %w", e.index, err)
		}
		if images[img.Digest] == nil {
			images[img.Digest] = img
			d := ocispec.Descriptor{Digest: img.Digest}
			all = append(all, candidate{desc: d, name: fmt.Sprint("@", e.index), platform: img.Platform})
		}
	}
	ranks := p.rank(all)
	switch {
	case len(ranks) == 0:
		return nil, fmt.Errorf("%w %s%s", ErrPlatform, p.name, others(all))
	case len(ranks[0]) > 1:
		return nil, ambiguous(p, ranks[0])
	}
	return images[ranks[0][0].desc.Digest], nil
}

func (s *dockerArchive) entries() ([]dockerEntry, error) {
	doc, err := s.document(dockerManifestFile)
	if err != nil {
		if _, inner := s.reader(ocispec.ImageIndexFile); inner == nil {
			err = fmt.Errorf("%w (it has an %s: oci-archive:FILE reads it)", err, ocispec.ImageIndexFile)
		}
		return nil, fmt.Errorf("not a docker archive: %w", err)
	}
	var list []dockerEntry
	if err := decode(doc, &list); err != nil {
		return nil, fmt.Errorf("%s: %w", dockerManifestFile, err)
	}
	for i := range list {
		list[i].index = i
	}
	return list, nil
}

func (s *dockerArchive) image(e dockerEntry) (*Image, error) {
	doc, err := s.document(e.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	// The configuration's name contains its digest: <hex>.json in old archives, blobs/sha256/<hex> in new
	// ones, sha256:<hex> from crane and ko.
	hex := strings.TrimPrefix(strings.TrimSuffix(path.Base(e.Config), ".json"), "sha256:")
	want := digest.NewDigestFromEncoded(digest.SHA256, hex)
	if want.Validate() == nil {
		if err := verify(doc, ocispec.Descriptor{Digest: want}); err != nil {
			return nil, fmt.Errorf("config: %w", err)
		}
	}
	img, err := fromConfig(doc, digest.FromBytes(doc), len(e.Layers))
	if err != nil {
		return nil, err
	}
	for i, name := range e.Layers {
		r, err := s.reader(name)
		if err != nil {
			return nil, fmt.Errorf("layer %d (%s): %w", i, img.Layers[i].DiffID, err)
		}
		d := ocispec.Descriptor{Size: r.Size()}
		if hex, ok := strings.CutPrefix(key(name), "blobs/sha256/"); ok {
			d.Digest = digest.NewDigestFromEncoded(digest.SHA256, hex)
			if err := d.Digest.Validate(); err != nil {
				return nil, fmt.Errorf("layer %d: %q: %w", i, name, err)
			}
		}
		img.Layers[i].Desc = d
		img.Layers[i].Open = func(context.Context) (io.ReadCloser, error) {
			r, err := s.reader(name) // a separate reader: a layer may occur twice
			if err != nil {
				return nil, err
			}
			return io.NopCloser(r), nil
		}
	}
	return img, nil
}

// pickDocker finds the images named by a reference or @N, or the only one. Several images of one name
// are one image for several platforms.
func pickDocker(list []dockerEntry, ref string) ([]dockerEntry, error) {
	if n, ok := strings.CutPrefix(ref, "@"); ok {
		i, err := strconv.Atoi(n)
		if err != nil || i < 0 || i >= len(list) {
			return nil, fmt.Errorf("%w: no %q, there is: %s", ErrNotFound, ref, repoTags(list))
		}
		return list[i : i+1], nil
	}
	if ref == "" {
		other := func(e dockerEntry) bool { return !e.sameImage(list[0]) && !e.sharesTag(list[0]) }
		if len(list) == 0 || slices.ContainsFunc(list, other) {
			return nil, fmt.Errorf("%w: no reference given and %d images: %s", ErrNotFound, len(list), repoTags(list))
		}
		return list, nil
	}
	var found []dockerEntry
	for _, e := range list {
		if e.has(ref) {
			found = append(found, e)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%w: no %q, there is: %s", ErrNotFound, ref, repoTags(list))
	}
	return found, nil
}

func (e dockerEntry) has(ref string) bool {
	return slices.ContainsFunc(e.RepoTags, func(t string) bool { return normal(t) == normal(ref) })
}

func (e dockerEntry) sameImage(other dockerEntry) bool {
	return key(e.Config) == key(other.Config) && slices.Equal(e.Layers, other.Layers)
}

func (e dockerEntry) sharesTag(other dockerEntry) bool {
	return slices.ContainsFunc(other.RepoTags, e.has)
}

// repoTags lists the images for a message.
func repoTags(list []dockerEntry) string {
	var s []string
	for _, e := range list {
		text := fmt.Sprintf("@%d", e.index)
		for _, t := range e.RepoTags {
			text += fmt.Sprintf(" %q", t)
		}
		s = append(s, text)
	}
	if len(s) == 0 {
		return "nothing"
	}
	return capped(s, ", ")
}
