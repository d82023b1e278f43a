// Package source finds the layers of an OCI image in any kind of storage and verifies the documents
// that lead to them.
//
//	src, err := source.Parse("oci:layout:latest", source.Config{})
//	...
//	defer src.Close()
//	img, err := src.Image(ctx, source.Host())
//
// Indexes, manifests and configurations are limited in size and verified by digest and size before
// use. Layers are only described: their reader verifies them (package blob).
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

// Layer is one layer of an image.
type Layer struct {
	// Desc holds the blob's media type, digest and size. The digest is empty in a docker archive.
	Desc ocispec.Descriptor
	// DiffID is the digest of the uncompressed tar, from the image's configuration.
	DiffID digest.Digest
	// Open opens the blob. The caller closes the result and verifies what it reads.
	Open func(ctx context.Context) (io.ReadCloser, error)

	parts func(ctx context.Context) (Parts, error) // nil: use Open
}

// Name returns the layer's name for messages: its digest, or its diff ID if the digest is unknown.
func (l Layer) Name() string {
	if l.Desc.Digest != "" {
		return l.Desc.Digest.String()
	}
	return l.DiffID.String()
}

// Blob returns what the blob's reader needs to verify it.
func (l Layer) Blob() blob.Spec {
	return blob.Spec{MediaType: l.Desc.MediaType, Digest: l.Desc.Digest, Size: l.Desc.Size, DiffID: l.DiffID}
}

// Image is an image with layers, or with one tree.
type Image struct {
	// Digest is the digest of the manifest, or of the configuration if there is no manifest; empty for a tree.
	Digest digest.Digest
	// Platform is the platform that the image declares; zero for a tree.
	Platform ocispec.Platform
	// Name is the complete reference of the image; empty if the source does not use references.
	Name string
	// Layers, bottom first.
	Layers []Layer
	// Manifest is the document with that Digest and the media type ManifestType; nil if there is none.
	// Config is the configuration; nil for a tree.
	Manifest     []byte
	ManifestType string
	Config       []byte
	// Remote means that layers come over a network: a reader that pauses for long may lose its connection.
	Remote bool
	// Tree reads a source without layers (rootfs, daxfs) as one layer, until the source is closed; nil for
	// a source with layers.
	Tree func(ctx context.Context, s layer.Store, lim layer.Limits) (*layer.Layer, error)
}

// Source is a place that holds an image. It belongs to one goroutine, but the layers of its images may
// be opened and read concurrently until Close.
type Source interface {
	// Image finds the image for a platform.
	Image(ctx context.Context, p Platform) (*Image, error)
	// Close frees the resources of the source.
	Close() error
	// String returns the source as a user would write it.
	String() string
}

var (
	// ErrNotFound reports that a source does not hold the named image.
	ErrNotFound = errors.New("image not found")
	// ErrAmbiguous reports that several images suit a platform equally well.
	ErrAmbiguous = errors.New("several images")
	// ErrPlatform reports that there is no image for the requested platform.
	ErrPlatform = errors.New("no image for the platform")
	// ErrMediaType reports a manifest or configuration that does not belong to a container image.
	ErrMediaType = errors.New("unsupported media type")
)

// Config holds the settings of sources besides their names.
type Config struct {
	// PlainHTTP lets docker:// access a registry without TLS.
	PlainHTTP bool
	// HostDirs are directories in the format of containerd's certs.d, for docker://. They name mirrors and
	// certificates.
	HostDirs []string
	// Notify receives one line whenever docker:// is delayed; nil means the log. Several goroutines may call it.
	Notify func(message string)
	// Address is containerd's socket and Namespace a namespace in it, for containerd:.
	Address   string
	Namespace string
	// OverlayUpper means that the directory of rootfs: is the upper directory of an overlay.
	OverlayUpper bool
	// MaxSize bounds the decompressed bytes of a compressed archive; 0 means DefaultMaxSize.
	MaxSize int64
}

// DefaultMaxSize is the default of Config.MaxSize.
const DefaultMaxSize = 256 << 30

// Kinds lists the forms of a source, for help texts.
const Kinds = "oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:REF], docker://REF, containerd:REF, " +
	"rootfs:DIR or daxfs:FILE"

// Parse returns the Source for a name. It opens nothing. The caller closes the Source.
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
			// An empty path usually comes from an unset shell variable. Refuse it; do not read the working directory.
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

// Absolute makes the path in a source's name absolute, for a process with another working directory.
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

func splitTag(s string) (path, tag string) {
	if i := strings.LastIndexByte(s, '@'); i >= 0 && isDigest(s[i+1:]) {
		return s[:i], s[i+1:]
	}
	return splitPath(s)
}

// isDigest reports whether tag is a digest, valid or not.
func isDigest(tag string) bool {
	algorithm, _, ok := strings.Cut(tag, ":")
	return ok && digest.Algorithm(algorithm).Available()
}

// splitPath splits PATH[:TAG]. If PATH may hold a colon, it takes the shortest PATH that exists.
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
