package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	apitypes "github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/lease"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// imageService is containerd's image store and its events.
type imageService struct {
	imagesapi.UnimplementedImagesServer
	eventsapi.UnimplementedEventsServer
	store content.Store

	mu      sync.Mutex
	records map[string]ocispec.Descriptor // of the namespace default, by name
	changed chan struct{}                 // closed when they change
}

func newImageService(t *testing.T) *imageService {
	t.Helper()
	cs, err := local.NewStore(t.TempDir())
	must(t, err)
	return &imageService{store: cs, records: map[string]ocispec.Descriptor{}, changed: make(chan struct{})}
}

// serve serves all services at address until stop is called.
func (s *imageService) serve(t *testing.T, address string) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", address)
	must(t, err)
	srv := grpc.NewServer()
	imagesapi.RegisterImagesServer(srv, s)
	eventsapi.RegisterEventsServer(srv, s)
	contentapi.RegisterContentServer(srv, contentserver.New(s.store))
	namespacesapi.RegisterNamespacesServer(srv, oneNamespace{})
	go srv.Serve(l)
	t.Cleanup(srv.Stop)
	return srv.Stop
}

func (s *imageService) List(ctx context.Context,
	_ *imagesapi.ListImagesRequest,
) (*imagesapi.ListImagesResponse, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &imagesapi.ListImagesResponse{}
	for name, d := range s.records {
		if ns == "default" {
			out.Images = append(out.Images, &imagesapi.Image{
				Name:   name,
				Target: &apitypes.Descriptor{MediaType: d.MediaType, Digest: d.Digest.String(), Size: d.Size},
			})
		}
	}
	return out, nil
}

func (s *imageService) Subscribe(_ *eventsapi.SubscribeRequest, to eventsapi.Events_SubscribeServer) error {
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-to.Context().Done():
			return nil
		case <-changed:
			if err := to.Send(&apitypes.Envelope{Namespace: "default", Topic: "/images/update"}); err != nil {
				return err
			}
		}
	}
}

// change changes the records and notifies subscribers.
func (s *imageService) change(do func(records map[string]ocispec.Descriptor)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	do(s.records)
	close(s.changed)
	s.changed = make(chan struct{})
}

// add stores a value as a blob.
func (s *imageService) add(t *testing.T, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	raw, err := json.Marshal(v)
	must(t, err)
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	must(t, content.WriteBlob(t.Context(), s.store, d.Digest.String(), bytes.NewReader(raw), d))
	return d
}

// manifest stores the manifest and the configuration of an image with one layer.
func (s *imageService) manifest(t *testing.T, diffID digest.Digest) ocispec.Descriptor {
	t.Helper()
	config := ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}}}
	return s.add(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: s.add(t, ocispec.MediaTypeImageConfig, config),
		Layers: []ocispec.Descriptor{{
			MediaType: ocispec.MediaTypeImageLayerGzip,
			Digest:    digest.FromString("blob"), Size: 4,
		}},
	})
}

// told returns the published names of a chain, as NAMESPACE NAME, and their targets.
func told(t *testing.T, cl *client, chain digest.Digest) (names []string, targets map[string]digest.Digest) {
	t.Helper()
	rc, err := region.Named(cl.store.Region().Path)
	must(t, err)
	rc.ReadOnly = true
	r, err := region.Open(rc)
	must(t, err)
	defer r.Close()
	targets = map[string]digest.Digest{}
	cat, err := pool.ReadCatalogue(r)
	if err != nil {
		return nil, targets // it is being changed
	}
	for _, img := range cat.Images {
		raw, err := pool.ReadDocument(r, img)
		if err != nil {
			continue
		}
		doc, err := store.ParseDocument(raw)
		must(t, err)
		if doc.ChainID != chain {
			continue
		}
		for _, o := range doc.Images {
			names = append(names, o.Namespace+" "+o.Name)
			targets[o.Name] = o.Target.Digest
		}
	}
	return names, targets
}

// The loop publishes containerd's images on events, and continues when containerd starts later or
// restarts. It publishes images put by hand also without containerd.
func TestPublishLoop(t *testing.T) {
	dir := t.TempDir()
	address := filepath.Join(dir, "c.sock")
	place := filepath.Join(dir, "guest.lease") // that nobody has
	must(t, os.WriteFile(place, make([]byte, lease.MinSize), 0o600))
	cl, m := inside(t, flavours[0], func(c *config.Config) {
		c.Containerd.Address, c.Pool.Readers, c.Pool.Leases = address, store.ReadersLeases, []string{place}
	})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	layer := []file{{"a", random(1, 5000)}}
	top, err := m.pull(ctx, true, layer)
	m.must(err)
	_, err = m.sn.Prepare(ctx, "default/100/c", top)
	m.must(err)
	m.must(cl.sn.Flush(ctx))
	diffID := digest.FromBytes(makeTar(layer...))
	chain := identity.ChainID([]digest.Digest{diffID})

	s := newImageService(t)
	plain := s.manifest(t, diffID)
	missing := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest,
		Digest:    digest.FromString("arm64"), Size: 5,
	}
	index := s.add(t, ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{missing, plain},
	})
	large := plain
	large.Size = maxManifest + 1
	s.change(func(r map[string]ocispec.Descriptor) {
		r["example.org/plain:1"], r["example.org/index:1"] = plain, index
		r["example.org/other:1"] = s.manifest(t, digest.FromString("another layer"))
		r["example.org/gone:1"], r["example.org/large:1"], r["Not a reference"] = missing, large, plain
	})

	lctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		cl.publishLoop(lctx)
	}()
	defer func() {
		stop()
		<-ended
	}()
	// await waits for these names, for less than publishEvery, which would hide a missing event.
	await := func(when string, want ...string) {
		t.Helper()
		var got []string
		for end := time.Now().Add(publishEvery * 3 / 4); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if got, _ = told(t, cl, chain); slices.Equal(got, want) {
				return
			}
		}
		t.Fatalf("%s: readers find %q, expected %q", when, got, want)
	}
	put := func(name string) {
		t.Helper()
		raw, err := content.ReadBlob(ctx, s.store, plain)
		m.must(err)
		var manifest ocispec.Manifest
		m.must(json.Unmarshal(raw, &manifest))
		config, err := content.ReadBlob(ctx, s.store, manifest.Config)
		m.must(err)
		tar := makeTar(layer...)
		desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: diffID, Size: int64(len(tar))}
		_, err = cl.store.Put(ctx, &source.Image{
			Manifest: raw, ManifestType: plain.MediaType, Config: config,
			Layers: []source.Layer{{DiffID: diffID, Desc: desc, Open: func(context.Context) (io.ReadCloser, error) {
				return io.NopCloser(bytes.NewReader(tar)), nil
			}}},
		}, name)
		m.must(err)
	}
	put("example.org/hand:1")
	await("without containerd", "daxfs.put example.org/hand:1")
	end := s.serve(t, address)
	await("with containerd", "daxfs.put example.org/hand:1", "default example.org/index:1",
		"default example.org/plain:1")
	_, targets := told(t, cl, chain)
	if targets["example.org/index:1"] != index.Digest || targets["example.org/plain:1"] != plain.Digest {
		t.Errorf("targets %v, expected %s and %s", targets, index.Digest, plain.Digest)
	}
	s.change(func(r map[string]ocispec.Descriptor) { delete(r, "example.org/index:1") })
	await("after an event", "daxfs.put example.org/hand:1", "default example.org/plain:1")
	end()
	m.must(cl.store.Unpin("example.org/hand:1"))
	put("example.org/later:1")
	await("after containerd went", "daxfs.put example.org/later:1", "default example.org/plain:1")
	s.change(func(r map[string]ocispec.Descriptor) { r["example.org/back:1"] = plain })
	s.serve(t, address)
	await("after it came back", "daxfs.put example.org/later:1", "default example.org/back:1",
		"default example.org/plain:1")
	m.must(cl.store.Unpin("example.org/later:1"))
}
