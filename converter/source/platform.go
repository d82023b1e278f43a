package source

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/go-archvariant"
)

// Platform selects among the images of an index.
type Platform struct {
	match     platforms.MatchComparer
	name      string
	osVersion string // the requested one
	explicit  bool
}

// Host selects what this machine can run: the image that containerd takes, else the best one for the
// processor's variants. An image without an index is always accepted, because a conversion runs nothing of it.
func Host() Platform {
	spec := platforms.Normalize(platforms.DefaultSpec())
	return hostOf(spec, archvariant.AMD64Variant())
}

// hostOf is Host for a given machine. Containerd ignores the variant of an amd64 processor.
func hostOf(spec ocispec.Platform, amd64Variant string) Platform {
	p := Platform{match: platforms.Only(spec), name: platforms.FormatAll(spec)}
	if spec.Architecture == "amd64" {
		best := spec
		best.Variant = amd64Variant
		p.match = inOrder{platforms.OnlyStrict(spec), platforms.Only(best)}
	}
	return p
}

// ParsePlatform selects exactly one platform, written like linux/arm64, linux/arm/v7 or, where images
// differ in nothing else, linux(5.10+feature)/amd64. A platform without a variant means the image without
// one, else the one with the lowest variant, which most machines run. An empty string means Host.
func ParsePlatform(s string) (Platform, error) {
	if s == "" {
		return Host(), nil
	}
	spec, err := platforms.Parse(s)
	if err != nil {
		return Platform{}, fmt.Errorf("platform %q: %w", s, err)
	}
	p := Platform{
		match: platforms.OnlyStrict(spec), name: platforms.FormatAll(spec), osVersion: spec.OSVersion, explicit: true,
	}
	if spec.Variant == "" && strings.Count(s, "/") < 2 { // amd64/v1 is normalized to no variant
		order := inOrder{p.match}
		for _, v := range variants(spec.Architecture) {
			spec.Variant = v
			order = append(order, platforms.OnlyStrict(spec))
		}
		p.match = order
	}
	return p, nil
}

// variants returns the variants of an architecture other than its default, in order of preference.
func variants(arch string) (list []string) {
	switch arch {
	case "amd64":
		return []string{"v2", "v3", "v4"}
	case "arm":
		return []string{"v6", "v5", "v8"} // v7, the default, runs the first two
	case "arm64":
		for major, minors := range map[int]int{8: 9, 9: 7} {
			for minor := range minors + 1 {
				list = append(list, "v"+strconv.Itoa(major)+"."+strconv.Itoa(minor))
			}
		}
		slices.Sort(list)
	}
	return list
}

// inOrder matches if one of its members does; earlier members come first in its order.
type inOrder []platforms.MatchComparer

func (o inOrder) Match(p ocispec.Platform) bool {
	return slices.ContainsFunc(o, func(m platforms.MatchComparer) bool { return m.Match(p) })
}

func (o inOrder) Less(a, b ocispec.Platform) bool {
	for _, m := range o {
		if m.Match(a) || m.Match(b) {
			return m.Less(a, b)
		}
	}
	return false
}

// String returns the platform in the form os[(version+features)]/architecture[/variant].
func (p Platform) String() string { return p.name }

// rank groups the candidates for the platform by equal suitability, the best group first. If no
// candidate declares a platform and none was requested, all are equal.
func (p Platform) rank(all []candidate) (ranks [][]candidate) {
	silent := func(c candidate) bool { return c.platform.OS == "" || c.platform.Architecture == "" }
	if !p.explicit && !slices.ContainsFunc(all, func(c candidate) bool { return !silent(c) }) {
		return [][]candidate{all}
	}
	var matching []candidate
	for _, c := range all {
		if !silent(c) && p.match.Match(c.platform) {
			matching = append(matching, c)
		}
	}
	slices.SortStableFunc(matching, func(a, b candidate) int { return p.compare(a.platform, b.platform) })
	for i, c := range matching {
		if i == 0 || p.compare(matching[i-1].platform, c.platform) != 0 {
			ranks = append(ranks, nil)
		}
		ranks[len(ranks)-1] = append(ranks[len(ranks)-1], c)
	}
	return ranks
}

// compare uses containerd's order, then a match with the requested version of the operating system:
// containerd compares only versions of Windows, and those by compatibility.
func (p Platform) compare(a, b ocispec.Platform) int {
	switch {
	case p.match.Less(a, b):
		return -1
	case p.match.Less(b, a):
		return 1
	case p.osVersion != "" && a.OSVersion != b.OSVersion && a.OSVersion == p.osVersion:
		return -1
	case p.osVersion != "" && a.OSVersion != b.OSVersion && b.OSVersion == p.osVersion:
		return 1
	}
	return 0
}

// accept returns an error if an image found without an index must not be used.
func (p Platform) accept(img ocispec.Platform) error {
	if p.explicit && !p.match.Match(img) {
		return fmt.Errorf("%w %s: the image is for %s", ErrPlatform, p.name, platformName(img))
	}
	return nil
}
