package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

type layout struct {
	name, dir, tag string
}

func (s *layout) String() string { return s.name }
func (s *layout) Close() error   { return nil }

func (s *layout) Image(ctx context.Context, p Platform) (*Image, error) {
	f, err := openFile(filepath.Join(s.dir, ocispec.ImageIndexFile))
	if errors.Is(err, unix.ENOTDIR) {
		return nil, fmt.Errorf("%s: not an OCI layout: %w (for a layout in a tar file: oci-archive:FILE)", s.name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: not an OCI layout: %w", s.name, err)
	}
	defer f.Close()
	img, err := fromIndexFile(ctx, f, s, s.tag, p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	return img, nil
}

// open opens a blob. A valid digest cannot name a path outside of the layout. Links are followed,
// because build tools assemble layouts from links into their caches.
func (s *layout) open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", d.Digest, err)
	}
	f, err := openFile(filepath.Join(s.dir, ocispec.ImageBlobsDir, d.Digest.Algorithm().String(), d.Digest.Encoded()))
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", d.Digest, err)
	}
	return f, nil
}

// openFile opens a regular file. Opening a FIFO blocks, and opening a device may have side effects.
func openFile(name string) (*os.File, error) {
	fi, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%q is not a regular file", name)
	}
	return os.Open(name)
}
