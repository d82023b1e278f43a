package source

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
)

// offer adds images for platforms. The contents of each are its platform.
func offer(t *testing.T, l *ocitest.Layout, list string) (ds []ocispec.Descriptor) {
	t.Helper()
	for _, s := range strings.Fields(list) {
		p, err := platforms.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		ds = append(ds, l.Manifest(p, oneFile(strings.ReplaceAll(s, "/", "-"))))
	}
	return ds
}

// TestVariants checks the selection among variants, and that containerd selects the same where it
// selects any. A "+" marks the platform of a machine, with the variant of its processor after "@".
func TestVariants(t *testing.T) {
	const (
		all = "linux/386 linux/amd64/v4 linux/amd64/v3 linux/amd64/v2 linux/amd64 linux/arm64/v9 linux/arm64 " +
			"linux/arm/v8 linux/arm/v5 linux/arm/v7 linux/arm/v6"
		windows = "windows(10.0.17763.1)/amd64 windows(10.0.20348.2)/amd64 linux/amd64"
		builds  = "windows(10.0.20348.1)/amd64 windows(10.0.20348.2)/amd64"
	)
	for _, c := range []struct {
		offer, ask, want string
		ours             bool // containerd takes none, or the first one it meets
	}{
		{all, "linux/amd64", "linux/amd64", false},
		{all, "linux/x86_64", "linux/amd64", false},
		{all, "amd64", "linux/amd64", false},
		{all, "linux/amd64/v1", "linux/amd64", false},
		{all, "linux/amd64/v2", "linux/amd64/v2", false},
		{all, "linux/amd64/v3", "linux/amd64/v3", false},
		{all, "linux/386", "linux/386", false},
		{all, "linux/arm64", "linux/arm64", false},
		{all, "linux/arm64/v8", "linux/arm64", false},
		{all, "linux/arm64/v9", "linux/arm64/v9", false},
		{all, "linux/aarch64", "linux/arm64", false},
		{all, "linux/arm", "linux/arm/v7", false},
		{all, "linux/arm/v6", "linux/arm/v6", false},
		{all, "linux/armhf", "linux/arm/v7", false},
		{all, "linux/armel", "linux/arm/v6", false},

		{"linux/amd64/v3 linux/amd64/v2", "linux/amd64", "linux/amd64/v2", true},
		{"linux/amd64/v3", "linux/amd64", "linux/amd64/v3", true},
		{"linux/amd64/v3 linux/386", "linux/amd64/v2", "", false},
		{"linux/amd64/v2", "linux/amd64/v1", "", false},
		{"linux/amd64", "linux/amd64/v3", "", false},
		{"linux/arm/v5 linux/arm/v6", "linux/arm", "linux/arm/v6", true},
		{"linux/arm/v8 linux/arm/v5", "linux/arm", "linux/arm/v5", true},
		{"linux/arm64/v9 linux/arm64/v8.2", "linux/arm64", "linux/arm64/v8.2", true},
		{"linux/arm64", "linux/arm64/v9", "", false},
		{"linux/s390x", "linux/s390x", "linux/s390x", false},

		{"linux(+erofs)/amd64 linux/amd64", "linux/amd64", "linux/amd64", false},
		{"linux(+erofs)/amd64", "linux/amd64", "", false},
		{"linux/amd64 linux(+erofs)/amd64", "linux(+erofs)/amd64", "linux(+erofs)/amd64", false},
		{"linux(+a)/amd64 linux(+a+b)/amd64 linux(+c)/amd64", "linux(+a+b)/amd64", "linux(+a+b)/amd64", false},
		{"linux(+a)/amd64", "linux(+a+b)/amd64", "linux(+a)/amd64", false},
		{windows, "windows(10.0.17763.5)/amd64", "windows(10.0.17763.1)/amd64", false},
		{windows, "windows(10.0.20348)/amd64", "windows(10.0.20348.2)/amd64", false},
		{builds, "windows(10.0.20348.2)/amd64", "windows(10.0.20348.2)/amd64", true},
		{windows, "linux/amd64", "linux/amd64", false},
		{"linux(5.10)/amd64 linux(6.6)/amd64", "linux(6.6)/amd64", "linux(6.6)/amd64", true},
		{"linux(6.6)/amd64 linux(5.10)/amd64", "linux(6.6)/amd64", "linux(6.6)/amd64", true},

		{all, "+linux/amd64@v1", "linux/amd64", false},
		{all, "+linux/amd64@v3", "linux/amd64", false}, // like containerd, so that containers share it
		{"linux/386 linux/amd64/v2 linux/amd64/v3 linux/amd64/v4", "+linux/amd64@v3", "linux/amd64/v3", true},
		{"linux/386 linux/amd64/v2 linux/amd64/v4", "+linux/amd64@v3", "linux/amd64/v2", true},
		{"linux/amd64/v2 linux/386 linux/amd64/v4", "+linux/amd64@v1", "linux/386", false},
		{"linux/amd64/v3", "+linux/amd64@v2", "", false},
		{all, "+linux/arm64@", "linux/arm64", false},
		{"linux/arm/v6 linux/arm/v7 linux/amd64", "+linux/arm64@", "linux/arm/v7", false},
		{all, "+linux/arm/v6@", "linux/arm/v6", false},
		{"linux/arm/v5 linux/arm/v7", "+linux/arm/v6@", "linux/arm/v5", false},
	} {
		l := ocitest.NewLayout(t, t.TempDir())
		ds := offer(t, l, c.offer)
		index := l.Index(ds...)
		l.Tag("", index)
		var p Platform
		var oracle platforms.MatchComparer
		if machine, ok := strings.CutPrefix(c.ask, "+"); ok {
			name, variant, _ := strings.Cut(machine, "@")
			spec := platforms.MustParse(name)
			p, oracle = hostOf(platforms.Normalize(spec), variant), platforms.Only(spec)
		} else {
			var err error
			if p, err = ParsePlatform(c.ask); err != nil {
				t.Fatal(err)
			}
			oracle = platforms.OnlyStrict(platforms.MustParse(c.ask))
		}
		offered := strings.Fields(c.offer)
		want := ocispec.Descriptor{}
		if i := slices.Index(offered, c.want); i >= 0 {
			want = ds[i]
		}
		img, err := mustParse(t, "oci:"+l.Dir, Config{}).Image(t.Context(), p)
		switch {
		case c.want == "" && (!errors.Is(err, ErrPlatform) || !strings.Contains(err.Error(), slices.Max(offered))):
			t.Errorf("%s of %s: found %+v (%v), expected none, and what there is", c.ask, c.offer, img, err)
		case c.want != "" && (err != nil || img.Digest != want.Digest || platforms.FormatAll(img.Platform) != c.want):
			t.Errorf("%s of %s: found %+v (%v), expected %s", c.ask, c.offer, img, err, c.want)
		}
		if c.ours {
			continue
		}
		cs, err := local.NewStore(l.Dir)
		if err != nil {
			t.Fatal(err)
		}
		m, err := images.Manifest(t.Context(), cs, index, oracle)
		if c.want == "" && err == nil || c.want != "" &&
			(err != nil || jsonOf(t, m) != jsonOf(t, manifestOf(t, l, want))) {
			t.Errorf("%s of %s: containerd finds %+v (%v), expected %s", c.ask, c.offer, m.Layers, err, c.want)
		}
	}
}

func manifestOf(t *testing.T, l *ocitest.Layout, d ocispec.Descriptor) (m ocispec.Manifest) {
	t.Helper()
	if err := json.Unmarshal(l.Read(d.Digest), &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func jsonOf(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestAmbiguous: if the platform does not decide, the error names the candidates and their differences.
func TestAmbiguous(t *testing.T) {
	for _, c := range []struct{ offer, ask, differ string }{
		{"linux/amd64 linux/arm64 linux/amd64", "linux/amd64", "for linux/amd64"},
		{"linux/amd64 linux/amd64", "", "for linux/amd64"},
		{"linux/amd64/v2 linux/amd64/v2", "linux/amd64", "for linux/amd64/v2"},
		{"windows(10.0.17763.1)/amd64 windows(10.0.20348.2)/amd64", "windows/amd64", "for windows(10.0.20348.2)/amd64"},
		{"linux(5.10)/amd64 linux(6.6)/amd64", "linux/amd64", "for linux(6.6)/amd64"},
		{"linux(+a)/amd64 linux(+b)/amd64", "linux(+a+b)/amd64", "for linux(+b)/amd64"},
	} {
		for _, silent := range []bool{false, true} {
			l := ocitest.NewLayout(t, t.TempDir())
			ds := offer(t, l, c.offer)
			for i, d := range ds { // one more file makes it another image
				ds[i] = l.Manifest(*d.Platform, oneFile("a"), oneFile(fmt.Sprint(i)))
				if silent && d.Platform.OSVersion == "" {
					ds[i].Platform = nil
				}
			}
			l.Tag("index", l.Index(ds...))
			for _, d := range ds {
				l.Tag("tag", d)
			}
			for _, tag := range []string{":index", ":tag", ""} {
				src := "oci:" + l.Dir
				if tag == "" {
					src = "oci:" + layoutOf(t, l, ds...)
				}
				_, err := find(t, mustParse(t, src+tag, Config{}), c.ask)
				first, last := string(ds[0].Digest), string(ds[len(ds)-1].Digest)
				if !errors.Is(err, ErrAmbiguous) || !strings.Contains(err.Error(), c.differ) ||
					!strings.Contains(err.Error(), first) || !strings.Contains(err.Error(), last) {
					t.Errorf("%s of %s in %s: error %v, expected %v with all of them", c.ask, c.offer, src+tag,
						err, ErrAmbiguous)
				}
				// The advice of the error works.
				img, err := find(t, mustParse(t, src+"@"+first, Config{}), c.ask)
				if err != nil || img.Digest != ds[0].Digest {
					t.Errorf("by its digest: found %+v (%v), expected %s", img, err, ds[0].Digest)
				}
			}
		}
	}
}

// TestPackedTwice: one image in two forms is not ambiguous.
func TestPackedTwice(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	gz := l.Manifest(platform("amd64", ""), oneFile("a"))
	y := oneFile("a")
	y.Compression = ocitest.Zstd
	zs := l.Manifest(platform("amd64", ""), y)
	docker := remade(t, l, gz, dockerManifest, func(*ocispec.Manifest) {})
	docker.Platform = gz.Platform
	l.Tag("tag", gz)
	l.Tag("tag", zs)
	l.Tag("tag", docker)
	l.Tag("index", l.Index(gz, zs, docker, gz))
	for _, src := range []string{"oci:" + l.Dir + ":index", "oci:" + l.Dir + ":tag"} {
		if img, err := find(t, mustParse(t, src, Config{}), ""); err != nil || img.Digest != gz.Digest {
			t.Errorf("%s: found %+v (%v), expected %s", src, img, err, gz.Digest)
		}
	}
}

// TestTagOfSeveral: one tag on several entries is one image for several platforms; two names are two images.
func TestTagOfSeveral(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	amd, arm := l.Manifest(platform("amd64", ""), oneFile("a")), l.Manifest(platform("arm64", ""), oneFile("b"))
	signature := artifact(l, ocispec.MediaTypeImageConfig, "application/vnd.dev.cosign.simplesigning.v1+json")
	entry := func(d ocispec.Descriptor, ref, name string) ocispec.Descriptor {
		d.Annotations = map[string]string{}
		if ref != "" {
			d.Annotations[ocispec.AnnotationRefName] = ref
		}
		if name != "" {
			d.Annotations[imageName] = name
		}
		return d
	}
	silent := func(d ocispec.Descriptor) ocispec.Descriptor { d.Platform = nil; return d }
	const x, y = "docker.io/library/x:latest", "docker.io/library/y:latest"
	other := l.Manifest(platform("amd64", ""), oneFile("c"))
	gone := amd
	gone.Digest = digest.FromString("gone")
	type list = []ocispec.Descriptor
	type asks map[string]any
	for name, c := range map[string]struct {
		list []ocispec.Descriptor
		want asks // by "TAG PLATFORM": a descriptor, or part of an error
	}{
		"platforms": {
			list{entry(arm, "v1", ""), entry(amd, "v1", "")},
			asks{
				":v1 linux/amd64": amd, ":v1 linux/arm64": arm, " linux/amd64": amd, " linux/arm64": arm,
				":v1 linux/s390x":                         "linux/amd64, linux/arm64",
				"@" + string(arm.Digest) + " linux/arm64": arm,
				"@" + string(arm.Digest) + " linux/amd64": "the image is for linux/arm64",
			},
		},
		"platforms in the configurations": {
			list{entry(silent(arm), "v1", ""), entry(silent(amd), "v1", "")},
			asks{
				":v1 linux/amd64": amd, ":v1 linux/arm64": arm, " linux/amd64": amd, " linux/arm64": arm,
			},
		},
		"two names of one": {
			list{entry(amd, "a:1", ""), entry(amd, "a:2", "")},
			asks{
				" ": amd, ":a:2 ": amd, ":a:1 linux/amd64": amd, ":a:3 ": `"a:1", "a:2"`,
			},
		},
		"two names of one for two platforms": {
			list{entry(amd, "a", ""), entry(arm, "a", ""), entry(amd, "b", ""), entry(arm, "b", "")},
			asks{
				" linux/arm64": arm, ":b linux/arm64": arm, ":a linux/amd64": amd,
			},
		},
		"two images": {
			list{entry(amd, "a", ""), entry(arm, "b", "")},
			asks{
				" linux/arm64": `several images: "a", "b"`, ":b ": arm,
				":a linux/arm64": "the image is for linux/amd64",
			},
		},
		"a signature with a tag": {
			list{entry(silent(signature), "sha256-1.sig", ""), entry(silent(amd), "v1", "")},
			asks{
				" ": amd, " linux/amd64": amd, ":v1 ": amd, ":sha256-1.sig ": "this is not a container image",
			},
		},
		"a signature of what is for another machine": {
			list{entry(silent(signature), "sha256-1.sig", ""), entry(silent(arm), "v1", "")},
			asks{
				" ": arm, " linux/arm64": arm, " linux/s390x": "the index has linux/arm64",
			},
		},
		"a signature under the same tag": {
			list{entry(signature, "v1", ""), entry(amd, "v1", ""), entry(arm, "v1", "")},
			asks{
				":v1 linux/amd64": amd, ":v1 linux/arm64": arm,
			},
		},
		"names of containerd": {
			list{entry(amd, "latest", x), entry(arm, "latest", x)},
			asks{
				":latest linux/amd64": amd, ":x linux/arm64": arm, ":x:latest linux/arm64": arm,
				":docker.io/x linux/amd64": amd,
				":" + x + " linux/arm64":   arm,
			},
		},
		"one tag of two names": {
			list{entry(amd, "latest", x), entry(other, "latest", y)},
			asks{
				":latest ": `several images: "` + x + `", "` + y + `"`, ":x ": amd, ":y ": other, " ": "several images",
			},
		},
		"one tag of two images": {
			list{entry(amd, "v1", ""), entry(other, "v1", "")},
			asks{
				":v1 ": "several images for linux/amd64", " ": "several images for linux/amd64",
				"@" + string(other.Digest) + " ": other,
			},
		},
		"the platform that is missing": {
			list{entry(arm, "v1", ""), entry(gone, "v1", "")},
			asks{
				":v1 linux/arm64": arm, ":v1 linux/amd64": string(gone.Digest), " linux/amd64": string(gone.Digest),
			},
		},
		"nothing": {
			nil,
			asks{" ": "the index is empty", ":v1 ": "the index is empty"},
		},
	} {
		dir := layoutOf(t, l, c.list...)
		for ask, want := range c.want {
			tag, p, _ := strings.Cut(ask, " ")
			img, err := find(t, mustParse(t, "oci:"+dir+tag, Config{}), p)
			switch want := want.(type) {
			case ocispec.Descriptor:
				if err != nil || img.Digest != want.Digest {
					t.Errorf("%s, %q: found %+v (%v), expected %s", name, ask, img, err, want.Digest)
				}
			case string:
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%s, %q: found %+v (%v), expected an error that says %q", name, ask, img, err, want)
				}
			}
		}
	}
}

// TestOtherDigests: a manifest whose digest is a SHA-512.
func TestOtherDigests(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	m := l.Manifest(platform("amd64", ""), oneFile("a"))
	b := l.Read(m.Digest)
	m.Digest = digest.SHA512.FromBytes(b)
	err := errors.Join(os.Mkdir(l.Dir+"/blobs/sha512", 0o755), os.WriteFile(l.BlobPath(m.Digest), b, 0o644))
	if err != nil {
		t.Fatal(err)
	}
	for _, root := range []ocispec.Descriptor{m, l.Index(m)} {
		dir := layoutOf(t, l, root)
		for _, ref := range []string{"", "@" + string(m.Digest)} {
			img, err := find(t, mustParse(t, "oci:"+dir+ref, Config{}), "linux/amd64")
			if err != nil || img.Digest != m.Digest {
				t.Errorf("%q: found %+v (%v), expected %s", ref, img, err, m.Digest)
			}
		}
	}
}

// TestUnknownPlatforms: an image without any declared platform is taken, unless a platform is requested.
func TestUnknownPlatforms(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	img := l.Manifest(ocispec.Platform{}, oneFile("a"))
	img.Platform = nil
	l.Tag("index", l.Index(artifact(l, ocispec.MediaTypeImageConfig, "text/plain"), img))
	l.Tag("one", img)
	arm := l.Manifest(platform("arm64", ""), oneFile("b"))
	l.Tag("other", l.Index(img, arm))
	for _, tag := range []string{"index", "one"} {
		if got, err := find(t, mustParse(t, "oci:"+l.Dir+":"+tag, Config{}), ""); err != nil ||
			got.Digest != img.Digest {
			t.Errorf("%s: found %+v (%v), expected %s", tag, got, err, img.Digest)
		}
		_, err := find(t, mustParse(t, "oci:"+l.Dir+":"+tag, Config{}), "linux/amd64")
		if !errors.Is(err, ErrPlatform) || !strings.Contains(err.Error(), "unknown") {
			t.Errorf("%s: error %v, expected %v", tag, err, ErrPlatform)
		}
	}
	if _, err := find(t, mustParse(t, "oci:"+l.Dir+":other", Config{}), ""); !errors.Is(err, ErrPlatform) {
		t.Errorf("error %v, expected %v", err, ErrPlatform)
	}
}
