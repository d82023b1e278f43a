package source

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// TestIndexesThatMultiply: eight levels of indexes, each naming the next one a hundred times, are read
// once; an index with too many documents is refused.
func TestIndexesThatMultiply(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	d := l.Manifest(platform("amd64", ""), oneFile("a"))
	for range maxNesting {
		many := make([]ocispec.Descriptor, 100)
		for i := range many {
			many[i] = d
		}
		d = l.Index(many...)
	}
	l.Tag("same", d)
	if _, err := find(t, mustParse(t, "oci:"+l.Dir+":same", Config{}), "linux/amd64"); err != nil {
		t.Error(err)
	}
	for name, there := range map[string]bool{"there": true, "missing": false} {
		var many []ocispec.Descriptor
		for i := range maxDocuments + 1 {
			doc := fmt.Sprintf(`{"schemaVersion":2,"manifests":[],"annotations":{"n":"%d"}}`, i)
			m := ocispec.Descriptor{
				MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromString(doc), Size: int64(len(doc)),
			}
			if there {
				m = l.Blob(m.MediaType, []byte(doc))
			}
			many = append(many, m)
		}
		l.Tag(name, l.Index(many...))
		_, err := find(t, mustParse(t, "oci:"+l.Dir+":"+name, Config{}), "linux/amd64")
		if !errors.Is(err, errTooMany) {
			t.Errorf("%s: error %v, expected %v", name, err, errTooMany)
		}
	}
}

// TestManifestsWithoutPlatform: each manifest and its configuration must be read.
func TestManifestsWithoutPlatform(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	var many []ocispec.Descriptor
	for i := range 600 {
		d := l.Manifest(platform("amd64", fmt.Sprint("v", i+10)), ocitest.Layer{Tar: Tar()})
		d.Platform = nil
		many = append(many, d)
	}
	one := l.Manifest(platform("amd64", ""), oneFile("a"))
	one.Platform = nil
	for n, want := range map[int]error{400: nil, 600: errTooMany} {
		src := "oci:" + layoutOf(t, l, l.Index(append(many[:n:n], one)...))
		if _, err := find(t, mustParse(t, src, Config{}), "linux/amd64"); !errors.Is(err, want) {
			t.Errorf("%d manifests: %v, expected %v", n, err, want)
		}
	}
	// Many images, none of them named.
	for i := range many {
		many[i].Annotations = map[string]string{ocispec.AnnotationRefName: fmt.Sprint("v", i)}
	}
	_, err := find(t, mustParse(t, "oci:"+layoutOf(t, l, many...), Config{}), "")
	if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), `"v1"`) {
		t.Errorf("error %v, expected that no tag was given", err)
	}
}

// TestLargeDocuments: each is within its limit, but their sum is not.
func TestLargeDocuments(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	var all []ocispec.Descriptor
	for i := range 6 {
		b := fmt.Sprintf(`{"schemaVersion":2,"manifests":[],"annotations":{"%d":"%s"}}`, i, strings.Repeat("x", 7<<20))
		all = append(all, l.Blob(ocispec.MediaTypeImageIndex, []byte(b)))
	}
	l.Tag("x", l.Index(all...))
	_, err := find(t, mustParse(t, "oci:"+l.Dir+":x", Config{}), "")
	if !errors.Is(err, errTooMany) {
		t.Errorf("error %v, expected %v", err, errTooMany)
	}
}

// TestAmbiguousDocuments: a document readable as a manifest and as an index is refused, like in containerd.
func TestAmbiguousDocuments(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	good := l.Manifest(platform("amd64", ""), oneFile("a"))
	manifest, index := l.Read(good.Digest), l.Read(l.Index(good).Digest)
	with := func(doc []byte, field string) string { return strings.TrimSuffix(string(doc), "}") + "," + field + "}" }
	list := `"manifests":[` +
		fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, good.MediaType, good.Digest, good.Size) + `]`
	cs, err := local.NewStore(l.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct{ mediaType, doc string }{
		{ocispec.MediaTypeImageManifest, string(manifest)},
		{ocispec.MediaTypeImageManifest, with(manifest, list)},
		{ocispec.MediaTypeImageManifest, with(manifest, `"manifests":[]`)},
		{ocispec.MediaTypeImageManifest, with(manifest, `"manifests":null`)},
		{ocispec.MediaTypeImageManifest, with(manifest, `"fsLayers":[]`)},
		{ocispec.MediaTypeImageManifest, with(manifest, `"mediaType":"`+ocispec.MediaTypeImageIndex+`"`)},
		{ocispec.MediaTypeImageManifest, with(manifest, `"mediaType":"`+dockerIndex+`"`)},
		{ocispec.MediaTypeImageManifest, with(manifest, `"mediaType":"`+dockerManifest+`"`)},
		{ocispec.MediaTypeImageManifest, with(manifest, `"mediaType":"other"`)},
		{ocispec.MediaTypeImageManifest, string(index)},
		{dockerManifest, string(index)},
		{dockerManifest, string(manifest)},
		{ocispec.MediaTypeImageIndex, string(index)},
		{dockerIndex, string(index)},
		{ocispec.MediaTypeImageIndex, string(manifest)},
		{ocispec.MediaTypeImageIndex, with(index, `"config":{}`)},
		{ocispec.MediaTypeImageIndex, with(index, `"layers":[]`)},
		{ocispec.MediaTypeImageIndex, with(index, `"fsLayers":[]`)},
		{ocispec.MediaTypeImageIndex, with(index, `"mediaType":"`+ocispec.MediaTypeImageManifest+`"`)},
		{ocispec.MediaTypeImageIndex, with(index, `"subject":{}`)},
	} {
		d := l.Blob(c.mediaType, []byte(c.doc))
		tag := fmt.Sprint(i)
		l.Tag(tag, d)
		_, want := images.Manifest(t.Context(), cs, d, platforms.OnlyStrict(platform("amd64", "")))
		_, err := find(t, mustParse(t, "oci:"+l.Dir+":"+tag, Config{}), "linux/amd64")
		if (err == nil) != (want == nil) || err != nil && !errors.Is(err, ErrMediaType) {
			t.Errorf("%s: %s\ncontainerd: %v\nfound:      %v", c.mediaType, c.doc, want, err)
		}
	}
}

// TestInlineDocuments: a descriptor may embed its document if the digest is right, as in containerd.
func TestInlineDocuments(t *testing.T) {
	l := ocitest.NewLayout(t, t.TempDir())
	good := l.Manifest(platform("amd64", ""), oneFile("a"))
	doc := l.Read(good.Digest)
	cs, err := local.NewStore(l.Dir)
	if err != nil {
		t.Fatal(err)
	}
	other := bytes.Replace(doc, []byte("layer"), []byte("Layer"), 1) // equally long
	for _, stored := range []bool{true, false} {
		if !stored {
			if err := os.Remove(l.BlobPath(good.Digest)); err != nil {
				t.Fatal(err)
			}
		}
		for name, data := range map[string][]byte{"right": doc, "other": other, "short": doc[1:], "none": nil} {
			d := good
			d.Data = data
			tag := fmt.Sprint(name, stored)
			l.Tag(tag, d)
			_, want := images.Manifest(t.Context(), cs, d, platforms.OnlyStrict(platform("amd64", "")))
			_, err := find(t, mustParse(t, "oci:"+l.Dir+":"+tag, Config{}), "linux/amd64")
			if (err == nil) != (want == nil) {
				t.Errorf("%s, stored %v\ncontainerd: %v\nfound:      %v", name, stored, want, err)
			}
		}
	}
}

// TestNoFile: only regular files are opened. Opening a FIFO would block for ever.
func TestNoFile(t *testing.T) {
	for kind, mk := range map[string]func(string) error{
		"fifo":      func(name string) error { return unix.Mkfifo(name, 0o600) },
		"directory": func(name string) error { return os.Mkdir(name, 0o700) },
		"device":    func(name string) error { return os.Symlink("/dev/zero", name) },
	} {
		for _, what := range []string{"index", "manifest", "layer", "archive"} {
			l := ocitest.NewLayout(t, t.TempDir())
			m := l.Manifest(platform("amd64", ""), oneFile("a"))
			l.Tag("", m)
			src := mustParse(t, "oci:"+l.Dir, Config{})
			img, err := src.Image(t.Context(), Host())
			if err != nil {
				t.Fatal(err)
			}
			name := filepath.Join(l.Dir, "index.json")
			switch what {
			case "manifest":
				name = l.BlobPath(m.Digest)
			case "layer":
				name = l.BlobPath(img.Layers[0].Desc.Digest)
			case "archive":
				src = mustParse(t, "oci-archive:"+name, Config{})
			}
			if err := errors.Join(os.Remove(name), mk(name)); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() {
				var err error
				if what == "layer" {
					_, err = img.Layers[0].Open(t.Context())
				} else {
					_, err = src.Image(t.Context(), Host())
				}
				done <- err
			}()
			select {
			case err := <-done:
				want := "is not a regular file"
				if kind == "directory" && what == "archive" {
					want = "is a directory"
				}
				if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), name) {
					t.Errorf("%s as %s: error %v, expected one that names the file", kind, what, err)
				}
			case <-time.After(time.Minute):
				t.Fatalf("%s as %s: still waiting", kind, what)
			}
		}
	}
}

// TestArchiveBomb: a compressed archive is stopped before it fills the disk, and can be interrupted.
func TestArchiveBomb(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	file := filepath.Join(t.TempDir(), "docker.tar.gz")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	z := gzip.NewWriter(f)
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&tar.Header{
		Name: "zeros", Typeflag: tar.TypeReg, Size: 32 << 20,
		Mode: 0o600,
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 32<<20)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Close(), z.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"docker-archive:", "oci-archive:"} {
		src := mustParse(t, kind+file, Config{MaxSize: 16 << 20})
		if _, err := src.Image(context.Background(), Host()); !errors.Is(err, blob.ErrTooLarge) {
			t.Errorf("%s: error %v, expected %v", kind, err, blob.ErrTooLarge)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := mustParse(t, kind+file, Config{}).Image(ctx, Host()); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: error %v, expected %v", kind, err, context.Canceled)
		}
	}
	left, err := os.ReadDir(tmp)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}

// TestArchivePaths: no name in an archive or a layout leads to a file outside of it.
func TestArchivePaths(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte(`{"rootfs":{"type":"layers"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "docker.tar")
	for _, c := range []struct{ config, link string }{
		{"../secret", ""},
		{filepath.Join(dir, "secret"), ""},
		{"config", "../secret"},
		{"config", filepath.Join(dir, "secret")},
		{"config", "config"},
		{"config", "/proc/self/environ"},
	} {
		f, err := os.Create(file)
		if err != nil {
			t.Fatal(err)
		}
		w := tar.NewWriter(f)
		doc := fmt.Sprintf(`[{"Config":%q,"Layers":[]}]`, c.config)
		err = errors.Join(
			w.WriteHeader(&tar.Header{Name: "manifest.json", Typeflag: tar.TypeReg, Size: int64(len(doc))}),
			write(w, doc),
			w.WriteHeader(&tar.Header{Name: "config", Typeflag: tar.TypeSymlink, Linkname: c.link}),
			w.Close(), f.Close())
		if err != nil {
			t.Fatal(err)
		}
		_, err = mustParse(t, "docker-archive:"+file, Config{}).Image(context.Background(), Host())
		if err == nil || !strings.Contains(err.Error(), "is not in the archive") {
			t.Errorf("%+v: error %v, expected that it is not in the archive", c, err)
		}
	}
	l := ocitest.NewLayout(t, filepath.Join(dir, "layout"))
	l.Tag("x", ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: "sha256:../../../secret", Size: 1})
	if _, err := mustParse(t, "oci:"+l.Dir+":x", Config{}).Image(context.Background(), Host()); err == nil ||
		!strings.Contains(err.Error(), `digest "sha256:../../../secret"`) {
		t.Errorf("error %v, expected one about the digest", err)
	}
}

func write(w *tar.Writer, s string) error {
	_, err := w.Write([]byte(s))
	return err
}
