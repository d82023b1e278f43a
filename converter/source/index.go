package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// imageName is the annotation in which containerd stores the complete name of an image.
const imageName = "io.containerd.image.name"

// nameOf returns the name of an entry of index.json: containerd's annotation, which includes the
// repository, else that of the specification.
func nameOf(d ocispec.Descriptor) string {
	if n := d.Annotations[imageName]; n != "" {
		return n
	}
	return d.Annotations[ocispec.AnnotationRefName]
}

// fromIndexFile finds an image through the index.json of a layout.
func fromIndexFile(ctx context.Context, r io.Reader, store blobs, tag string, p Platform) (*Image, error) {
	index, err := readIndexFile(r)
	if err != nil {
		return nil, err
	}
	list, err := pick(index.Manifests, tag)
	if err != nil {
		return nil, err
	}
	if list == nil {
		return byDigest(ctx, store, index.Manifests, digest.Digest(tag), p)
	}
	if len(list) == 1 {
		return resolve(ctx, store, list[0], p)
	}
	img, err := among(ctx, store, list, p)
	if errors.Is(err, errTooMany) && tag == "" {
		return nil, fmt.Errorf("%w: no tag given, and %w: %s", ErrNotFound, err, names(list))
	}
	return img, err
}

func readIndexFile(r io.Reader) (*ocispec.Index, error) {
	doc, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err != nil {
		return nil, err
	}
	if len(doc) > maxDocument {
		return nil, fmt.Errorf("%s: more than %d bytes", ocispec.ImageIndexFile, maxDocument)
	}
	index := new(ocispec.Index)
	if err := decode(doc, index); err != nil {
		return nil, fmt.Errorf("%s: %w", ocispec.ImageIndexFile, err)
	}
	return index, nil
}

// pick finds the entries of an index.json that a tag or digest names, or all without a tag. It returns
// nil for a digest that only nested indexes can contain.
func pick(list []ocispec.Descriptor, tag string) ([]ocispec.Descriptor, error) {
	if len(list) == 0 {
		return nil, fmt.Errorf("%w: the index is empty", ErrNotFound)
	}
	if tag == "" {
		return distinct(list), nil
	}
	if isDigest(tag) {
		for _, d := range list {
			if string(d.Digest) == tag {
				return []ocispec.Descriptor{d}, nil
			}
		}
		return nil, nil
	}
	for _, same := range []func(d ocispec.Descriptor) bool{
		func(d ocispec.Descriptor) bool { return nameOf(d) == tag },
		func(d ocispec.Descriptor) bool { return d.Annotations[ocispec.AnnotationRefName] == tag },
		func(d ocispec.Descriptor) bool { return nameOf(d) != "" && normal(nameOf(d)) == normal(tag) },
	} {
		var named []ocispec.Descriptor
		for _, d := range list {
			if same(d) {
				named = append(named, d)
			}
		}
		if len(named) > 0 {
			return distinct(named), nil
		}
	}
	return nil, fmt.Errorf("%w: no tag %q, there is: %s", ErrNotFound, tag, names(list))
}

// distinct removes entries that only give another name to an earlier one, for the same platform.
func distinct(list []ocispec.Descriptor) []ocispec.Descriptor {
	seen := map[string]bool{}
	return slices.DeleteFunc(slices.Clone(list), func(d ocispec.Descriptor) bool {
		key := string(d.Digest)
		if declared(d) {
			key += platformName(*d.Platform)
		}
		was := seen[key]
		seen[key] = true
		return was
	})
}

// names lists the names of the entries of an index.json for a message.
func names(list []ocispec.Descriptor) string {
	var s []string
	for _, d := range list {
		if n := nameOf(d); n != "" {
			s = append(s, fmt.Sprintf("%q", n))
		}
	}
	if s = slices.Compact(s); len(s) == 0 {
		return "no tags"
	}
	return capped(s, ", ")
}

// byDigest finds a manifest in an index nested in index.json.
func byDigest(
	ctx context.Context, store blobs, list []ocispec.Descriptor, want digest.Digest, p Platform,
) (*Image, error) {
	s := newSearch(newFinder(store), p)
	if err := s.expand(ctx, list, "", 0); err != nil {
		return nil, err
	}
	for _, c := range s.found {
		if c.desc.Digest == want {
			return resolve(ctx, store, c.desc, p)
		}
	}
	var have []string
	for _, d := range list {
		have = append(have, d.Digest.String())
	}
	return nil, fmt.Errorf("%w: the index has no digest %q, it has: %s",
		ErrNotFound, want, capped(have, ", "))
}

// among finds the image among several entries of index.json. They may be one image for several
// platforms, or an image and its attachments. Entries with different names are different images; the
// platform does not decide between them.
func among(ctx context.Context, store blobs, list []ocispec.Descriptor, p Platform) (*Image, error) {
	s := newSearch(newFinder(store), p)
	for _, d := range list {
		if err := s.expand(ctx, []ocispec.Descriptor{d}, nameOf(d), 0); err != nil {
			return nil, err
		}
	}
	images, err := s.named(ctx)
	if err != nil {
		return nil, err
	}
	if len(images) > 1 {
		return nil, fmt.Errorf("%w: no tag given and several images: %s", ErrNotFound, capped(images, ", "))
	}
	if !p.explicit && s.alone(list) {
		img, err := s.image(ctx, s.found[0].desc)
		if errors.Is(err, errMissing) {
			_, why := s.passedOver()
			return nil, fmt.Errorf("%w%s", err, why)
		}
		return img, err
	}
	return s.choose(ctx)
}

// alone reports whether there is only one image and index.json lists it directly. Like a single entry
// of index.json, it is then accepted for any platform.
func (s *search) alone(list []ocispec.Descriptor) bool {
	for _, p := range s.passed {
		if !errors.Is(p.why, ErrMediaType) { // a missing manifest may be the image for the platform
			return false
		}
	}
	return len(s.found) == 1 && slices.ContainsFunc(list, func(d ocispec.Descriptor) bool {
		return d.Digest == s.found[0].desc.Digest
	})
}

// named returns the quoted names of the images. It removes candidates that are not images.
func (s *search) named(ctx context.Context) ([]string, error) {
	var images []string
	var kept []candidate
	for _, c := range s.found {
		_, err := s.manifest(ctx, c.desc)
		if err != nil && !unusable(err) {
			return nil, err
		}
		if errors.Is(err, ErrMediaType) {
			s.pass(c.desc, err)
			continue
		}
		kept = append(kept, c)
		if q := fmt.Sprintf("%q", c.name); err == nil && c.name != "" && !slices.Contains(images, q) {
			images = append(images, q)
		}
	}
	s.found = kept
	return images, nil
}

// ParseIndex decodes an index of the given media type. It refuses one that is also a manifest.
func ParseIndex(p []byte, mediaType string) (ocispec.Index, error) {
	var index ocispec.Index
	if !isIndex(mediaType) {
		return index, fmt.Errorf("%w %q: expected an OCI or Docker index", ErrMediaType, mediaType)
	}
	return index, unmarshal(p, mediaType, &index)
}

// IsIndex reports whether a media type is that of an index.
func IsIndex(mediaType string) bool { return isIndex(mediaType) }
