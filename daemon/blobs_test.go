package daemon

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
)

// plugins is containerd's introspection service with one content store.
type plugins struct {
	introspection.UnimplementedIntrospectionServer
	root string
}

func (p plugins) Plugins(context.Context, *introspection.PluginsRequest) (*introspection.PluginsResponse, error) {
	return &introspection.PluginsResponse{Plugins: []*introspection.Plugin{{
		ID:      "content",
		Exports: map[string]string{"root": p.root},
	}}}, nil
}

// A blob is read from its file if containerd's path leads to it, else through the API, with the same bytes.
func TestBlobFiles(t *testing.T) {
	ctx := namespaces.WithNamespace(t.Context(), "test")
	body := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
	desc := ocispec.Descriptor{Digest: digest.FromBytes(body), Size: int64(len(body))}
	blob := func(root string) string { return filepath.Join(root, "blobs/sha256", desc.Digest.Encoded()) }
	for _, c := range []struct {
		name   string
		direct bool
		// seen makes the exported directory from the service's directory.
		seen func(t *testing.T, root, seen string)
	}{
		{"same", true, func(t *testing.T, root, seen string) { must(t, os.Symlink(root, seen)) }},
		{"none", false, func(*testing.T, string, string) {}},
		{"shorter", false, func(t *testing.T, _, seen string) {
			must(t, os.MkdirAll(filepath.Dir(blob(seen)), 0o755))
			must(t, os.WriteFile(blob(seen), body[:len(body)-1], 0o644))
		}},
		{"link", false, func(t *testing.T, root, seen string) {
			must(t, os.MkdirAll(filepath.Dir(blob(seen)), 0o755))
			must(t, os.Symlink(blob(root), blob(seen)))
		}},
		{"directory", false, func(t *testing.T, _, seen string) { must(t, os.MkdirAll(blob(seen), 0o755)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			root, seen := t.TempDir(), filepath.Join(t.TempDir(), "seen")
			store, err := local.NewStore(root)
			must(t, err)
			must(t, content.WriteBlob(ctx, store, "blob", bytes.NewReader(body), desc))
			c.seen(t, root, seen)
			b := serveBlobs(t, store, seen)
			ra, err := b.ReaderAt(ctx, desc)
			must(t, err)
			defer ra.Close()
			if _, direct := ra.(fileBlob); direct != c.direct {
				t.Errorf("the blob is read by %T, want the file itself: %v", ra, c.direct)
			}
			got, err := content.ReadBlob(ctx, b, desc)
			must(t, err)
			if ra.Size() != desc.Size || !bytes.Equal(got, body) {
				t.Errorf("%d bytes of %d, equal: %v", ra.Size(), desc.Size, bytes.Equal(got, body))
			}
			missing := ocispec.Descriptor{Digest: digest.FromString("another"), Size: 7}
			if _, err := b.ReaderAt(ctx, missing); !errdefs.IsNotFound(err) {
				t.Errorf("a blob that is not there: %v", err)
			}
		})
	}
}

// serveBlobs serves a store like containerd, with root as its exported directory.
func serveBlobs(t *testing.T, store content.Store, root string) *blobs {
	t.Helper()
	address := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", address)
	must(t, err)
	srv := grpc.NewServer()
	contentapi.RegisterContentServer(srv, contentserver.New(store))
	introspection.RegisterIntrospectionServer(srv, plugins{root: root})
	go srv.Serve(l)
	t.Cleanup(srv.Stop)
	b, err := dialBlobs(address)
	must(t, err)
	t.Cleanup(func() { b.Close() })
	return b
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
