package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/daxfs/daxfs-snapshotter/store"
)

var _ store.Blobs = (*blobs)(nil)

// blobs reads containerd's content store: from its files if they are visible here, else through its API.
type blobs struct {
	address string
	conn    *grpc.ClientConn
	store   content.Store
	spaces  namespacesapi.NamespacesClient
	plugins introspection.IntrospectionClient
	version versionapi.VersionClient
}

// maxMessage is containerd's own limit for a message.
const maxMessage = 16 << 20

// dialBlobs prepares a connection. The first use connects, because containerd starts after us.
func dialBlobs(address string) (*blobs, error) {
	conn, err := grpc.NewClient("unix://"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		// With the default window of 64 KiB each piece of a blob waits for the previous one.
		grpc.WithInitialWindowSize(8<<20), grpc.WithInitialConnWindowSize(16<<20),
	)
	if err != nil {
		return nil, fmt.Errorf("containerd at %q: %w", address, err)
	}
	return &blobs{
		address: address, conn: conn, store: proxy.NewContentStore(conn),
		spaces: namespacesapi.NewNamespacesClient(conn), plugins: introspection.NewIntrospectionClient(conn),
		version: versionapi.NewVersionClient(conn),
	}, nil
}

func (b *blobs) Close() error { return b.conn.Close() }

// up reports whether containerd accepts connections. Callers that can wait ask this first: after a
// failed connection gRPC fails the next ones untried for a second or more, including those of a pull.
func (b *blobs) up() bool {
	c, err := net.Dial("unix", b.address)
	if err != nil {
		return false
	}
	return c.Close() == nil
}

// ReaderAt implements content.Provider in the namespace of our caller: gRPC delivers the namespace as
// an incoming header, and it has to go out as an outgoing one.
func (b *blobs) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	ctx = namespaces.WithNamespace(ctx, ns)
	// This checks that the namespace has the blob, and gets its size.
	ra, err := b.store.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	if f := b.file(ctx, desc.Digest, ra.Size()); f != nil {
		return f, ra.Close()
	}
	return ra, nil
}

// findTimeout bounds the search for a blob: somebody who starts a container waits for it.
const findTimeout = 10 * time.Second

// Find implements store.Blobs. containerd labels an unpacked blob with the digest of its uncompressed bytes.
func (b *blobs) Find(ctx context.Context, namespace string, diffID digest.Digest) ([]store.Found, error) {
	ctx, cancel := context.WithTimeout(ctx, findTimeout)
	defer cancel()
	names := []string{namespace}
	if namespace == "" {
		spaces, err := b.spaces.List(ctx, &namespacesapi.ListNamespacesRequest{})
		if err != nil {
			return nil, fmt.Errorf("containerd: %w", err)
		}
		names = nil
		for _, ns := range spaces.Namespaces {
			names = append(names, ns.Name)
		}
	}
	var found []store.Found
	var errs []error
	for _, ns := range names {
		err := b.store.Walk(namespaces.WithNamespace(ctx, ns), func(info content.Info) error {
			desc := ocispec.Descriptor{Digest: info.Digest, Size: info.Size}
			found = append(found, store.Found{Namespace: ns, Desc: desc})
			return nil
		}, fmt.Sprintf("labels.%q==%q", labels.LabelUncompressed, diffID))
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil && len(found) == 0 {
		return nil, fmt.Errorf("containerd: %w", err)
	}
	return found, nil
}

// Open implements store.Blobs.
func (b *blobs) Open(ctx context.Context, namespace string, desc ocispec.Descriptor) (io.ReadCloser, error) {
	ra, err := b.ReaderAt(namespaces.WithNamespace(ctx, namespace), desc)
	if err != nil {
		return nil, fmt.Errorf("containerd: %w", err)
	}
	return blobReader{content.NewReader(ra), ra}, nil
}

type blobReader struct {
	io.Reader
	io.Closer
}

// file opens containerd's file of a blob. It returns nil if the content store has no files, or if they
// are not visible to a daemon in a container. The API would copy each byte six times on its way. The
// file needs no more trust than the API: the diff ID is verified.
func (b *blobs) file(ctx context.Context, id digest.Digest, size int64) content.ReaderAt {
	filter := "type==io.containerd.content.v1,id==content"
	resp, err := b.plugins.Plugins(ctx, &introspection.PluginsRequest{Filters: []string{filter}})
	if err != nil || len(resp.Plugins) != 1 || id.Validate() != nil {
		return nil
	}
	root := resp.Plugins[0].Exports["root"]
	if !filepath.IsAbs(root) {
		return nil
	}
	path := filepath.Join(root, "blobs", id.Algorithm().String(), id.Encoded())
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() || st.Size() != size {
		f.Close()
		return nil
	}
	return fileBlob{f, size}
}

type fileBlob struct {
	*os.File
	size int64
}

func (f fileBlob) Size() int64 { return f.size }

// Reader makes content.NewReader, and with it the differ, read the file directly.
func (f fileBlob) Reader() io.Reader { return f.File }
