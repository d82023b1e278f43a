package source

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
)

// layoutOf makes a layout with the blobs of l and another index.json.
func layoutOf(t *testing.T, l *ocitest.Layout, list ...ocispec.Descriptor) string {
	t.Helper()
	dir := t.TempDir()
	b, err := json.Marshal(ocispec.Index{Manifests: list})
	err = errors.Join(err, os.Symlink(l.Dir+"/blobs", dir+"/blobs"), os.WriteFile(dir+"/index.json", b, 0o644))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// remade adds a changed copy of the manifest d with another media type.
func remade(
	t *testing.T, l *ocitest.Layout, d ocispec.Descriptor, mediaType string, change func(*ocispec.Manifest),
) ocispec.Descriptor {
	t.Helper()
	var m ocispec.Manifest
	if err := json.Unmarshal(l.Read(d.Digest), &m); err != nil {
		t.Fatal(err)
	}
	m.MediaType = mediaType
	change(&m)
	return l.JSON(mediaType, m)
}

// TestConfigTypes: vague types of old registries and proxies are accepted; types of artifacts are not.
func TestConfigTypes(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	good := l.Manifest(platform("amd64", ""), oneFile("a"))
	empty := l.Manifest(platform("amd64", ""))
	for _, c := range []struct {
		config            string
		docker, oci, none bool // an image in a Docker manifest, in an OCI manifest, in an OCI manifest without layers
	}{
		{images.MediaTypeDockerSchema2Config, true, true, true},
		{ocispec.MediaTypeImageConfig, true, true, true},
		{ocispec.MediaTypeImageConfig + "; charset=utf-8", true, true, true},
		{"application/octet-stream", true, true, false},
		{"binary/octet-stream", true, true, false},
		{"application/json", true, true, false},
		{"application/json; charset=utf-8", true, true, false},
		{"text/html", true, true, false},
		{"text/html; charset=utf-8", true, true, false},
		{"text/plain", true, true, false},
		{"", true, true, false},
		{"application/vnd.docker.plugin.v1+json", false, false, false},
		{"application/vnd.cncf.helm.config.v1+json", false, false, false},
		{"application/vnd.unknown.config.v1+json", false, false, false},
		{ocispec.MediaTypeEmptyJSON, false, false, false},
	} {
		set := func(m *ocispec.Manifest) { m.Config.MediaType = c.config }
		for kind, d := range map[string]ocispec.Descriptor{
			"docker": remade(t, l, good, dockerManifest, set),
			"oci":    remade(t, l, good, ocispec.MediaTypeImageManifest, set),
			"none":   remade(t, l, empty, ocispec.MediaTypeImageManifest, set),
		} {
			want := map[string]bool{"docker": c.docker, "oci": c.oci, "none": c.none}[kind]
			for _, root := range []ocispec.Descriptor{d, l.Index(d)} {
				img, err := find(t, mustParse(t, "oci:"+layoutOf(t, l, root), Config{}), "linux/amd64")
				if want && (err != nil || img.Digest != d.Digest) || !want && !errors.Is(err, ErrMediaType) {
					t.Errorf("%q in %s by %s: found %+v (%v), expected an image: %v",
						c.config, kind, root.MediaType, img, err, want)
				}
			}
		}
	}
}

// artifact adds a manifest of an artifact.
func artifact(l *ocitest.Layout, config string, layers ...string) ocispec.Descriptor {
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	c := ocispec.Image{RootFS: ocispec.RootFS{Type: "layers"}}
	for i, t := range layers {
		d := l.Blob(t, fmt.Appendf(nil, "{%q:%d}", config, i))
		m.Layers = append(m.Layers, d)
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, d.Digest)
	}
	m.Config = l.JSON(config, c)
	return l.JSON(ocispec.MediaTypeImageManifest, m)
}

// beside returns manifests other than images, and what an error says of each.
func beside(t *testing.T, l *ocitest.Layout) (list []ocispec.Descriptor, why []string) {
	t.Helper()
	add := func(reason string, d ocispec.Descriptor) {
		list, why = append(list, d), append(why, reason)
	}
	const image = ocispec.MediaTypeImageConfig
	add("vnd.dev.cosign.simplesigning.v1+json", artifact(l, image, "application/vnd.dev.cosign.simplesigning.v1+json"))
	add("vnd.dsse.envelope.v1+json", artifact(l, image, "application/vnd.dsse.envelope.v1+json"))
	add("text/spdx+json", artifact(l, image, "text/spdx+json"))
	add("application/vnd.in-toto+json", artifact(l, image, "application/vnd.in-toto+json"))
	add("application/vnd.erofs.layer.v1", artifact(l, image, "application/vnd.erofs.layer.v1"))
	const wasm = "application/vnd.wasm.config.v1+json"
	add(wasm, artifact(l, wasm, "application/vnd.wasm.content.layer.v1+wasm"))
	add("vnd.cncf.notary.signature", artifact(l, "application/vnd.cncf.notary.signature", "application/jose+json"))
	const helm = "application/vnd.cncf.helm.config.v1+json"
	add(helm, artifact(l, helm, "application/vnd.cncf.helm.chart.content.v1.tar+gzip"))
	add("application/vnd.oci.empty.v1+json", artifact(l, ocispec.MediaTypeEmptyJSON, ocispec.MediaTypeEmptyJSON))
	add("application/x-wheel", artifact(l, image, ocispec.MediaTypeImageLayer, "application/x-wheel"))

	attestation := artifact(l, image, "application/vnd.in-toto+json", "application/vnd.in-toto+json")
	attestation.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	add("for the platform unknown/unknown", attestation)
	half := attestation
	half.Platform = &ocispec.Platform{OS: "linux", Architecture: "unknown"}
	add("for the platform linux/unknown", half)
	marked := artifact(l, image, "application/vnd.in-toto+json", "application/vnd.in-toto+json")
	marked.Platform = &ocitest.LinuxAMD64
	marked.Annotations = map[string]string{attestationType: "attestation-manifest"}
	add("an attestation-manifest", marked)
	amd := artifact(l, image, "application/vnd.cyclonedx+json")
	amd.Platform = &ocitest.LinuxAMD64 // as if it were an image for this platform
	add("application/vnd.cyclonedx+json", amd)

	add("application/vnd.example.sbom", l.Blob("application/vnd.example.sbom", []byte("{}")))
	add("expected an index or a manifest", l.Blob("", []byte("no JSON")))
	add("expected an index or a manifest", l.Blob("application/json", []byte(`{"some":"document"}`)))
	add("Docker schema 1", l.Blob(schema1+"+prettyjws", []byte(`{"schemaVersion":1}`)))
	add("Docker schema 1", l.Blob("text/plain", []byte(`{"schemaVersion":1}`)))
	add("as Docker schema 1", l.Blob(dockerManifest, []byte(`{"schemaVersion":1,"fsLayers":[]}`)))

	gone := func(mediaType, what string) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString(what), Size: 7}
	}
	add("no such file", gone(ocispec.MediaTypeImageManifest, "manifest"))
	add("no such file", gone(ocispec.MediaTypeImageIndex, "index"))
	add("no such file", gone("", "whatever"))
	s390x := gone(ocispec.MediaTypeImageManifest, "s390x")
	s390x.Platform = &ocispec.Platform{OS: "linux", Architecture: "s390x"}
	add("linux/s390x", s390x)
	noConfig := l.Manifest(platform("ppc64le", ""), oneFile("no config"))
	noConfig.Platform = nil
	noConfig = remade(t, l, noConfig, dockerManifest, func(m *ocispec.Manifest) {
		m.Config.Digest = digest.FromString("config")
	})
	add(digest.FromString("config").Encoded(), noConfig)

	add("invalid character", l.Blob(ocispec.MediaTypeImageManifest, []byte("{]")))
	add("found an index", remadeType(l.Index(), ocispec.MediaTypeImageManifest))
	short := l.Manifest(platform("mips64le", ""), oneFile("short"))
	short.Platform, short.Size = nil, short.Size-1
	add("size mismatch", short)
	changed := l.Manifest(platform("mips64le", ""), oneFile("changed"))
	changed.Platform = nil
	if err := os.WriteFile(l.BlobPath(changed.Digest), []byte(strings.Repeat(" ", int(changed.Size))),
		0o644); err != nil {
		t.Fatal(err)
	}
	add("digest mismatch", changed)
	add(`digest "sha256:../../x"`,
		ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: "sha256:../../x"})
	large := gone(ocispec.MediaTypeImageManifest, "large")
	large.Size = maxDocument + 1
	add("expected at most", large)
	deep := l.Index()
	for range maxNesting + 1 {
		deep = l.Index(deep)
	}
	add("indexes within each other", deep)
	encrypted := ocitest.Layer{Tar: []byte("secret"), MediaType: ocispec.MediaTypeImageLayer + "+encrypted"}
	secret := l.Manifest(platform("s390x", ""), encrypted)
	secret.Platform = nil
	add("linux/s390x", secret)
	add("", l.Index(list[0], attestation)) // of artifacts only
	return list, why
}

func remadeType(d ocispec.Descriptor, mediaType string) ocispec.Descriptor {
	d.MediaType = mediaType
	return d
}

// TestBesideAnImage: each other manifest alone and all together, before and behind an image, in
// index.json and in an index, with the platform in the index or only in the configuration.
func TestBesideAnImage(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	things, why := beside(t, l)
	img := l.Manifest(platform("amd64", ""), oneFile("a"))
	silent := img
	silent.Platform = nil
	check := func(name string, list ...ocispec.Descriptor) {
		t.Helper()
		for place, dir := range map[string]string{
			"index.json": layoutOf(t, l, list...), "index": layoutOf(t, l, l.Index(list...)),
			"nested": layoutOf(t, l, l.Index(l.Index(list...))),
		} {
			for _, p := range []string{"", "linux/amd64"} {
				got, err := find(t, mustParse(t, "oci:"+dir, Config{}), p)
				if err != nil || got.Digest != img.Digest {
					t.Errorf("%s in %s for %q: found %+v (%v), expected %s", name, place, p, got, err, img.Digest)
				}
			}
		}
	}
	for i, d := range things {
		check(why[i], d, img)
		check(why[i], silent, d)
	}
	check("all", append(append(things[:5:5], img), things[5:]...)...)
	check("all", append(things, silent)...)

	// Without an image, the error describes each.
	for i, d := range things {
		_, err := find(t, mustParse(t, "oci:"+layoutOf(t, l, l.Index(d)), Config{}), "linux/amd64")
		if !errors.Is(err, ErrPlatform) || !strings.Contains(err.Error(), why[i]) ||
			!strings.Contains(err.Error(), "the index has") {
			t.Errorf("%s: error %v, expected %v that says so", why[i], err, ErrPlatform)
		}
	}
	l.Tag("none", l.Index(things...))
	_, err := find(t, mustParse(t, "oci:"+l.Dir+":none", Config{}), "linux/amd64")
	for _, want := range []error{ErrPlatform, ErrMediaType, errMissing, errDamaged, blob.ErrMismatch} {
		if !errors.Is(err, want) {
			t.Errorf("error %v, expected %v", err, want)
		}
	}
	if n := strings.Count(err.Error(), "sha256:"); n < 20 || n > 60 || !strings.Contains(err.Error(), "more") {
		t.Errorf("error with %d digests, expected those of the first 20: %v", n, err)
	}
}

// TestMissingImage: if the listed image for the platform is missing, no other takes its place.
func TestMissingImage(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	amd, i386 := l.Manifest(platform("amd64", ""), oneFile("a")), l.Manifest(platform("386", ""), oneFile("b"))
	gone := amd
	gone.Digest = digest.FromString("gone")
	l.Tag("gone", l.Index(artifact(l, ocispec.MediaTypeImageConfig, "application/vnd.in-toto+json"), gone, i386))
	_, err := find(t, mustParse(t, "oci:"+l.Dir+":gone", Config{}), "linux/amd64")
	if !errors.Is(err, errMissing) || !strings.Contains(err.Error(), string(gone.Digest)) ||
		!strings.Contains(err.Error(), "linux/386") ||
		!strings.Contains(err.Error(), "passed over: manifest sha256:") ||
		!strings.Contains(err.Error(), "in-toto") {
		t.Errorf("error %v, expected one that names what is missing, what there is, and what was passed over", err)
	}
	// The same in index.json, without another candidate.
	dir := layoutOf(t, l, artifact(l, ocispec.MediaTypeImageConfig, "application/vnd.in-toto+json"), gone)
	for _, p := range []string{"", "linux/amd64"} {
		_, err := find(t, mustParse(t, "oci:"+dir, Config{}), p)
		if !errors.Is(err, errMissing) || !strings.Contains(err.Error(), string(gone.Digest)) ||
			!strings.Contains(err.Error(), "in-toto") {
			t.Errorf("for %q: error %v, expected one that names what is missing, and what was passed over", p, err)
		}
	}
	host := hostOf(ocitest.LinuxAMD64, "v1")
	if _, err := mustParse(t, "oci:"+l.Dir+":gone", Config{}).Image(t.Context(), host); !errors.Is(err, errMissing) {
		t.Errorf("error %v, expected %v", err, errMissing)
	}
	img, err := find(t, mustParse(t, "oci:"+l.Dir+":gone", Config{}), "linux/386")
	if err != nil || img.Digest != i386.Digest {
		t.Errorf("found %+v (%v), expected %s", img, err, i386.Digest)
	}
	// Another image for the same platform exists.
	l.Tag("two", l.Index(gone, amd))
	img, err = find(t, mustParse(t, "oci:"+l.Dir+":two", Config{}), "linux/amd64")
	if err != nil || img.Digest != amd.Digest {
		t.Errorf("found %+v (%v), expected %s", img, err, amd.Digest)
	}
	// A damaged image is an error, not a reason to take another one.
	bad := l.Manifest(platform("amd64", ""), oneFile("c"))
	bad.Size--
	l.Tag("bad", l.Index(bad, amd))
	_, err = find(t, mustParse(t, "oci:"+l.Dir+":bad", Config{}), "linux/amd64")
	if !errors.Is(err, blob.ErrMismatch) {
		t.Errorf("error %v, expected %v", err, blob.ErrMismatch)
	}
}

// TestDescriptors: tolerable faults of descriptors and documents.
func TestDescriptors(t *testing.T) {
	for name, change := range map[string]func(*ocispec.Descriptor){
		"no media type":  func(d *ocispec.Descriptor) { d.MediaType = "" },
		"JSON":           func(d *ocispec.Descriptor) { d.MediaType = "application/json" },
		"octets":         func(d *ocispec.Descriptor) { d.MediaType = "application/octet-stream" },
		"with a charset": func(d *ocispec.Descriptor) { d.MediaType += "; charset=utf-8" },
		"size 0":         func(d *ocispec.Descriptor) { d.Size = 0 },
		"empty platform": func(d *ocispec.Descriptor) { d.Platform = &ocispec.Platform{} },
		"no arch":        func(d *ocispec.Descriptor) { d.Platform = &ocispec.Platform{OS: "linux"} },
		"no OS":          func(d *ocispec.Descriptor) { d.Platform = &ocispec.Platform{Architecture: "amd64"} },
		"upper case": func(d *ocispec.Descriptor) {
			d.Platform = &ocispec.Platform{
				OS:           "Linux",
				Architecture: "x86_64",
			}
		},
	} {
		l := ocitest.NewLayout(t, t.TempDir())
		img, arm := l.Manifest(platform("amd64", ""), oneFile("a")), l.Manifest(platform("arm64", ""), oneFile("b"))
		want := img.Digest
		change(&img)
		arm.MediaType, arm.Size = img.MediaType, 0
		l.Tag("one", img)
		l.Tag("index", l.Index(arm, img))
		inner := l.Index(arm, img)
		if saysNothing(img.MediaType) {
			inner.MediaType = img.MediaType
		}
		l.Tag("nested", l.Index(inner))
		for _, tag := range []string{"one", "index", "nested"} {
			got, err := find(t, mustParse(t, "oci:"+l.Dir+":"+tag, Config{}), "linux/amd64")
			if err != nil || got.Digest != want {
				t.Errorf("%s, %s: found %+v (%v), expected %s", name, tag, got, err, want)
			}
		}
		// A byte order mark in index.json.
		file := l.Dir + "/" + ocispec.ImageIndexFile
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, append([]byte("\xef\xbb\xbf"), b...), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := find(t, mustParse(t, "oci:"+l.Dir+":one", Config{}), "linux/amd64"); err != nil {
			t.Errorf("%s, with a byte order mark: %v", name, err)
		}
	}
}

// TestManifestRefuses: a manifest of an image whose layers or configuration cannot be used. The error names the part.
func TestManifestRefuses(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	good := l.Manifest(platform("amd64", ""), oneFile("a"))
	large := l.Blob(ocispec.MediaTypeImageConfig, make([]byte, maxDocument+1))
	large.Size = 0 // unknown
	invalid := l.Blob(ocispec.MediaTypeImageConfig, []byte(`{"rootfs":{"diff_ids":["sha256:../x"]}}`))
	for name, c := range map[string]struct {
		change func(m *ocispec.Manifest)
		is     error
		says   string
	}{
		"digest of a layer": {
			func(m *ocispec.Manifest) { m.Layers[0].Digest = "sha256:../x" },
			errDamaged, `layer 0: damaged: digest "sha256:../x"`,
		},
		"empty layer": {
			func(m *ocispec.Manifest) { m.Layers[0].Size = 0 }, errDamaged,
			"size 0, expected more than 0",
		},
		"negative layer": {
			func(m *ocispec.Manifest) { m.Layers[0].Size = -1 }, errDamaged,
			"size -1, expected more than 0",
		},
		"encrypted layer": {
			func(m *ocispec.Manifest) { m.Layers[0].MediaType += "+encrypted" }, blob.ErrEncrypted,
			"decrypt the image first",
		},
		"large configuration": {
			func(m *ocispec.Manifest) { m.Config = large }, errDamaged,
			"config: damaged: " + large.Digest.String() + ": more than 8388608 bytes",
		},
		"diff ID": {
			func(m *ocispec.Manifest) { m.Config = invalid }, errDamaged,
			"config " + invalid.Digest.String() + `: damaged: diff ID "sha256:../x" of layer 0`,
		},
		"configuration without layers": {
			func(m *ocispec.Manifest) { m.Config = l.JSON(m.Config.MediaType, ocispec.Image{}) }, errDamaged,
			"0 diff IDs for 1 layers",
		},
	} {
		d := remade(t, l, good, good.MediaType, c.change)
		_, err := find(t, mustParse(t, "oci:"+layoutOf(t, l, d), Config{}), "")
		if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error %v, expected %v that says %q", name, err, c.is, c.says)
		}
	}
}

// TestTypesByContent: old tools write neither the descriptor's media type nor that of the document.
func TestTypesByContent(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	img := l.Manifest(platform("amd64", ""), oneFile("a"))
	silent := func(d ocispec.Descriptor) ocispec.Descriptor {
		var doc map[string]any
		if err := json.Unmarshal(l.Read(d.Digest), &doc); err != nil {
			t.Fatal(err)
		}
		delete(doc, "mediaType")
		return l.JSON("", doc)
	}
	manifest := silent(img)
	index := silent(l.Index(manifest))
	for name, d := range map[string]ocispec.Descriptor{"manifest": manifest, "index": index} {
		got, err := find(t, mustParse(t, "oci:"+layoutOf(t, l, d), Config{}), "linux/amd64")
		if err != nil || got.Digest != manifest.Digest || got.ManifestType != ocispec.MediaTypeImageManifest {
			t.Errorf("%s: found %+v (%v), expected %s", name, got, err, manifest.Digest)
		}
	}
	// Without names, the advice is another.
	_, err := find(t, mustParse(t, "oci:"+layoutOf(t, l, manifest)+":v1", Config{}), "")
	if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), `no tag "v1", there is: no tags`) {
		t.Errorf("error %v, expected %v that says there are no tags", err, ErrNotFound)
	}
}

// TestRegistryLacksManifests: only 404 means that a manifest is missing.
func TestRegistryLacksManifests(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	gone := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("gone"), Size: 7}
	img := l.Manifest(platform("amd64", ""), oneFile("a"))
	vague := gone
	vague.MediaType = "application/octet-stream"
	attestation := artifact(l, ocispec.MediaTypeImageConfig, "application/vnd.in-toto+json")
	root := l.Index(gone, vague, attestation, img)
	for status, ok := range map[int]bool{404: true, 403: false, 400: false} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			kind, id := path.Split(r.URL.Path)
			if kind == "/v2/" {
				return
			}
			if id == "v1" {
				id = root.Digest.String()
			}
			b, err := os.ReadFile(l.BlobPath(digest.Digest(id)))
			if err != nil {
				w.WriteHeader(status)
				return
			}
			_, _ = w.Write(b)
		}))
		defer srv.Close()
		ref := "docker://" + strings.TrimPrefix(srv.URL, "http://") + "/some/image:v1"
		got, err := find(t, mustParse(t, ref, Config{PlainHTTP: true}), "linux/amd64")
		if ok && (err != nil || got.Digest != img.Digest) || !ok && (err == nil || errors.Is(err, ErrPlatform)) {
			t.Errorf("status %d: found %+v (%v), expected it to be found: %v", status, got, err, ok)
		}
	}
}
