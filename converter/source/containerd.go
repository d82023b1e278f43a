package source

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// DefaultAddress is containerd's default socket.
	DefaultAddress = "/run/containerd/containerd.sock"
	// DefaultNamespace is the default namespace of ctr and nerdctl.
	DefaultNamespace = "default"
)

type store struct {
	name, ref, address, namespace string
	client                        *containerd.Client
}

func newContainerd(full, ref string, c Config) (Source, error) {
	// nerdctl writes the address with its scheme.
	s := &store{name: full, ref: ref, address: strings.TrimPrefix(c.Address, "unix://"), namespace: c.Namespace}
	if s.address == "" {
		s.address = DefaultAddress
	}
	if s.namespace == "" {
		s.namespace = DefaultNamespace
	}
	return s, nil
}

func (s *store) String() string { return s.name }

func (s *store) Close() error {
	if s.client == nil {
		return nil
	}
	return s.client.Close()
}

func (s *store) Image(ctx context.Context, p Platform) (*Image, error) {
	found, err := s.find(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	img, err := resolve(namespaces.WithNamespace(ctx, s.namespace), s, found.Target, p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	img.Name = found.Name
	return img, nil
}

func (s *store) whole(ctx context.Context) (ocispec.Descriptor, error) {
	found, err := s.find(ctx)
	return found.Target, err
}

func (s *store) find(ctx context.Context) (none images.Image, err error) {
	if s.client == nil {
		c, err := dialContainerd(ctx, s.address, s.namespace)
		if err != nil {
			return none, err
		}
		s.client = c
	}
	ctx = namespaces.WithNamespace(ctx, s.namespace)
	found, err := s.client.ImageService().Get(ctx, s.ref)
	if errdefs.IsNotFound(err) && normal(s.ref) != s.ref {
		found, err = s.client.ImageService().Get(ctx, normal(s.ref))
	}
	if errdefs.IsNotFound(err) {
		return none, fmt.Errorf("%w in namespace %q of containerd at %q", ErrNotFound, s.namespace, s.address)
	}
	return found, err
}

func dialContainerd(ctx context.Context, address, namespace string) (*containerd.Client, error) {
	// The client would wait ten seconds for a missing socket and then report another error.
	conn, err := new(net.Dialer).DialContext(ctx, "unix", address)
	if err != nil {
		return nil,
			fmt.Errorf("containerd does not answer: %w (does it run? --address and CONTAINERD_ADDRESS name its socket)",
				err)
	}
	conn.Close()
	c, err := containerd.New(address, containerd.WithDefaultNamespace(namespace))
	if err != nil {
		return nil, fmt.Errorf("containerd at %q: %w", address, err)
	}
	return c, nil
}

// ContainerdImages returns one name for each distinct image in a namespace of containerd.
func ContainerdImages(ctx context.Context, address, namespace string) ([]string, error) {
	c, err := dialContainerd(ctx, strings.TrimPrefix(address, "unix://"), namespace)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	list, err := c.ImageService().List(namespaces.WithNamespace(ctx, namespace))
	if err != nil {
		return nil, fmt.Errorf("images of namespace %q in containerd at %q: %w", namespace, address, err)
	}
	var names []string
	seen := map[digest.Digest]bool{}
	for _, img := range list {
		if !seen[img.Target.Digest] {
			seen[img.Target.Digest] = true
			names = append(names, img.Name)
		}
	}
	return names, nil
}

func (s *store) open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	ra, err := s.client.ContentStore().ReaderAt(namespaces.WithNamespace(ctx, s.namespace), d)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("blob %s is not in containerd's content store: pull the image with all its content: %w",
			d.Digest, err)
	}
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", d.Digest, err)
	}
	return struct {
		io.Reader
		io.Closer
	}{content.NewReader(ra), ra}, nil
}
