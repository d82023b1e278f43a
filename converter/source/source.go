// Package source finds the layers of an OCI image wherever it is kept, and verifies all that leads to them.
//
//	src, err := source.Parse("oci:layout:latest", source.Config{})
//	...
//	defer src.Close()
//	img, err := src.Image(ctx, source.Host())
//
// Indexes, manifests and configurations are checked against their digest and size before they are believed, and
// bounded in size. Layers are only described here: whoever reads one verifies it (package blob).
package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/converter/layer"
)

// Layer is one layer of an image that was found.
type Layer struct {
	// Desc is the blob's media type, digest and size. The digest is empty where a source has none (a docker archive).
	Desc ocispec.Descriptor
	// DiffID is the digest of the uncompressed tar, from the image's configuration.
	DiffID digest.Digest
	// Open starts to read the blob. The caller closes the result, and verifies what it reads.
	Open func(ctx context.Context) (io.ReadCloser, error)

	parts func(ctx context.Context) (Parts, error) // nil: Open does
}

// Name is how messages call the layer: its digest, or its diff ID where the source knows no digest.
func (l Layer) Name() string {
	if l.Desc.Digest != "" {
		return l.Desc.Digest.String()
	}
	return l.DiffID.String()
}

// Blob describes the blob to whoever reads and verifies it.
func (l Layer) Blob() blob.Spec {
	return blob.Spec{MediaType: l.Desc.MediaType, Digest: l.Desc.Digest, Size: l.Desc.Size, DiffID: l.DiffID}
}

// Image is an image that was found: layers bottom first, or one tree.
type Image struct {
	// Digest is that of the manifest, or of the configuration where there is no manifest; empty for a tree.
	Digest digest.Digest
	// Platform the image says it is for; zero for a tree.
	Platform ocispec.Platform
	// Name is the whole reference by which the image was found; empty where a source finds images by other means.
	Name string
	// Layers, bottom first.
	Layers []Layer
	// Manifest is the document with that Digest, of the media type ManifestType; nil where there is none. Config is the
	// configuration; nil for a tree.
	Manifest     []byte
	ManifestType string
	Config       []byte
	// Remote says that the layers come over a network: whoever stops to read one for long may lose it.
	Remote bool
	// Tree reads the tree of a source that has no layers (rootfs, daxfs) as one layer, until the source is closed; nil where
	// there are layers.
	Tree func(ctx context.Context, s layer.Store, lim layer.Limits) (*layer.Layer, error)
}

// Source is a place that holds an image. It is for one goroutine, but the layers of its images can be opened and read
// concurrently, until Close.
type Source interface {
	// Image finds the image for a platform.
	Image(ctx context.Context, p Platform) (*Image, error)
	// Close frees what the source holds open.
	Close() error
	// String is the source as a user would write it.
	String() string
}

var (
	// ErrNotFound is returned when a source does not hold the image that was named.
	ErrNotFound = errors.New("image not found")
	// ErrAmbiguous is returned when several images suit a platform equally well.
	ErrAmbiguous = errors.New("several images")
	// ErrPlatform is returned when an image does not exist for the platform that was asked for.
	ErrPlatform = errors.New("no image for the platform")
	// ErrMediaType is returned for manifests and configurations that are not those of a container image.
	ErrMediaType = errors.New("unsupported media type")
)

// Config is what sources need to know beside their name.
type Config struct {
	// PlainHTTP lets docker:// talk to a registry without TLS.
	PlainHTTP bool
	// HostDirs are directories in the form of containerd's certs.d, for docker://. They name mirrors and certificates.
	HostDirs []string
	// Notify is told, in one line, what holds docker:// up; nil means the log. It may be called from several goroutines.
	Notify func(message string)
	// Address of containerd's socket and the Namespace in it, for containerd:.
	Address   string
	Namespace string
	// OverlayUpper says that the directory of rootfs: is the upper directory of an overlay.
	OverlayUpper bool
	// MaxSize bounds the bytes that a compressed archive may unpack to; 0 means DefaultMaxSize.
	MaxSize int64
}

// DefaultMaxSize is the default of Config.MaxSize.
const DefaultMaxSize = 256 << 30

// Kinds lists the forms of a source, for help texts.
const Kinds = "oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:REF], docker://REF, containerd:REF, rootfs:DIR or daxfs:FILE"

// Parse turns the name of a source into a Source, which the caller closes. Nothing is opened or asked yet.
func Parse(name string, c Config) (Source, error) {
	kind, rest, ok := strings.Cut(name, ":")
	if !ok || rest == "" {
		return nil, fmt.Errorf("source %q: expected %s", name, Kinds)
	}
	if c.OverlayUpper && kind != "rootfs" {
		return nil,
			fmt.Errorf("source %q: only the directory of rootfs: can be the upper directory of an overlay", name)
	}
	switch kind {
	case "oci", "oci-archive", "docker-archive":
		path, tag := splitTag(rest)
		if kind == "docker-archive" {
			path, tag = splitPath(rest)
		}
		if path == "" {
			// An empty path usually comes from an unset shell variable. It does not mean the working directory.
			return nil, fmt.Errorf("source %q: no path, expected %s", name, Kinds)
		}
		switch kind {
		case "oci":
			return &layout{name: name, dir: path, tag: tag}, nil
		case "oci-archive":
			return &ociArchive{name: name, file: path, tag: tag, limit: c.MaxSize}, nil
		}
		return &dockerArchive{name: name, file: path, ref: tag, limit: c.MaxSize}, nil
	case "docker":
		ref, ok := strings.CutPrefix(rest, "//")
		if !ok {
			return nil, fmt.Errorf("source %q: expected docker://REF", name)
		}
		return newRegistry(name, ref, c)
	case "containerd":
		return newContainerd(name, rest, c)
	case "rootfs":
		return &rootfs{name: name, dir: rest, upper: c.OverlayUpper}, nil
	case "daxfs":
		return &imageFile{name: name, file: rest}, nil
	}
	return nil, fmt.Errorf("source %q: unknown kind %q, expected %s", name, kind, Kinds)
}

// Absolute returns the name of a source with an absolute path, for a process with another working directory.
func Absolute(name string) (string, error) {
	kind, rest, _ := strings.Cut(name, ":")
	switch kind {
	case "oci", "oci-archive", "docker-archive", "rootfs", "daxfs":
		if rest == "" || filepath.IsAbs(rest) {
			return name, nil
		}
		dir, err := os.Getwd()
		return kind + ":" + filepath.Clean(dir) + "/" + rest, err
	}
	return name, nil
}

// splitTag splits PATH[:TAG] or PATH[@DIGEST].
func splitTag(s string) (path, tag string) {
	if i := strings.LastIndexByte(s, '@'); i >= 0 && isDigest(s[i+1:]) {
		return s[:i], s[i+1:]
	}
	return splitPath(s)
}

// isDigest tells a digest, also one that is wrong, from a tag.
func isDigest(tag string) bool {
	algorithm, _, ok := strings.Cut(tag, ":")
	return ok && digest.Algorithm(algorithm).Available()
}

// splitPath splits PATH[:TAG]. If the path holds a colon, it is what exists, the shortest first.
func splitPath(s string) (path, tag string) {
	for i := range len(s) {
		if i > 0 && s[i] == ':' && exists(s[:i]) {
			return s[:i], s[i+1:]
		}
	}
	if exists(s) {
		return s, ""
	}
	path, tag, _ = strings.Cut(s, ":")
	return path, tag
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
