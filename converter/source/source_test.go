package source

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	regserver "github.com/google/go-containerregistry/pkg/registry"
	ggcrlayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

func platform(arch, variant string) ocispec.Platform {
	return ocispec.Platform{OS: "linux", Architecture: arch, Variant: variant}
}

func oneFile(name string) ocitest.Layer {
	return ocitest.Layer{Tar: Tar(Reg(name, name)), Compression: ocitest.Gzip}
}

// find resolves a source and reads its first layer.
func find(t *testing.T, src Source, p string) (*Image, error) {
	t.Helper()
	pl, err := ParsePlatform(p)
	if err != nil {
		t.Fatal(err)
	}
	img, err := src.Image(context.Background(), pl)
	if err != nil {
		return nil, err
	}
	for i, l := range img.Layers {
		rc, err := l.Open(context.Background())
		if err != nil {
			t.Fatalf("layer %d: %v", i, err)
		}
		r, err := blob.NewReader(context.Background(), rc, blob.Spec{
			MediaType: l.Desc.MediaType, Digest: l.Desc.Digest, Size: l.Desc.Size, DiffID: l.DiffID,
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Finish(nil); err != nil {
			t.Fatalf("layer %d: %v", i, err)
		}
	}
	return img, nil
}

func mustParse(t *testing.T, s string, c Config) Source {
	t.Helper()
	src, err := Parse(s, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { src.Close() })
	if src.String() != s {
		t.Errorf("%q calls itself %q", s, src)
	}
	return src
}

func TestParseErrors(t *testing.T) {
	for _, s := range []string{
		"", "oci", "oci:", "nothing:x", "docker:alpine", "docker://UPPER CASE", "/some/path", "oci::v1",
		"oci:@sha256:00", "oci-archive::v1", "docker-archive::v1",
	} {
		if src, err := Parse(s, Config{}); err == nil {
			t.Errorf("%q was taken for %T", s, src)
		}
	}
	for _, kind := range []string{"oci", "oci-archive", "docker-archive", "docker", "containerd", "daxfs"} {
		_, err := Parse(kind+":x", Config{OverlayUpper: true})
		if err == nil || !strings.Contains(err.Error(), "only the directory of rootfs:") {
			t.Errorf("upper directory of %s: error %v", kind, err)
		}
	}
	if _, err := ParsePlatform("a/b/c/d"); err == nil {
		t.Error("a platform of four parts was taken")
	}
}

// TestPlatforms: the right manifest is selected from an index with nested indexes, attestations and artifacts.
func TestPlatforms(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	byName := map[string]digest.Digest{}
	add := func(name string, p ocispec.Platform) ocispec.Descriptor {
		d := l.Manifest(p, oneFile(name))
		byName[name] = d.Digest
		return d
	}
	amd, v7 := add("amd64", platform("amd64", "")), add("v7", platform("arm", "v7"))
	arm := add("arm64", platform("arm64", ""))
	arm.Platform = nil // then the configuration decides
	eros := add("erofs", platform("riscv64", ""))
	eros.Platform.OSFeatures = []string{"erofs"}
	attestation := add("attestation", platform("amd64", ""))
	attestation.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	artifact := l.Blob("application/vnd.example.sbom", []byte("{}"))
	l.Tag("all", l.Index(attestation, artifact, l.Index(v7, l.Index(arm)), amd, eros))
	l.Tag("one", amd)
	src := func(tag string) Source { return mustParse(t, "oci:"+l.Dir+tag, Config{}) }
	for _, c := range []struct{ tag, platform, want string }{
		{":all", "linux/amd64", "amd64"},
		{":all", "linux/arm64", "arm64"},
		{":all", "linux/arm/v7", "v7"},
		{":one", "", "amd64"},
		{":one", "linux/amd64", "amd64"},
		{"@" + string(arm.Digest), "linux/arm64", "arm64"}, // in a nested index, not in index.json
		{"@" + string(v7.Digest), "", "v7"},
	} {
		img, err := find(t, src(c.tag), c.platform)
		if err != nil {
			t.Errorf("%s, %s: %v", c.tag, c.platform, err)
		} else if img.Digest != byName[c.want] {
			t.Errorf("%s, %s: found %s, expected %s", c.tag, c.platform, img.Digest, byName[c.want])
		}
	}
	for _, c := range []struct{ tag, platform, holds string }{
		{":all", "linux/s390x", "linux/amd64, linux/arm/v7, linux/arm64"},
		{":all", "linux/riscv64", "linux/riscv64"}, // has only EROFS layers
		{":one", "linux/arm64", "the image is for linux/amd64"},
	} {
		if _, err := find(t, src(c.tag), c.platform); !errors.Is(err, ErrPlatform) ||
			!strings.Contains(err.Error(), c.holds) {
			t.Errorf("%s, %s: error %v, expected %v that says %q", c.tag, c.platform, err, ErrPlatform, c.holds)
		}
	}
}

// TestUntaggedIndexFile: index.json itself may be the index of an image.
func TestUntaggedIndexFile(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	l.Tag("", l.Manifest(platform("amd64", ""), oneFile("amd64")))
	arm := l.Manifest(platform("arm64", ""), oneFile("arm64"))
	l.Tag("", arm)
	img, err := find(t, mustParse(t, "oci:"+l.Dir, Config{}), "linux/arm64")
	if err != nil || img.Digest != arm.Digest {
		t.Errorf("found %+v (%v), expected %s", img, err, arm.Digest)
	}
}

// TestTags: an image with several tags is one image, and containerd's name for it counts as a tag.
func TestTags(t *testing.T) {
	const named = "io.containerd.image.name"
	for _, c := range []struct {
		tags []string // annotations of the entries of index.json: KEY=VALUE
		same bool     // all are one image
		err  string
	}{
		{[]string{ocispec.AnnotationRefName + "=a", ocispec.AnnotationRefName + "=b"}, true, ""},
		{
			[]string{ocispec.AnnotationRefName + "=a", ocispec.AnnotationRefName + "=b"},
			false,
			`several images: "a", "b"`,
		},
		{[]string{named + "=a", named + "=b"}, false, `several images: "a", "b"`},
		{[]string{named + "=a", "x=y"}, false, ""},
	} {
		l := ocitest.NewLayout(t, t.TempDir())
		index := ocispec.Index{}
		for i, tag := range c.tags {
			d := l.Manifest(platform("s390x", ""), oneFile("a"))
			if i > 0 && !c.same {
				d = l.Manifest(platform("riscv64", ""), oneFile("b"))
			}
			d.Platform = nil
			key, value, _ := strings.Cut(tag, "=")
			d.Annotations = map[string]string{key: value}
			index.Manifests = append(index.Manifests, d)
		}
		b, err := json.Marshal(index)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(l.Dir, "index.json"), b, 0o644); err != nil {
			t.Fatal(err)
		}
		p := ""
		if !c.same {
			p = "linux/s390x"
		}
		img, err := find(t, mustParse(t, "oci:"+l.Dir, Config{}), p)
		if c.err == "" {
			if err != nil || img.Digest != index.Manifests[0].Digest {
				t.Errorf("%q: found %+v (%v), expected the first", c.tags, img, err)
			}
		} else if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%q: error %v, expected it to say %q", c.tags, err, c.err)
		}
	}
}

// TestArtifactsBesideAnImage: a layout may hold an image's artifacts as manifests without a platform.
func TestArtifactsBesideAnImage(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	config := l.Blob("application/vnd.oci.empty.v1+json", []byte("{}"))
	signature := l.JSON(ocispec.MediaTypeImageManifest,
		ocispec.Manifest{
			ArtifactType: "application/vnd.example.signature", Config: config,
			Layers: []ocispec.Descriptor{config},
		})
	img := l.Manifest(platform("amd64", ""), oneFile("amd64"))
	img.Platform = nil
	l.Tag("", signature)
	l.Tag("", img)
	got, err := find(t, mustParse(t, "oci:"+l.Dir, Config{}), "linux/amd64")
	if err != nil || got.Digest != img.Digest {
		t.Errorf("found %+v (%v), expected %s", got, err, img.Digest)
	}
	l.Tag("only", l.Index(signature))
	if _, err := find(t, mustParse(t, "oci:"+l.Dir+":only", Config{}), ""); !errors.Is(err, ErrPlatform) ||
		!strings.Contains(err.Error(), "no container image") {
		t.Errorf("error %v, expected %v that says there is no container image", err, ErrPlatform)
	}
}

func TestNotAnImage(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	config := l.Blob("application/vnd.oci.empty.v1+json", []byte("{}"))
	artifact := l.JSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{Config: config})
	l.Tag("artifact", artifact)
	old := l.Blob("application/vnd.docker.distribution.manifest.v1+prettyjws", []byte(`{"schemaVersion":1}`))
	l.Tag("schema1", old)
	short := l.JSON(ocispec.MediaTypeImageConfig, ocispec.Image{})
	layer := l.Blob(ocispec.MediaTypeImageLayer, Tar())
	l.Tag("counts",
		l.JSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{Config: short, Layers: []ocispec.Descriptor{layer}}))
	deep := l.Index()
	for range maxNesting + 1 {
		deep = l.Index(deep)
	}
	l.Tag("deep", deep)
	for tag, want := range map[string]string{
		"artifact": "this is not a container image", "schema1": "Docker schema 1",
		"counts": "0 diff IDs for 1 layers", "deep": "indexes within each other",
	} {
		_, err := find(t, mustParse(t, "oci:"+l.Dir+":"+tag, Config{}), "")
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, expected it to say %q", tag, err, want)
		}
	}
}

// TestMistakenPlace: for a source of the wrong kind, the error says what it is and which source reads it.
func TestMistakenPlace(t *testing.T) {
	dir := t.TempDir()
	l := ocitest.NewLayout(t, filepath.Join(dir, "layout"))
	l.Tag("v1", l.Manifest(platform("amd64", ""), oneFile("a")))
	l.Archive(filepath.Join(dir, "oci.tar"))
	ocitest.DockerArchive(t, filepath.Join(dir, "docker.tar"), "example:v1", oneFile("a"))
	if err := unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	for source, want := range map[string]string{
		"oci:oci.tar": "for a layout in a tar file: oci-archive:FILE",
		"oci-archive:layout": `"layout" is a directory, expected a tar file ` +
			`(for a layout in a directory: oci:DIR)`,
		"oci-archive:docker.tar":      "docker-archive:FILE reads it",
		"docker-archive:oci.tar":      "oci-archive:FILE reads it",
		"docker-archive:pipe":         `"pipe" is not a regular file`,
		"docker-archive:/dev/null":    `"/dev/null" is not a regular file`,
		"oci:layout@sha256:00":        `the index has no digest "sha256:00", it has: sha256:`,
		"oci:layout:v2":               `no tag "v2", there is: "v1"`,
		"containerd:example":          "no-socket: connect: no such file or directory (does it run?",
		"docker-archive:layout/blobs": `"layout/blobs" is a directory`,
	} {
		_, err := find(t, mustParse(t, source, Config{Address: "unix://no-socket"}), "")
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, expected it to say %q", source, err, want)
		}
	}
}

// serve runs a registry, which requires a password unless it is empty.
func serve(t *testing.T, l *ocitest.Layout, password string) string {
	t.Helper()
	h := regserver.New(regserver.Logger(log.New(io.Discard, "", 0)))
	locked := false
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, got, _ := r.BasicAuth(); locked && got != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	idx, err := ggcrlayout.ImageIndexFromPath(l.Dir)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(strings.TrimPrefix(srv.URL, "http://") + "/some/image:v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, idx); err != nil {
		t.Fatal(err)
	}
	locked = password != ""
	return ref.Context().Name()
}

func TestRegistry(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	amd, arm := l.Manifest(platform("amd64", ""), oneFile("a")), l.Manifest(platform("arm64", ""), oneFile("b"))
	l.Tag("", amd)
	l.Tag("", arm)
	repo := serve(t, l, "")
	for ref, want := range map[string]digest.Digest{
		repo + ":v1": arm.Digest, repo + "@" + string(arm.Digest): arm.Digest,
	} {
		img, err := find(t, mustParse(t, "docker://"+ref, Config{PlainHTTP: true}), "linux/arm64")
		if err != nil || img.Digest != want {
			t.Errorf("%s: found %+v (%v), expected %s", ref, img, err, want)
		}
	}
	if _, err := find(t, mustParse(t, "docker://"+repo+":v2", Config{PlainHTTP: true}), ""); err == nil {
		t.Error("found a tag that does not exist")
	}
}

// TestRegistryCredentials: credentials come from docker's configuration, and a refusal gives advice.
func TestRegistryCredentials(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	l.Tag("", l.Manifest(platform("amd64", ""), oneFile("a")))
	repo := serve(t, l, "secret")
	host, _, _ := strings.Cut(repo, "/")
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	_, err := find(t, mustParse(t, "docker://"+repo+":v1", Config{PlainHTTP: true}), "linux/amd64")
	if err == nil || !strings.Contains(err.Error(), "docker login "+host) {
		t.Errorf("error %v, expected it to name docker login", err)
	}
	config := fmt.Sprintf(`{"auths":{%q:{"username":"user","password":"secret"}}}`, host)
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := find(t, mustParse(t, "docker://"+repo+":v1", Config{PlainHTTP: true}), "linux/amd64"); err != nil {
		t.Error(err)
	}
}

// TestRegistryThatLies: a manifest must have the requested digest.
func TestRegistryThatLies(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		fmt.Fprint(w, `{"schemaVersion":2}`)
	}))
	defer srv.Close()
	ref := strings.TrimPrefix(srv.URL, "http://") + "/some/image@" + digest.FromString("x").String()
	_, err := find(t, mustParse(t, "docker://"+ref, Config{PlainHTTP: true}), "")
	if !errors.Is(err, blob.ErrMismatch) {
		t.Errorf("error %v, expected %v", err, blob.ErrMismatch)
	}
}

// imageStore is a containerd image store with one image.
type imageStore struct {
	images.Store
	image images.Image
}

func (s imageStore) Get(_ context.Context, name string) (images.Image, error) {
	if name == s.image.Name {
		return s.image, nil
	}
	return images.Image{}, fmt.Errorf("image %q: %w", name, errdefs.ErrNotFound)
}

// TestContainerd reads from containerd's own content store in this process.
func TestContainerd(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	m := l.Manifest(platform("amd64", ""), oneFile("a"))
	cs, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	blobs, err := filepath.Glob(filepath.Join(l.Dir, "blobs/sha256/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range blobs {
		f, err := os.Open(b)
		if err != nil {
			t.Fatal(err)
		}
		d := ocispec.Descriptor{Digest: digest.NewDigestFromEncoded(digest.SHA256, filepath.Base(b))}
		if err := content.WriteBlob(ctx, cs, b, f, d); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	is := imageStore{image: images.Image{Name: "docker.io/library/example:latest", Target: m}}
	client, err := containerd.New("",
		containerd.WithServices(containerd.WithContentStore(cs), containerd.WithImageStore(is)))
	if err != nil {
		t.Fatal(err)
	}
	open := func(ref string) Source {
		s := mustParse(t, "containerd:"+ref, Config{})
		s.(*store).client = client
		return s
	}
	for _, ref := range []string{"docker.io/library/example:latest", "docker.io/library/example"} {
		img, err := find(t, open(ref), "linux/amd64")
		if err != nil || img.Digest != m.Digest {
			t.Errorf("%s: found %+v (%v), expected %s", ref, img, err, m.Digest)
		}
	}
	if _, err := find(t, open("other"), ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("error %v, expected %v", err, ErrNotFound)
	}
	// For an image with missing layers, the error names one and gives advice.
	var manifest ocispec.Manifest
	if err := json.Unmarshal(l.Read(m.Digest), &manifest); err != nil {
		t.Fatal(err)
	}
	if err := cs.Delete(ctx, manifest.Layers[0].Digest); err != nil {
		t.Fatal(err)
	}
	img, err := open("docker.io/library/example").Image(ctx, Host())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.Layers[0].Open(ctx); err == nil ||
		!strings.Contains(err.Error(), "pull the image with all its content") {
		t.Errorf("error %v, expected it to say what to do", err)
	}
}

// TestDockerArchive: a repeated layer is a link, and a wrong configuration is detected.
func TestDockerArchive(t *testing.T) {
	file := filepath.Join(t.TempDir(), "docker.tar")
	a, b := oneFile("a"), oneFile("b")
	ocitest.DockerArchive(t, file, "example:v1", a, b, a)
	img, err := find(t, mustParse(t, "docker-archive:"+file, Config{}), "")
	if err != nil || len(img.Layers) != 3 || img.Layers[0].DiffID != img.Layers[2].DiffID {
		t.Errorf("found %+v (%v), expected 3 layers", img, err)
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	bad := strings.Replace(string(raw), `"architecture":"amd64"`, `"architecture":"arm64"`, 1)
	if err := os.WriteFile(file, []byte(bad), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := find(t, mustParse(t, "docker-archive:"+file, Config{}), ""); !errors.Is(err, blob.ErrMismatch) {
		t.Errorf("error %v, expected %v", err, blob.ErrMismatch)
	}
}

// TestDockerArchiveOfOthers: crane and ko name the configuration by its whole digest.
func TestDockerArchiveOfOthers(t *testing.T) {
	img, err := random.Image(1000, 3)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag("example.com/some/image:v1")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "docker.tar")
	if err := tarball.WriteToFile(file, tag, img); err != nil {
		t.Fatal(err)
	}
	got, err := find(t, mustParse(t, "docker-archive:"+file+":example.com/some/image:v1", Config{}), "")
	if err != nil || len(got.Layers) != 3 || got.Digest != digest.FromBytes(config) {
		t.Errorf("found %+v (%v), expected 3 layers of %s", got, err, digest.FromBytes(config))
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b = bytes.Replace(b, []byte(`"created_by":"random`), []byte(`"created_by":"nobody`), 1)
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := find(t, mustParse(t, "docker-archive:"+file, Config{}), ""); !errors.Is(err, blob.ErrMismatch) {
		t.Errorf("error %v, expected %v", err, blob.ErrMismatch)
	}
}

// TestSparseArchive: the bytes of a layer with holes are not contiguous in the archive.
func TestSparseArchive(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	big := ocitest.Layer{Tar: Tar(Reg("zeros", strings.Repeat("\x00", 4<<20)))}
	m := l.Manifest(platform("amd64", ""), big)
	l.Tag("", m)
	layer := l.BlobPath(digest.FromBytes(big.Tar))
	f, err := os.OpenFile(layer, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1<<20,
		2<<20); err != nil {
		t.Skipf("needs a file system with holes: %v", err)
	}
	f.Close()
	for _, format := range []string{"--format=gnu", "--format=pax"} {
		file := filepath.Join(t.TempDir(), "oci.tar")
		if msg, err := exec.Command("tar", format, "--sparse", "-cf", file, "-C", l.Dir,
			".").CombinedOutput(); err != nil {
			t.Skipf("needs GNU tar: %v: %s", err, msg)
		}
		img, err := mustParse(t, "oci-archive:"+file, Config{}).Image(t.Context(), Host())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := img.Layers[0].Open(t.Context()); err == nil || !strings.Contains(err.Error(), "has holes") {
			t.Errorf("%s: error %v, expected one about holes", format, err)
		}
	}
}
