package source

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
)

// candidate is a manifest in an index that may belong to the image.
type candidate struct {
	desc ocispec.Descriptor
	name string // of the entry of index.json that led to it, or empty
	// platform comes from the index, else from the configuration.
	platform ocispec.Platform
}

// passed is a manifest that is not the image, with the reason.
type passed struct {
	desc ocispec.Descriptor
	why  error
}

// search finds the image for a platform among the manifests of indexes. The indexes may also list
// signatures, attestations, other artifacts, and missing manifests.
type search struct {
	*finder
	platform Platform
	found    []candidate
	passed   []passed
	seen     map[string]bool // indexes, and manifests by digest, platform and name
}

func newSearch(b *finder, p Platform) *search {
	return &search{finder: b, platform: p, seen: map[string]bool{}}
}

// declared reports whether an index gives a platform for a manifest. Some tools write empty platforms.
func declared(d ocispec.Descriptor) bool {
	return d.Platform != nil && d.Platform.OS != "" && d.Platform.Architecture != ""
}

// attestationType is BuildKit's annotation of a manifest that belongs to another one in the index.
const attestationType = "vnd.docker.reference.type"

// expand adds the manifests of an index and of its nested indexes. It skips unusable ones.
func (s *search) expand(ctx context.Context, list []ocispec.Descriptor, name string, depth int) error {
	for _, d := range list {
		if err := s.add(ctx, d, name, depth); err != nil {
			if !unusable(err) {
				return err
			}
			s.pass(d, err)
		}
	}
	return nil
}

// unusable reports whether an error is a permanent one of a single manifest: the search goes on
// without it. Any other error ends the search, because a later search could find another image.
func unusable(err error) bool {
	return errors.Is(err, errMissing) || errors.Is(err, errDamaged) || errors.Is(err, ErrMediaType) ||
		errors.Is(err, blob.ErrMismatch)
}

func (s *search) pass(d ocispec.Descriptor, why error) { s.passed = append(s.passed, passed{d, why}) }

func (s *search) add(ctx context.Context, d ocispec.Descriptor, name string, depth int) error {
	if t := d.Annotations[attestationType]; t != "" {
		return fmt.Errorf("%w: an %s", errArtifact, t)
	}
	if declared(d) && (d.Platform.OS == "unknown" || d.Platform.Architecture == "unknown") {
		return fmt.Errorf("%w: for the platform %s, as attestations are", errArtifact, platforms.FormatAll(*d.Platform))
	}
	d, err := s.typed(ctx, d)
	if err != nil {
		return err
	}
	key := string(d.Digest) + " " + name
	if declared(d) {
		key += " " + platforms.FormatAll(*d.Platform)
	}
	if s.seen[key] {
		return nil
	}
	s.seen[key] = true
	switch {
	case isIndex(d.MediaType):
		if depth > maxNesting {
			return fmt.Errorf("%w: more than %d indexes within each other", errDamaged, maxNesting)
		}
		inner, err := s.index(ctx, d)
		if err != nil {
			return err
		}
		return s.expand(ctx, inner, name, depth+1)
	case !isManifest(d.MediaType):
		return notManifest(d)
	case declared(d):
		s.found = append(s.found, candidate{desc: d, name: name, platform: *d.Platform})
		return nil
	}
	m, err := s.manifest(ctx, d)
	if err != nil {
		return err
	}
	img, err := s.config(ctx, m) // it contains the platform
	if err != nil {
		return err
	}
	s.found = append(s.found, candidate{desc: d, name: name, platform: img.Platform})
	return nil
}

// choose returns the image for the platform. Equally suitable candidates must be the same image.
func (s *search) choose(ctx context.Context) (*Image, error) {
	for _, rank := range s.platform.rank(s.found) {
		if img, err := s.only(ctx, rank); img != nil || err != nil {
			return img, err
		}
	}
	return nil, s.noImage()
}

// only returns the only image among candidates of one rank, or nil if none is an image.
func (s *search) only(ctx context.Context, rank []candidate) (*Image, error) {
	images := map[digest.Digest]candidate{} // by configuration: one image may be packed in several ways
	var order []candidate
	var missing error
	for _, c := range rank {
		m, err := s.manifest(ctx, c.desc)
		if err == nil {
			_, err = s.config(ctx, m)
		}
		if errors.Is(err, errMissing) {
			missing = err
		}
		if errors.Is(err, errMissing) || errors.Is(err, ErrMediaType) {
			s.pass(c.desc, err)
			continue
		}
		if err != nil {
			return nil, err
		}
		if _, ok := images[m.Config.Digest]; !ok {
			images[m.Config.Digest] = c
			order = append(order, c)
		}
	}
	switch {
	case len(order) > 1:
		return nil, ambiguous(s.platform, order)
	case len(order) == 1:
		return s.image(ctx, order[0].desc)
	case missing != nil: // the best match is missing: do not silently take a worse one
		_, why := s.passedOver()
		return nil, fmt.Errorf("%w (the index lists it for %s)%s%s", missing, s.platform.name, others(s.found), why)
	}
	return nil, nil
}

// ambiguous returns the error for several images of one rank.
func ambiguous(p Platform, images []candidate) error {
	var list []string
	for _, c := range images {
		text := fmt.Sprintf("%s for %s", c.desc.Digest, platformName(c.platform))
		if c.name != "" {
			text += fmt.Sprintf(" (%q)", c.name)
		}
		list = append(list, text)
	}
	return fmt.Errorf("%w for %s: %s; "+
		"choose one by its digest (@DIGEST), or by its exact --platform where that differs",
		ErrAmbiguous, p.name, capped(list, ", "))
}

// platformName returns a platform with all its distinguishing parts.
func platformName(p ocispec.Platform) string {
	if p.OS == "" || p.Architecture == "" {
		return "an unknown platform"
	}
	return platforms.FormatAll(p)
}

// others lists the available platforms for a message.
func others(all []candidate) string {
	var names []string
	for _, c := range all {
		names = append(names, platformName(c.platform))
	}
	slices.Sort(names)
	if names = slices.Compact(names); len(names) == 0 {
		return ""
	}
	return fmt.Sprintf(": the index has %s; choose one with --platform", capped(names, ", "))
}

// noImage returns the error for a search without a result.
func (s *search) noImage() error {
	e := &noImageError{msg: fmt.Sprintf("%v %s", ErrPlatform, s.platform.name)}
	if o := others(s.found); o != "" {
		e.msg += o
	} else {
		e.msg += ": the index has no container image"
	}
	why, text := s.passedOver()
	e.why, e.msg = why, e.msg+text
	return e
}

// passedOver returns the reasons why manifests were skipped, also as the end of a message.
func (s *search) passedOver() (why []error, message string) {
	var list []string
	for _, p := range s.passed {
		why = append(why, p.why)
		text := p.why.Error()
		if !strings.Contains(text, string(p.desc.Digest)) || p.desc.Digest == "" {
			text = fmt.Sprintf("%s: %s", p.desc.Digest, text)
		}
		list = append(list, text)
	}
	if len(list) == 0 {
		return why, ""
	}
	return why, "; passed over: " + capped(list, "; ")
}

// noImageError wraps ErrPlatform and the reasons why manifests were skipped.
type noImageError struct {
	msg string
	why []error
}

func (e *noImageError) Error() string   { return e.msg }
func (e *noImageError) Unwrap() []error { return append([]error{ErrPlatform}, e.why...) }

// capped joins a list and cuts it: untrusted input determines its length.
func capped(list []string, sep string) string {
	const most = 20
	if len(list) > most {
		return fmt.Sprintf("%s%sand %d more", strings.Join(list[:most], sep), sep, len(list)-most)
	}
	return strings.Join(list, sep)
}
