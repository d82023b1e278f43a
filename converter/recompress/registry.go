package recompress

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/source/remote"
)

type registry struct {
	kind string
	repo *remote.Repository

	bytes [3]atomic.Int64 // indexed by remote.Pushed
}

func newRegistry(name, ref string, c Config) (Destination, error) {
	conf := remote.Config{PlainHTTP: c.PlainHTTP, HostDirs: c.HostDirs, Notify: c.Notify, Push: true}
	repo, err := remote.New(ref, conf)
	if err != nil {
		return nil, fmt.Errorf("destination %q: %w", name, err)
	}
	if from, ok := strings.CutPrefix(c.Source, "docker://"); ok {
		conf.MountFrom = mountFrom(from, repo)
		if repo, err = remote.New(ref, conf); err != nil {
			return nil, err
		}
	}
	return &registry{kind: name, repo: repo}, nil
}

// mountFrom returns the repository of the source if it is another one of the same registry.
func mountFrom(ref string, to *remote.Repository) string {
	from, err := remote.New(ref, remote.Config{})
	if err != nil {
		return ""
	}
	domain, path := from.Place()
	if d, p := to.Place(); d != domain || p == path {
		return ""
	}
	return path
}

func (r *registry) String() string { return r.kind }
func (r *registry) Close() error   { return r.repo.Close() }

func (r *registry) counts() (sent, mounted, present int64) {
	return r.bytes[remote.Sent].Load(), r.bytes[remote.Mounted].Load(), r.bytes[remote.Present].Load()
}

func (r *registry) take(ctx context.Context, d ocispec.Descriptor) (bool, error) {
	err := r.blob(ctx, d, nil, upload{})
	if errors.Is(err, remote.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

func (r *registry) blob(ctx context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error),
	up upload,
) error {
	announced := open
	if open != nil && up.begin != nil {
		announced = func() (io.ReadCloser, error) {
			up.begin()
			return open()
		}
	}
	how, err := r.repo.PushBlob(ctx, d, announced, up.sent)
	if err == nil {
		r.bytes[how].Add(d.Size)
	}
	return err
}

func (r *registry) manifest(ctx context.Context, d ocispec.Descriptor, doc []byte) error {
	return r.repo.PushManifest(ctx, d.MediaType, doc, false)
}

func (r *registry) name(ctx context.Context, d ocispec.Descriptor, doc []byte) error {
	return r.repo.PushManifest(ctx, d.MediaType, doc, true)
}
