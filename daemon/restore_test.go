package daemon

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"

	"github.com/daxfs/daxfs-snapshotter/config"
)

// labelStore keeps the labels of blobs in memory.
type labelStore map[digest.Digest]map[string]string

func (s labelStore) Get(d digest.Digest) (map[string]string, error) { return maps.Clone(s[d]), nil }
func (s labelStore) Set(d digest.Digest, m map[string]string) error { s[d] = m; return nil }
func (s labelStore) Update(d digest.Digest, m map[string]string) (map[string]string, error) {
	if s[d] == nil {
		s[d] = map[string]string{}
	}
	maps.Copy(s[d], m)
	return s[d], nil
}

// serveContents serves a new content store below m at address, like containerd.
func serveContents(t *testing.T, m *machine, address string) content.Store {
	t.Helper()
	store, err := local.NewLabeledStore(filepath.Join(m.dir, "containerd"), labelStore{})
	m.must(err)
	l, err := net.Listen("unix", address)
	m.must(err)
	srv := grpc.NewServer()
	contentapi.RegisterContentServer(srv, contentserver.New(store))
	namespacesapi.RegisterNamespacesServer(srv, oneNamespace{})
	go srv.Serve(l)
	t.Cleanup(srv.Stop)
	return store
}

type oneNamespace struct {
	namespacesapi.UnimplementedNamespacesServer
}

func (oneNamespace) List(context.Context,
	*namespacesapi.ListNamespacesRequest,
) (*namespacesapi.ListNamespacesResponse, error) {
	return &namespacesapi.ListNamespacesResponse{Namespaces: []*namespacesapi.Namespace{
		{Name: "empty"},
		{Name: "default"},
	}}, nil
}

// A layer lost from memory, without an intact pack, is restored from containerd's blob, if that is right.
func TestRestoreFromContent(t *testing.T) {
	for name, c := range map[string]struct {
		durability string
		harm       func(pack string) error
		wrong      bool // containerd's blob belongs to another layer
	}{
		"without packs": {config.DurabilityContent, nil, false},
		"pack missing":  {config.DurabilityPack, os.Remove, false},
		"pack damaged": {
			config.DurabilityPack,
			func(p string) error { return os.Truncate(p, 1000) }, false,
		},
		"without packs and another blob": {config.DurabilityContent, nil, true},
		"pack damaged and another blob": {
			config.DurabilityPack,
			func(p string) error { return os.Truncate(p, 1000) }, true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			address := filepath.Join(t.TempDir(), "c.sock")
			cl, m := inside(t, flavours[1], func(cfg *config.Config) {
				cfg.Layers.Durability, cfg.Containerd.Address = c.durability, address
			})
			ctx := namespaces.WithNamespace(t.Context(), "default")
			store := serveContents(t, m, address)

			a := file{"a", random(1, 100_000)}
			top, err := m.pull(ctx, true, []file{a})
			m.must(err)
			m.must(cl.sn.Flush(ctx))
			tar, other := &streaming{store: store}, makeTar(a)
			if c.wrong {
				other = makeTar(file{"a", random(2, 100_000)})
			}
			desc, _, err := tar.put(ctx, other)
			m.must(err)
			_, err = store.Update(ctx, content.Info{Digest: desc.Digest, Labels: map[string]string{
				labels.LabelUncompressed: digest.FromBytes(makeTar(a)).String(),
			}}, "labels."+labels.LabelUncompressed)
			m.must(err)
			packs, err := filepath.Glob(filepath.Join(m.cfg.Root, "packs/*"))
			if err != nil || len(packs) != 1 && c.harm != nil {
				t.Fatalf("packs %q, %v", packs, err)
			}
			cl.restart(m, func() {
				m.must(loseMemory(m.cfg))
				if c.harm != nil {
					m.must(c.harm(packs[0]))
				}
			})
			mounts, err := m.sn.Prepare(ctx, "default/100/c", top)
			if c.wrong {
				if !errdefs.IsNotFound(err) && !errdefs.IsDataLoss(err) ||
					!strings.Contains(fmt.Sprint(err), "pull the image again") {
					t.Errorf("error %v", err)
				}
				return
			}
			m.must(err)
			m.compare(mounts, a)
		})
	}
}

// A layer whose record this version cannot read is restored if possible.
func TestUnreadableLayer(t *testing.T) {
	for _, stream := range []bool{false, true} {
		t.Run(fmt.Sprintf("stream=%v", stream), func(t *testing.T) {
			cl, m := inside(t, flavours[1], func(*config.Config) {})
			ctx := namespaces.WithNamespace(t.Context(), "default")
			a := file{"a", random(1, 100_000)}
			top, err := m.pull(ctx, stream, []file{a})
			m.must(err)
			m.must(cl.sn.Flush(ctx))
			key := cl.pool().Layers()[0]
			cl.restart(m, func() {
				p, done := openPool(t, m.cfg)
				defer done()
				for _, img := range p.Images() {
					m.must(p.RemoveImage(ctx, img.Key))
				}
				m.must(p.RemoveLayer(ctx, key))
				m.must(p.Begin().CommitLayer(ctx, key, []byte{0, 99, 99, 99}))
			})
			mounts, err := m.sn.Prepare(ctx, "default/100/c", top)
			m.must(err)
			m.compare(mounts, a)
		})
	}
}
