package service

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// blobs reads containerd's content store through its API.
type blobs struct {
	conn  *grpc.ClientConn
	store content.Store
}

// maxMessage is what containerd itself allows for a message.
const maxMessage = 16 << 20

// dialBlobs prepares a connection. It is made when it is first used: containerd starts after us.
func dialBlobs(address string) (*blobs, error) {
	conn, err := grpc.NewClient("unix://"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		// The default window of 64 KiB makes each piece of a blob wait for the last.
		grpc.WithInitialWindowSize(8<<20), grpc.WithInitialConnWindowSize(16<<20),
	)
	if err != nil {
		return nil, fmt.Errorf("containerd at %q: %w", address, err)
	}
	return &blobs{conn: conn, store: proxy.NewContentStore(conn)}, nil
}

func (b *blobs) Close() error { return b.conn.Close() }

// ReaderAt implements content.Provider in the namespace of whoever calls us: what came in as a header has to go out as
// one again.
func (b *blobs) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	return b.store.ReaderAt(namespaces.WithNamespace(ctx, ns), desc)
}
