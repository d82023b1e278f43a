package recompress

import (
	"context"
	"fmt"
	"io"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
)

// Destination is a place that takes an image. Its methods are called in the order in which an image needs them: what a
// document names comes before it.
type Destination interface {
	// take brings a blob in without its bytes, if the destination has it or can get it by itself. It is called from
	// several goroutines.
	take(ctx context.Context, d ocispec.Descriptor) (bool, error)
	// blob takes a blob, and tells up how it goes over the network, if it does. It is called from several goroutines.
	blob(ctx context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error), up upload) error
	// manifest takes an index or a manifest that another one names.
	manifest(ctx context.Context, d ocispec.Descriptor, doc []byte) error
	// name takes the index or the manifest that the destination's name is to lead to, and nothing follows.
	name(ctx context.Context, d ocispec.Descriptor, doc []byte) error
	// counts are the bytes of blobs by how they came to a registry.
	counts() (sent, mounted, present int64)

	// Close frees what the destination holds. What has no name yet is dropped where that is possible.
	Close() error
	// String is the destination as a user would write it.
	String() string
}

// upload is told how one blob is sent. Nil functions mean that nobody wants to know.
type upload struct {
	// begin says that the blob is sent now, from its beginning, and sent that n more bytes of it were.
	begin func()
	sent  func(n int)
}

// Config is what destinations need to know beside their name.
type Config struct {
	// PlainHTTP, HostDirs and Notify are as those of source.Config.
	PlainHTTP bool
	HostDirs  []string
	Notify    func(message string)
	// Source is where the image comes from. A registry takes blobs from another repository of its own.
	Source string
}

// Kinds lists the forms of a destination, for help texts.
const Kinds = "docker://REF, oci:DIR[:TAG] or oci-archive:FILE[:TAG]"

// ParseDestination turns the name of a destination into a Destination, which the caller closes. Nothing is written yet.
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
