package recompress

import (
	"context"
	"fmt"
	"io"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
)

// Destination is a place that takes an image. The caller passes the parts of a document before the document.
type Destination interface {
	// take adds a blob without its bytes, if the destination has it or can get it by itself. Several
	// goroutines call it.
	take(ctx context.Context, d ocispec.Descriptor) (bool, error)
	// blob adds a blob and reports an upload over the network to up. Several goroutines call it.
	blob(ctx context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error), up upload) error
	// manifest adds an index or a manifest that another document names.
	manifest(ctx context.Context, d ocispec.Descriptor, doc []byte) error
	// name adds the index or the manifest for the destination's name. It is the last call.
	name(ctx context.Context, d ocispec.Descriptor, doc []byte) error
	// counts returns the bytes of blobs by the way they came to a registry.
	counts() (sent, mounted, present int64)

	// Close frees the resources of the destination and drops unnamed content where possible.
	Close() error
	// String returns the destination as a user would write it.
	String() string
}

// upload observes the sending of one blob. Its functions may be nil.
type upload struct {
	// begin is called whenever sending starts from the beginning, sent for each n bytes sent.
	begin func()
	sent  func(n int)
}

// Config holds the settings of destinations besides their names.
type Config struct {
	// PlainHTTP, HostDirs and Notify are those of source.Config.
	PlainHTTP bool
	HostDirs  []string
	Notify    func(message string)
	// Source is the source of the image. A registry mounts blobs from its repository if it is the same registry.
	Source string
}

// Kinds lists the forms of a destination, for help texts.
const Kinds = "docker://REF, oci:DIR[:TAG] or oci-archive:FILE[:TAG]"

// ParseDestination returns the Destination for a name. It writes nothing. The caller closes the Destination.
func ParseDestination(name string, c Config) (Destination, error) {
	kind, rest, _ := strings.Cut(name, ":")
	switch kind {
	case "docker":
		if ref, ok := strings.CutPrefix(rest, "//"); ok && ref != "" {
			return newRegistry(name, ref, c)
		}
	case "oci", "oci-archive":
		path, tag := source.SplitTag(rest)
		if path == "" {
			break
		}
		if kind == "oci" {
			return &layout{kind: name, dir: path, tag: tag}, nil
		}
		return newArchive(name, path, tag)
	}
	return nil, fmt.Errorf("destination %q: expected %s", name, Kinds)
}
