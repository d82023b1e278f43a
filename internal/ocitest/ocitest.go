// Package ocitest makes OCI images for tests, in a layout directory or in archives.
package ocitest

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Compression of a layer blob.
type Compression string

// The compressions of layers in the wild.
const (
	None Compression = ""
	Gzip Compression = "gzip"
	Zstd Compression = "zstd"
)

// Layer is a tar, its compression, and optional lies about it.
type Layer struct {
	Tar         []byte
	Compression Compression
	MediaType   string // replaces the correct one
	DiffID      digest.Digest
}

// Pack compresses b, fast: readers do not depend on the level.
func Pack(tb testing.TB, b []byte, c Compression) []byte {
	tb.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	switch c {
	case None:
		return b
	case Gzip:
		z, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
		if err != nil {
			tb.Fatal(err)
		}
		w = z
	case Zstd:
		z, err := zstd.NewWriter(&out, zstd.WithEncoderLevel(zstd.SpeedFastest))
		if err != nil {
			tb.Fatal(err)
		}
		w = z
	default:
		tb.Fatalf("compression %q", c)
	}
	if _, err := w.Write(b); err != nil {
		tb.Fatal(err)
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return out.Bytes()
}

// Layout is an OCI image layout under construction.
type Layout struct {
	Dir   string
	tb    testing.TB
	index ocispec.Index
}

// NewLayout starts a layout in dir.
func NewLayout(tb testing.TB, dir string) *Layout {
	tb.Helper()
	l := &Layout{Dir: dir, tb: tb}
	l.index.Versioned = specs.Versioned{SchemaVersion: 2}
	l.index.MediaType = ocispec.MediaTypeImageIndex
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		tb.Fatal(err)
	}
	l.file("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	l.save()
	return l
}

func (l *Layout) file(name string, b []byte) {
	l.tb.Helper()
	if err := os.WriteFile(filepath.Join(l.Dir, name), b, 0o644); err != nil {
		l.tb.Fatal(err)
	}
}

func (l *Layout) save() {
	l.tb.Helper()
	b, err := json.Marshal(l.index)
	if err != nil {
		l.tb.Fatal(err)
	}
	l.file("index.json", b)
}

// BlobPath returns the path of a blob.
func (l *Layout) BlobPath(d digest.Digest) string {
	return filepath.Join(l.Dir, "blobs", string(d.Algorithm()), d.Encoded())
}

// Read returns a blob.
func (l *Layout) Read(d digest.Digest) []byte {
	l.tb.Helper()
	b, err := os.ReadFile(l.BlobPath(d))
	if err != nil {
		l.tb.Fatal(err)
	}
	return b
}

// Registry serves the image of a manifest under any name, and sends one of its layers with send.
func (l *Layout) Registry(manifest ocispec.Descriptor, layer digest.Digest,
	send func(http.ResponseWriter, *http.Request, []byte),
) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kind, id := path.Split(r.URL.Path)
		switch {
		case kind == "/v2/":
			return
		case strings.HasSuffix(kind, "/manifests/"):
			id = manifest.Digest.String()
			w.Header().Set("Content-Type", manifest.MediaType)
		}
		b, err := os.ReadFile(l.BlobPath(digest.Digest(id)))
		switch {
		case err != nil:
			l.tb.Error(err)
			http.NotFound(w, r)
		case id == layer.String():
			send(w, r, b)
		default:
			_, _ = w.Write(b)
		}
	})
}

// Blob adds a blob.
func (l *Layout) Blob(mediaType string, b []byte) ocispec.Descriptor {
	l.tb.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	l.file(filepath.Join("blobs", "sha256", d.Digest.Encoded()), b)
	return d
}

// JSON adds a JSON document.
func (l *Layout) JSON(mediaType string, v any) ocispec.Descriptor {
	l.tb.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		l.tb.Fatal(err)
	}
	return l.Blob(mediaType, b)
}

// LinuxAMD64 is the platform of images that name none.
var LinuxAMD64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}

// Manifest adds layers, a configuration and a manifest, and returns the manifest's descriptor with its platform.
func (l *Layout) Manifest(p ocispec.Platform, layers ...Layer) ocispec.Descriptor {
	l.tb.Helper()
	config := ocispec.Image{Platform: p, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, y := range layers {
		t := ocispec.MediaTypeImageLayer
		if y.Compression != None {
			t += "+" + string(y.Compression)
		}
		if y.MediaType != "" {
			t = y.MediaType
		}
		m.Layers = append(m.Layers, l.Blob(t, Pack(l.tb, y.Tar, y.Compression)))
		id := y.DiffID
		if id == "" {
			id = digest.FromBytes(y.Tar)
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, id)
	}
	m.Config = l.JSON(ocispec.MediaTypeImageConfig, config)
	d := l.JSON(ocispec.MediaTypeImageManifest, m)
	d.Platform = &p
	return d
}

// Index adds an index.
func (l *Layout) Index(manifests ...ocispec.Descriptor) ocispec.Descriptor {
	l.tb.Helper()
	return l.JSON(ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests,
	})
}

// Tag puts a descriptor into index.json, with a tag unless that is empty.
func (l *Layout) Tag(tag string, d ocispec.Descriptor) {
	l.tb.Helper()
	if tag != "" {
		d.Annotations = map[string]string{ocispec.AnnotationRefName: tag}
	}
	l.index.Manifests = append(l.index.Manifests, d)
	l.save()
}

// Archive writes the layout as a tar file.
func (l *Layout) Archive(file string) {
	l.tb.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	if err := w.AddFS(os.DirFS(l.Dir)); err != nil {
		l.tb.Fatal(err)
	}
	if err := w.Close(); err != nil {
		l.tb.Fatal(err)
	}
	if err := os.WriteFile(file, out.Bytes(), 0o644); err != nil {
		l.tb.Fatal(err)
	}
}

// DockerArchive writes the format of docker save before version 25: layers are tars in their own
// directories, and a repeated layer is a link.
func DockerArchive(tb testing.TB, file, ref string, layers ...Layer) {
	tb.Helper()
	config := ocispec.Image{Platform: LinuxAMD64, RootFS: ocispec.RootFS{Type: "layers"}}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	add := func(name string, b []byte) {
		tb.Helper()
		if err := w.WriteHeader(&tar.Header{
			Name: name, Mode: 0o644, Size: int64(len(b)),
			Typeflag: tar.TypeReg,
		}); err != nil {
			tb.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			tb.Fatal(err)
		}
	}
	seen := map[digest.Digest]string{}
	var names []string
	for i, y := range layers {
		id := y.DiffID
		if id == "" {
			id = digest.FromBytes(y.Tar)
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, id)
		name := fmt.Sprintf("%d/layer.tar", i)
		if first, ok := seen[id]; ok {
			h := &tar.Header{Name: name, Linkname: "../" + first, Typeflag: tar.TypeSymlink, Mode: 0o777}
			if err := w.WriteHeader(h); err != nil {
				tb.Fatal(err)
			}
		} else {
			add(name, Pack(tb, y.Tar, y.Compression))
			seen[id] = name
		}
		names = append(names, name)
	}
	doc, err := json.Marshal(config)
	if err != nil {
		tb.Fatal(err)
	}
	configName := digest.FromBytes(doc).Encoded() + ".json"
	add(configName, doc)
	manifest, err := json.Marshal([]map[string]any{{"Config": configName, "RepoTags": []string{ref}, "Layers": names}})
	if err != nil {
		tb.Fatal(err)
	}
	add("manifest.json", manifest)
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(file, out.Bytes(), 0o644); err != nil {
		tb.Fatal(err)
	}
}
