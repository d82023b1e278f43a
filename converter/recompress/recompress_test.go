package recompress

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	containerregistry "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	gcrremote "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
)

// tarOf writes a tar of files that contain their repeated names.
func tarOf(t testing.TB, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i, n := range names {
		body := strings.Repeat(n, 1000*(i+1))
		if err := w.WriteHeader(&tar.Header{Name: n, Mode: 0o644, Size: int64(len(body))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func convert(t testing.TB, from, to string, o Options) (*Result, error) {
	t.Helper()
	src, err := source.Parse(from, source.Config{PlainHTTP: true})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	d, err := ParseDestination(to, Config{PlainHTTP: true, Source: from, Notify: func(string) {}})
	if err != nil {
		t.Fatal(err)
	}
	res, err := Convert(t.Context(), src, d, o)
	return res, errors.Join(err, d.Close())
}

// arm is a second platform.
var arm = ocispec.Platform{OS: "linux", Architecture: "arm64"}

// index makes a layout with an index v1 of two images with a common layer, and an attestation of the
// first image. One layer contains a name twice and cannot be encoded.
func index(t testing.TB) (l *ocitest.Layout, amd ocispec.Descriptor) {
	t.Helper()
	l = ocitest.NewLayout(t, filepath.Join(t.TempDir(), "in"))
	base := ocitest.Layer{Tar: tarOf(t, "a", "b"), Compression: ocitest.Gzip}
	amd = l.Manifest(ocitest.LinuxAMD64, base, ocitest.Layer{
		Tar: tarOf(t, "c", "./c"), Compression: ocitest.Gzip,
		MediaType: "application/vnd.docker.image.rootfs.diff.tar.gzip",
	})
	other := l.Manifest(arm, base, ocitest.Layer{Tar: tarOf(t, "d")})
	statement := l.Blob("application/vnd.in-toto+json", []byte(`{"subject":"`+amd.Digest.String()+`"}`))
	attestation := l.JSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest, Config: l.JSON(ocispec.MediaTypeImageConfig, struct{}{}),
		Layers: []ocispec.Descriptor{statement},
	})
	attestation.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	attestation.Annotations = map[string]string{
		"vnd.docker.reference.type": "attestation-manifest", attested: amd.Digest.String(),
	}
	l.Tag("v1", l.Index(amd, other, attestation))
	return l, amd
}

func read[T any](t testing.TB, dir string, d digest.Digest) (v T) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "blobs", "sha256", d.Encoded()))
	if err != nil {
		t.Fatal(err)
	}
	if digest.FromBytes(b) != d {
		t.Fatalf("blob %s has other bytes", d)
	}
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// TestIndex: an index keeps its images, their configurations and attachments.
func TestIndex(t *testing.T) {
	l, amd := index(t)
	out := filepath.Join(t.TempDir(), "out")
	res, err := convert(t, "oci:"+l.Dir+":v1", "oci:"+out+":v2", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if res.Images != 2 || len(res.Layers) != 3 || res.MediaType != ocispec.MediaTypeImageIndex {
		t.Errorf("%d images with %d layers, %s; expected 2 with 3 in an index", res.Images,
			len(res.Layers), res.MediaType)
	}
	list := read[ocispec.Index](t, out, res.Digest).Manifests
	if len(list) != 3 || list[1].Platform.Architecture != "arm64" ||
		list[2].Annotations[attested] != list[0].Digest.String() {
		t.Fatalf("index %+v, expected both images, and the attestation of the first", list)
	}
	if len(res.Notes) != 1 ||
		!strings.Contains(res.Notes[0], amd.Digest.String()+", which is now "+list[0].Digest.String()) {
		t.Errorf("notes %q, expected one about the attestation", res.Notes)
	}
	was, now := read[ocispec.Manifest](t, l.Dir, amd.Digest), read[ocispec.Manifest](t, out, list[0].Digest)
	if was.Config.Digest != now.Config.Digest {
		t.Errorf("configuration %s, expected %s", now.Config.Digest, was.Config.Digest)
	}
	if now.Layers[0].MediaType != ocispec.MediaTypeImageLayerZstd ||
		now.Layers[0].Annotations[chunked.AnnotationTOCDigest] == "" {
		t.Errorf("layer %+v, expected zstd:chunked", now.Layers[0])
	}
	if kept := now.Layers[1]; kept.Digest != was.Layers[1].Digest || kept.MediaType != ocispec.MediaTypeImageLayerGzip {
		t.Errorf("layer %+v, expected %s as it was, with OCI's media type", kept, was.Layers[1].Digest)
	}
	if !strings.Contains(res.Layers[1].Kept, `"./c": the name occurs more than once`) {
		t.Errorf("layer is kept because of %q", res.Layers[1].Kept)
	}
	// GNU tar and zstd can read it.
	blob := filepath.Join(out, "blobs", "sha256", now.Layers[0].Digest.Encoded())
	names, err := exec.Command("tar", "--zstd", "-tf", blob).Output()
	if err != nil || string(names) != "a\nb\n" {
		t.Errorf("tar --zstd lists %q, error %v", names, err)
	}
	raw, err := exec.Command("zstd", "-dcq", blob).Output()
	config := read[ocispec.Image](t, out, now.Config.Digest)
	if err != nil || digest.FromBytes(raw) != config.RootFS.DiffIDs[0] {
		t.Errorf("zstd makes %s of the layer, error %v, expected %s", digest.FromBytes(raw), err,
			config.RootFS.DiffIDs[0])
	}
}

// TestSame: a layout, an archive and an image that is already zstd:chunked give the same output.
func TestSame(t *testing.T) {
	l, _ := index(t)
	dir := t.TempDir()
	first, err := convert(t, "oci:"+l.Dir+":v1", "oci-archive:"+dir+"/1.tar:v1", Options{})
	if err != nil {
		t.Fatal(err)
	}
	second, err := convert(t, "oci-archive:"+dir+"/1.tar:v1", "oci-archive:"+dir+"/2.tar:v1", Options{})
	if err != nil {
		t.Fatal(err)
	}
	a, errA := os.ReadFile(dir + "/1.tar")
	b, errB := os.ReadFile(dir + "/2.tar")
	if errA != nil || errB != nil || !bytes.Equal(a, b) || first.Digest != second.Digest {
		t.Errorf("two archives of %d and %d bytes with %s and %s are not the same", len(a), len(b),
			first.Digest, second.Digest)
	}
	if kept := second.Layers[0].Kept; kept != "it is zstd:chunked already" {
		t.Errorf("layer is kept because of %q", kept)
	}
	left, err := filepath.Glob(dir + "/.*")
	if err != nil || len(left) > 0 {
		t.Errorf("%q is left, error %v", left, err)
	}
}

// TestPlatform: one image of an index becomes a manifest, and so does an image without a manifest.
func TestPlatform(t *testing.T) {
	l, _ := index(t)
	p, err := source.ParsePlatform("linux/arm64")
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	res, err := convert(t, "oci:"+l.Dir, "oci:"+out, Options{Platform: &p})
	if err != nil {
		t.Fatal(err)
	}
	m := read[ocispec.Manifest](t, out, res.Digest)
	if c := read[ocispec.Image](t, out, m.Config.Digest); res.MediaType != ocispec.MediaTypeImageManifest ||
		c.Architecture != "arm64" {
		t.Errorf("%s of an image for %s", res.MediaType, c.Architecture)
	}
	file := filepath.Join(t.TempDir(), "docker.tar")
	ocitest.DockerArchive(t, file, "x:v1", ocitest.Layer{Tar: tarOf(t, "a")}, ocitest.Layer{Tar: tarOf(t, "c", "./c")})
	if res, err = convert(t, "docker-archive:"+file, "oci:"+out, Options{}); err != nil {
		t.Fatal(err)
	}
	m = read[ocispec.Manifest](t, out, res.Digest)
	if m.Layers[0].MediaType != ocispec.MediaTypeImageLayerZstd ||
		m.Layers[1].MediaType != ocispec.MediaTypeImageLayer {
		t.Errorf("layers %+v, expected one that was encoded and a tar", m.Layers)
	}
	var list ocispec.Index
	b, err := os.ReadFile(filepath.Join(out, "index.json"))
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err != nil || len(list.Manifests) != 1 || list.Manifests[0].Digest != res.Digest {
		t.Errorf("index.json %+v, error %v, expected the last image alone", list.Manifests, err)
	}
}

// TestNoLayers: a source without layers is refused.
func TestNoLayers(t *testing.T) {
	_, err := convert(t, "rootfs:"+t.TempDir(), "oci:"+t.TempDir()+"/out", Options{})
	if err == nil || !strings.Contains(err.Error(), "no layers") {
		t.Errorf("error %v", err)
	}
}

// TestDamaged: with a damaged layer, the destination gets no name.
func TestDamaged(t *testing.T) {
	for _, what := range []string{"blob", "diff ID"} {
		l := ocitest.NewLayout(t, filepath.Join(t.TempDir(), "in"))
		layer := ocitest.Layer{Tar: tarOf(t, "a"), Compression: ocitest.Gzip}
		if what == "diff ID" {
			layer.DiffID = digest.FromString("other")
		}
		d := l.Manifest(ocitest.LinuxAMD64, layer)
		l.Tag("v1", d)
		if what == "blob" {
			blob := l.BlobPath(read[ocispec.Manifest](t, l.Dir, d.Digest).Layers[0].Digest)
			if err := os.WriteFile(blob, []byte("damaged"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		out := t.TempDir()
		for _, to := range []string{"oci:" + out + "/dir", "oci-archive:" + out + "/file"} {
			if _, err := convert(t, "oci:"+l.Dir, to, Options{}); err == nil ||
				!strings.Contains(err.Error(), "mismatch") {
				t.Errorf("%s to %s: error %v, expected a mismatch", what, to, err)
			}
		}
		for _, name := range []string{"/dir/index.json", "/file"} {
			if _, err := os.Stat(out + name); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: %s is there, error %v", what, name, err)
			}
		}
	}
}

// server is a registry that records requests and fails some of them.
type server struct {
	http.Handler
	fail func(w http.ResponseWriter, r *http.Request) bool
	mu   sync.Mutex
	log  []string
	host string
}

func newServer(t testing.TB) *server {
	t.Helper()
	s := &server{Handler: containerregistry.New(containerregistry.Logger(log.New(io.Discard, "", 0)))}
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	_, s.host, _ = strings.Cut(srv.URL, "://")
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	return s
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.log = append(s.log, r.Method+" "+r.URL.String())
	fail := s.fail
	s.mu.Unlock()
	if fail != nil && fail(w, r) {
		return
	}
	if r.Method == http.MethodPost && r.URL.Query().Get("mount") != "" && s.has(r) {
		w.WriteHeader(http.StatusCreated) // all repositories of this registry share their blobs
		return
	}
	s.Handler.ServeHTTP(w, r)
}

// has reports whether the repository to mount from has the blob.
func (s *server) has(r *http.Request) bool {
	path := fmt.Sprintf("/v2/%s/blobs/%s", r.URL.Query().Get("from"), r.URL.Query().Get("mount"))
	w := httptest.NewRecorder()
	s.Handler.ServeHTTP(w, httptest.NewRequest(http.MethodHead, path, nil))
	return w.Code == http.StatusOK
}

// pulled checks the layers of an image as read by crane's library.
func pulled(t testing.TB, ref string) {
	t.Helper()
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := gcrremote.Image(r, gcrremote.WithPlatform(v1.Platform{OS: "linux", Architecture: "amd64"}))
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil || len(layers) == 0 {
		t.Fatalf("%d layers, error %v", len(layers), err)
	}
	for _, l := range layers {
		want, err := l.DiffID()
		if err != nil {
			t.Fatal(err)
		}
		rc, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		got, err := digest.FromReader(rc)
		if err != nil || got.String() != want.String() {
			t.Errorf("a layer is decompressed to %s, error %v, expected %s", got, err, want)
		}
		rc.Close()
	}
}

// TestPush: the tag is the last request, and existing blobs are not sent, not even from other repositories.
func TestPush(t *testing.T) {
	l, _ := index(t)
	s := newServer(t)
	to := "docker://" + s.host + "/some/image:v1"
	res, err := convert(t, "oci:"+l.Dir+":v1", to, Options{})
	if err != nil {
		t.Fatal(err)
	}
	last := s.log[len(s.log)-1]
	if last != "PUT /v2/some/image/manifests/v1" ||
		strings.Contains(strings.Join(s.log[:len(s.log)-1], "\n"), "manifests/v1") {
		t.Errorf("requests end with %q, expected the tag there alone", last)
	}
	pulled(t, s.host+"/some/image:v1")
	sent := res.Sent
	if res, err = convert(t, "oci:"+l.Dir+":v1", to, Options{}); err != nil || res.Sent != 0 || res.Present < sent {
		t.Errorf("again: sent %d, present %d of %d, error %v", res.Sent, res.Present, sent, err)
	}
	s.fail = func(w http.ResponseWriter, r *http.Request) bool { // like registries with separate repositories
		if r.Method == http.MethodHead && strings.Contains(r.URL.Path, "/other/") {
			w.WriteHeader(http.StatusNotFound)
			return true
		}
		return false
	}
	res, err = convert(t, to, "docker://"+s.host+"/other/image:v2", Options{})
	if err != nil || res.Sent != 0 || res.Mounted == 0 {
		t.Errorf("from another repository: %+v, error %v, expected all to be mounted", res, err)
	}
	pulled(t, s.host+"/other/image:v2")
}

// TestPushFails: after a failure of any request there is no tag, and transient failures are retried.
func TestPushFails(t *testing.T) {
	l, _ := index(t)
	for _, c := range []struct {
		method, part string
		status, n    int
		ok           bool
	}{
		{http.MethodPut, "/uploads/", 503, 1, true},
		{http.MethodPost, "/uploads/", 500, 1, true},
		{http.MethodHead, "/blobs/", 502, 1, true},
		{http.MethodPut, "/manifests/", 429, 1, true},
		{http.MethodPut, "/uploads/", 403, 1000, false},
		{http.MethodPost, "/uploads/", 401, 1000, false},
		{http.MethodPut, "/manifests/sha256", 400, 1000, false},
		{http.MethodPut, "/manifests/v1", 413, 1000, false},
	} {
		s := newServer(t)
		left := c.n
		s.fail = func(w http.ResponseWriter, r *http.Request) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			if r.Method != c.method || !strings.Contains(r.URL.Path, c.part) || left == 0 {
				return false
			}
			left--
			w.WriteHeader(c.status)
			return true
		}
		_, err := convert(t, "oci:"+l.Dir+":v1", "docker://"+s.host+"/some/image:v1", Options{})
		if (err == nil) != c.ok || err != nil && !strings.Contains(err.Error(), fmt.Sprint(c.status)) {
			t.Errorf("%+v: error %v", c, err)
		}
		w := httptest.NewRecorder()
		s.Handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v2/some/image/manifests/v1", nil))
		if tagged := w.Code == http.StatusOK; tagged != c.ok {
			t.Errorf("%+v: there is a tag: %v", c, tagged)
		}
	}
}

// TestCancel: an interrupted conversion returns the cause and leaves no name.
func TestCancel(t *testing.T) {
	l, _ := index(t)
	s := newServer(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	want := errors.New("interrupted")
	s.fail = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut {
			cancel(want)
		}
		return false
	}
	src, err := source.Parse("oci:"+l.Dir+":v1", source.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	to, err := ParseDestination("docker://"+s.host+"/some/image:v1", Config{PlainHTTP: true})
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	if _, err := Convert(ctx, src, to, Options{}); !errors.Is(err, want) {
		t.Errorf("error %v, expected %v", err, want)
	}
	if strings.Contains(strings.Join(s.log, "\n"), "manifests/v1") {
		t.Error("the image is tagged")
	}
}
