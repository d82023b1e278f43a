package source

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
)

// TestFindWhole: every kind of source with documents gives the whole image, from the root to any blob.
func TestFindWhole(t *testing.T) {
	dir := t.TempDir()
	l := ocitest.NewLayout(t, filepath.Join(dir, "layout"))
	amd, arm := l.Manifest(platform("amd64", ""), oneFile("a")), l.Manifest(platform("arm64", ""), oneFile("b"))
	attestation := artifact(l, ocispec.MediaTypeImageConfig, "application/vnd.in-toto+json")
	marked := amd
	marked.Annotations = map[string]string{attestationType: "attestation-manifest"}
	root := l.Index(amd, arm, attestation, marked)
	vague := root
	vague.MediaType = "application/octet-stream"
	l.Tag("v1", root)
	l.Tag("vague", vague)
	l.Archive(filepath.Join(dir, "oci.tar"))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := path.Base(r.URL.Path)
		if id == "v1" {
			id = root.Digest.String()
		}
		http.ServeFile(w, r, l.BlobPath(digest.Digest(id)))
	}))
	defer srv.Close()
	host := strings.TrimPrefix(srv.URL, "http://")
	cs, err := local.NewStore(l.Dir)
	if err != nil {
		t.Fatal(err)
	}
	client, err := containerd.New("", containerd.WithServices(containerd.WithContentStore(cs),
		containerd.WithImageStore(imageStore{image: images.Image{Name: "example", Target: root}})))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"oci:" + l.Dir + ":v1", "oci:" + l.Dir + ":vague", "oci:" + l.Dir + "@" + string(root.Digest),
		"oci-archive:" + dir + "/oci.tar:v1", "docker://" + host + "/some/image:v1", "containerd:example",
	} {
		src := mustParse(t, name, Config{PlainHTTP: true})
		if s, ok := src.(*store); ok {
			s.client = client
		}
		w, err := FindWhole(t.Context(), src)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if w.Desc.Digest != root.Digest || w.Desc.MediaType != ocispec.MediaTypeImageIndex {
			t.Errorf("%s: found %+v, expected %+v", name, w.Desc, root)
		}
		origin := [2]string{}
		if strings.HasPrefix(name, "docker:") {
			origin = [2]string{host, "some/image"}
		}
		if got := [2]string{w.Registry, w.Repository}; got != origin {
			t.Errorf("%s: it is from %q, expected %q", name, got, origin)
		}
		if doc, err := w.Document(t.Context(), w.Desc); err != nil || !bytes.Equal(doc, l.Read(root.Digest)) {
			t.Errorf("%s: its document is %q (%v)", name, doc, err)
		}
		index, err := w.Index(t.Context(), w.Desc)
		if err != nil || len(index.Manifests) != 4 {
			t.Errorf("%s: its index is %+v (%v)", name, index, err)
			continue
		}
		for i, d := range index.Manifests {
			m, img, err := w.Manifest(t.Context(), d)
			if err != nil || len(m.Layers) != 1 || (img != nil) != (i < 2) {
				t.Errorf("%s: manifest %d is %+v of image %+v (%v)", name, i, m, img, err)
				continue
			}
			if img != nil && (img.Digest != d.Digest || len(img.Layers) != 1) {
				t.Errorf("%s: manifest %s leads to image %+v", name, d.Digest, img)
			}
			rc, err := w.Open(t.Context(), m.Layers[0])
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if b, err := io.ReadAll(rc); err != nil || digest.FromBytes(b) != m.Layers[0].Digest {
				t.Errorf("%s: layer of %d bytes (%v), expected %s", name, len(b), err, m.Layers[0].Digest)
			}
			rc.Close()
		}
		if d, err := w.Typed(t.Context(), vague); err != nil || d.MediaType != root.MediaType {
			t.Errorf("%s: %q is %q (%v)", name, vague.MediaType, d.MediaType, err)
		}
	}
}

// TestFindWholeRefuses: the error has the right type, begins with the source's name, and says what is wrong.
func TestFindWholeRefuses(t *testing.T) {
	dir := t.TempDir()
	l := ocitest.NewLayout(t, filepath.Join(dir, "layout"))
	amd, arm := l.Manifest(platform("amd64", ""), oneFile("a")), l.Manifest(platform("arm64", ""), oneFile("b"))
	l.Tag("v1", amd)
	l.Tag("v2", arm)
	l.Tag("text", l.Blob("text/plain", []byte(`{"some":"document"}`)))
	l.Tag("gone", ocispec.Descriptor{Digest: digest.FromString("gone"), Size: 7})
	l.Archive(filepath.Join(dir, "oci.tar"))
	ocitest.NewLayout(t, filepath.Join(dir, "empty"))
	ocitest.DockerArchive(t, filepath.Join(dir, "docker.tar"), "example:v1", oneFile("a"))
	for name, doc := range map[string]string{
		"large": strings.Repeat(" ", maxDocument+1), "noJSON": "[", "gzip": "\x1f\x8b\x08\x00",
	} {
		ocitest.NewLayout(t, filepath.Join(dir, name))
		if err := os.WriteFile(filepath.Join(dir, name, "index.json"), []byte(doc), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	srv := httptest.NewServer(http.NotFoundHandler())
	defer srv.Close()
	t.Chdir(dir)
	for name, c := range map[string]struct {
		is   error
		says string
	}{
		"rootfs:layout":             {ErrNoDocuments, "no index and no manifest"},
		"docker-archive:docker.tar": {ErrNoDocuments, "no index and no manifest"},
		"oci:nowhere":               {fs.ErrNotExist, "not an OCI layout: stat nowhere/index.json"},
		"oci:layout:v3":             {ErrNotFound, `no tag "v3", there is: "v1", "v2", "text", "gone"`},
		"oci:layout":                {ErrAmbiguous, "4 entries of index.json, expected one"},
		"oci:layout:text":           {ErrMediaType, `"text/plain" of sha256:`},
		"oci:layout:gone":           {errMissing, digest.FromString("gone").Encoded()},
		"oci:layout@" + digest.FromString("x").String(): {errMissing, digest.FromString("x").Encoded()},
		"oci:layout@sha256:../../x":                     {errDamaged, `digest "sha256:../../x"`},
		"oci:empty":                                     {ErrNotFound, "the index is empty"},
		"oci:large":                                     {nil, "index.json: more than 8388608 bytes"},
		"oci:noJSON":                                    {errDamaged, "index.json: damaged: unexpected end"},
		"oci:gzip":                                      {errDamaged, "it looks like gzip, expected JSON"},
		"oci-archive:docker.tar":                        {errNoMember, `not an OCI archive: "index.json" is not in`},
		"oci-archive:nowhere":                           {fs.ErrNotExist, "nowhere"},
		"oci-archive:oci.tar:v3":                        {ErrNotFound, `no tag "v3"`},
		"oci-archive:layout/index.json":                 {nil, "is not a tar archive that can be read"},
		"docker://" + strings.TrimPrefix(srv.URL, "http://") + "/some/image:v1": {ErrNotFound, "some/image"},
	} {
		w, err := FindWhole(t.Context(), mustParse(t, name, Config{PlainHTTP: true}))
		if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) ||
			!strings.HasPrefix(err.Error(), name+": ") {
			t.Errorf("%s: found %+v, error %v; expected %v that says %q", name, w, err, c.is, c.says)
		}
	}
	var down Config
	down.Address = filepath.Join(dir, "no-socket")
	if _, err := FindWhole(t.Context(), mustParse(t, "containerd:x", down)); err == nil ||
		!strings.Contains(err.Error(), "no-socket") {
		t.Errorf("error %v, expected one that names the socket", err)
	}
}

// TestWholeRefusesDocuments: a document below the root is refused if it is damaged, missing or of another kind.
func TestWholeRefusesDocuments(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	m := l.Manifest(platform("amd64", ""), oneFile("a"))
	index := l.Index(m)
	l.Tag("", index)
	w, err := FindWhole(t.Context(), mustParse(t, "oci:"+l.Dir, Config{}))
	if err != nil {
		t.Fatal(err)
	}
	gone := ocispec.Descriptor{Digest: digest.FromString("gone"), Size: 7}
	noConfig := remade(t, l, m, m.MediaType, func(m *ocispec.Manifest) { m.Config.Digest = gone.Digest })
	other := l.Index()
	if err := os.WriteFile(l.BlobPath(other.Digest), bytes.Repeat([]byte(" "), int(other.Size)), 0o600); err != nil {
		t.Fatal(err)
	}
	short := m
	short.Size--
	for _, c := range []struct {
		name            string
		d               ocispec.Descriptor
		index, manifest error // from each call; nil if it is not called
	}{
		{"missing", gone, errMissing, errMissing},
		{"a manifest as an index", remadeType(m, ocispec.MediaTypeImageIndex), ErrMediaType, nil},
		{"an index as a manifest", remadeType(index, ocispec.MediaTypeImageManifest), nil, ErrMediaType},
		{"no JSON", l.Blob(ocispec.MediaTypeImageManifest, []byte("{]")), errDamaged, errDamaged},
		{"changed", other, blob.ErrMismatch, blob.ErrMismatch},
		{"another size", short, blob.ErrMismatch, blob.ErrMismatch},
		{"without its configuration", noConfig, nil, errMissing},
	} {
		if c.index != nil {
			if got, err := w.Index(t.Context(), c.d); !errors.Is(err, c.index) ||
				!strings.Contains(err.Error(), c.d.Digest.Encoded()) {
				t.Errorf("%s: index %+v, error %v; expected %v that names it", c.name, got, err, c.index)
			}
		}
		if c.manifest != nil {
			got, img, err := w.Manifest(t.Context(), c.d)
			if !errors.Is(err, c.manifest) || img != nil {
				t.Errorf("%s: manifest %+v of %+v, error %v; expected %v", c.name, got, img, err, c.manifest)
			}
		}
	}
}

// TestParseDocuments: exported decoders refuse another kind of document, and digests that are not valid.
func TestParseDocuments(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	m := l.Manifest(platform("amd64", ""), oneFile("a"))
	manifest, index := l.Read(m.Digest), l.Read(l.Index(m).Digest)
	config := []byte(configOf(t, ocitest.LinuxAMD64, []byte("layer")))
	docker := bytes.Replace(index, []byte(ocispec.MediaTypeImageIndex), []byte(dockerIndex), 1)
	badID := bytes.Replace(config, []byte("sha256:"), []byte("sha256:/"), 1)
	parse := map[string]func(p []byte, mediaType string) (int, error){
		"index": func(p []byte, mediaType string) (int, error) {
			v, err := ParseIndex(p, mediaType)
			return len(v.Manifests), err
		},
		"manifest": func(p []byte, mediaType string) (int, error) {
			v, err := ParseManifest(p, mediaType)
			return len(v.Layers), err
		},
		"config": func(p []byte, _ string) (int, error) {
			v, err := ParseConfig(p)
			return len(v.RootFS.DiffIDs), err
		},
	}
	for _, c := range []struct {
		what, mediaType string
		doc             []byte
		is              error
		says            string
	}{
		{"index", ocispec.MediaTypeImageIndex, index, nil, ""},
		{"index", dockerIndex, docker, nil, ""},
		{"index", ocispec.MediaTypeImageManifest, index, ErrMediaType, "expected an OCI or Docker index"},
		{"index", "", index, ErrMediaType, `"": expected an OCI or Docker index`},
		{"index", ocispec.MediaTypeImageIndex, manifest, ErrMediaType, "found a manifest"},
		{"index", ocispec.MediaTypeImageIndex, []byte("{]"), errDamaged, "invalid character"},
		{"manifest", ocispec.MediaTypeImageManifest, manifest, nil, ""},
		{"manifest", ocispec.MediaTypeImageIndex, manifest, ErrMediaType, "Docker (schema 2) manifest"},
		{"manifest", schema1 + "+prettyjws", manifest, ErrMediaType, "Docker schema 1, which"},
		{"manifest", ocispec.MediaTypeImageManifest, index, ErrMediaType, "found an index"},
		{"config", "", config, nil, ""},
		{"config", "", []byte("\x28\xb5\x2f\xfd"), errDamaged, "it looks like zstd, expected JSON"},
		{"config", "", badID, errDamaged, `of layer 0: invalid checksum digest`},
	} {
		n, err := parse[c.what](c.doc, c.mediaType)
		switch {
		case c.is == nil && (err != nil || n != 1):
			t.Errorf("%s as %q: %d parts, error %v", c.what, c.mediaType, n, err)
		case c.is != nil && (!errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%s as %q: error %v, expected %v that says %q", c.what, c.mediaType, err, c.is, c.says)
		}
	}
	for mediaType, want := range map[string]bool{
		ocispec.MediaTypeImageIndex: true, dockerIndex: true,
		ocispec.MediaTypeImageManifest: false, dockerManifest: false,
	} {
		if IsIndex(mediaType) != want {
			t.Errorf("%q is an index: %t, expected %t", mediaType, !want, want)
		}
	}
}

// TestParts: a part is exactly the bytes that were asked for, and a registry sends only these.
func TestParts(t *testing.T) {
	dir := t.TempDir()
	l := ocitest.NewLayout(t, filepath.Join(dir, "layout"))
	m := l.Manifest(platform("amd64", ""), ocitest.Layer{Tar: bytes.Repeat([]byte("0123456789abcdef"), 64)})
	l.Tag("v1", m)
	l.Archive(filepath.Join(dir, "oci.tar"))
	var manifest ocispec.Manifest
	if err := json.Unmarshal(l.Read(m.Digest), &manifest); err != nil {
		t.Fatal(err)
	}
	desc := manifest.Layers[0]
	want := l.Read(desc.Digest)
	srv := httptest.NewServer(l.Registry(m, desc.Digest, func(w http.ResponseWriter, r *http.Request, b []byte) {
		if r.Header.Get("Range") == "" {
			t.Error("the registry is asked for the whole layer")
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}))
	defer srv.Close()
	for _, name := range []string{
		"oci:" + l.Dir + ":v1", "oci-archive:" + dir + "/oci.tar:v1",
		"docker://" + strings.TrimPrefix(srv.URL, "http://") + "/some/image:v1",
	} {
		img, err := mustParse(t, name, Config{PlainHTTP: true}).Image(t.Context(), Host())
		if err != nil {
			t.Fatal(err)
		}
		parts, err := img.Layers[0].Parts(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range [][2]int64{{0, 1}, {5, 21}, {0, desc.Size}, {desc.Size - 1, desc.Size}} {
			if got, err := parts.Part(t.Context(), r[0], r[1]); err != nil || !bytes.Equal(got, want[r[0]:r[1]]) {
				t.Errorf("%s: bytes %d to %d are %q (%v)", name, r[0], r[1], got, err)
			}
		}
		for _, r := range [][2]int64{{-1, 1}, {2, 1}, {0, desc.Size + 1}, {desc.Size + 1, desc.Size + 2}} {
			got, err := parts.Part(t.Context(), r[0], r[1])
			if says := fmt.Sprintf("bytes %d to %d", r[0], r[1]); err == nil || !strings.Contains(err.Error(), says) ||
				!strings.Contains(err.Error(), fmt.Sprint(desc.Size)) {
				t.Errorf("%s: part %q, error %v; expected one that says %q", name, got, err, says)
			}
		}
	}
	// A blob that is shorter than its descriptor says, and one that is not there.
	img, err := mustParse(t, "oci:"+l.Dir+":v1", Config{}).Image(t.Context(), Host())
	if err != nil {
		t.Fatal(err)
	}
	parts, err := img.Layers[0].Parts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(l.BlobPath(desc.Digest), 100); err != nil {
		t.Fatal(err)
	}
	for _, from := range []int64{90, 200} {
		if got, err := parts.Part(t.Context(), from, from+20); !errors.Is(err, io.ErrUnexpectedEOF) &&
			!errors.Is(err, io.EOF) {
			t.Errorf("from %d: part %q, error %v; expected that the blob ends", from, got, err)
		}
	}
	if err := os.Remove(l.BlobPath(desc.Digest)); err != nil {
		t.Fatal(err)
	}
	if _, err := parts.Part(t.Context(), 0, 1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v, expected %v", err, fs.ErrNotExist)
	}
}

// TestAbsolute: only names that hold a relative path change, and the result means the same.
func TestAbsolute(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for name, want := range map[string]string{
		"oci:layout:v1": "oci:" + dir + "/layout:v1", "oci-archive:a/../b.tar": "oci-archive:" + dir + "/a/../b.tar",
		"docker-archive:x@0": "docker-archive:" + dir + "/x@0", "rootfs:.": "rootfs:" + dir + "/.",
		"daxfs:image": "daxfs:" + dir + "/image", "daxfs:/image": "", "oci:/layout:v1": "", "oci:": "", "oci": "",
		"docker://alpine": "", "containerd:alpine": "", "other:x": "",
	} {
		if want == "" {
			want = name
		}
		if got, err := Absolute(name); err != nil || got != want {
			t.Errorf("%q: got %q (%v), expected %q", name, got, err, want)
		}
	}
}

// TestInterruptedArchive: the index of a large archive can be interrupted.
func TestInterruptedArchive(t *testing.T) {
	file := filepath.Join(t.TempDir(), "docker.tar")
	ocitest.DockerArchive(t, file, "example:v1", oneFile("a"))
	boom := errors.New("boom")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(boom)
	for _, kind := range []string{"docker-archive:", "oci-archive:"} {
		if _, err := mustParse(t, kind+file, Config{}).Image(ctx, Host()); !errors.Is(err, boom) {
			t.Errorf("%s: error %v, expected %v", kind, err, boom)
		}
	}
}
