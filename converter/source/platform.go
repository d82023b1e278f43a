package source

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Platform chooses among the images of an index.
type Platform struct {
	match    platforms.MatchComparer
	name     string
	explicit bool
}

// Host chooses what this machine can run, as containerd does. An image that is no index is taken whatever it is for:
// converting runs nothing of it.
func Host() Platform {
	return Platform{match: platforms.Default(), name: platforms.Format(platforms.DefaultSpec())}
}

// ParsePlatform chooses exactly one platform, written like linux/arm64 or linux/arm/v7. An empty string means Host.
func ParsePlatform(s string) (Platform, error) {
	if s == "" {
		return Host(), nil
	}
	p, err := platforms.Parse(s)
	if err != nil {
		return Platform{}, fmt.Errorf("platform %q: %w", s, err)
	}
	return Platform{match: platforms.OnlyStrict(p), name: platforms.Format(p), explicit: true}, nil
}

// String is the platform in the form os/architecture[/variant].
func (p Platform) String() string { return p.name }

// choose returns the best of the manifests for the platform.
func (p Platform) choose(candidates []ocispec.Descriptor) (ocispec.Descriptor, error) {
	var found []ocispec.Descriptor
	var names []string
	for _, d := range candidates {
		if d.Platform == nil {
			continue
		}
		// Attestations stand in an index as images for a platform that does not exist.
		if d.Platform.OS == "unknown" {
			continue
		}
		names = append(names, platforms.Format(*d.Platform))
		// OS features name what a plain tar image never needs, for instance layers that are EROFS images.
		if p.match.Match(*d.Platform) && (len(d.Platform.OSFeatures) == 0 || d.Platform.OS == "windows") {
			found = append(found, d)
		}
	}
	if len(names) == 0 {
		return ocispec.Descriptor{}, fmt.Errorf("%w %s: the index has no container image", ErrPlatform, p.name)
	}
	if len(found) == 0 {
		slices.Sort(names)
		return ocispec.Descriptor{}, fmt.Errorf("%w %s: the index has %s; choose one with --platform",
			ErrPlatform, p.name, strings.Join(slices.Compact(names), ", "))
	}
	slices.SortStableFunc(found, func(a, b ocispec.Descriptor) int {
		switch {
		case p.match.Less(*a.Platform, *b.Platform):
			return -1
		case p.match.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	return found[0], nil
}

// accept tells whether an image that was found without an index may be used.
func (p Platform) accept(img ocispec.Platform) error {
	if p.explicit && !p.match.Match(img) {
		return fmt.Errorf("%w %s: the image is for %s", ErrPlatform, p.name, platforms.Format(img))
	}
	return nil
}
