package source

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/source/remote"
)

// normal returns the complete form of a reference, as written by containerd and docker save.
func normal(ref string) string {
	r, err := reference.ParseDockerRef(ref)
	if err != nil {
		return ref
	}
	return r.String()
}

// registry is an image in a registry that speaks the distribution protocol.
type registry struct {
	name string
	repo *remote.Repository
}

func newRegistry(full, ref string, c Config) (Source, error) {
	repo, err := remote.New(ref, remote.Config{PlainHTTP: c.PlainHTTP, HostDirs: c.HostDirs, Notify: c.Notify})
	if err != nil {
		return nil, fmt.Errorf("source %q: %w", full, err)
	}
	return &registry{name: full, repo: repo}, nil
}

func (s *registry) String() string { return s.name }

func (s *registry) Close() error { return s.repo.Close() }

func (s *registry) Image(ctx context.Context, p Platform) (*Image, error) {
	img, err := s.find(ctx, p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	img.Remote, img.Name = true, s.repo.String()
	return img, nil
}

func (s *registry) find(ctx context.Context, p Platform) (*Image, error) {
	d, err := s.whole(ctx)
	if err != nil {
		return nil, err
	}
	return resolve(ctx, s, d, p)
}

// whole returns the descriptor at the reference, with the document embedded.
func (s *registry) whole(ctx context.Context) (d ocispec.Descriptor, err error) {
	m, err := s.repo.Manifest(ctx)
	if errors.Is(err, remote.ErrNotFound) {
		return d, fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	if err != nil {
		return d, err
	}
	d = ocispec.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Doc)), Data: m.Doc}
	if t := mediaTypeOf(m.Doc); t != "" {
		d.MediaType = t
	}
	return d, nil
}

func (s *registry) open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	return s.repo.Open(ctx, d)
}
