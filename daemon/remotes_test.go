package daemon

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/containerd/v2/core/content"
	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/internal/chunkedtest"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// bed is a daemon, a registry, and the services of containerd that the daemon uses.
type bed struct {
	*client
	t        testing.TB
	registry *httptest.Server
	requests atomic.Int64 // for blobs
	content  content.Store
	n        atomic.Int64 // snapshots

	mu    sync.Mutex
	blobs map[string][]byte
	fault func(w http.ResponseWriter, r *http.Request, blob []byte) bool // returns true if it has answered
}

// contentLabels are the labels of blobs in containerd's database.
type contentLabels struct {
	mu  sync.Mutex
	all map[digest.Digest]map[string]string
}

func (l *contentLabels) Get(d digest.Digest) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.all[d]), nil
}

func (l *contentLabels) Set(d digest.Digest, labels map[string]string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil {
		l.all = map[digest.Digest]map[string]string{}
	}
	l.all[d] = maps.Clone(labels)
	return nil
}

func (l *contentLabels) Update(d digest.Digest, labels map[string]string) (map[string]string, error) {
	old, err := l.Get(d)
	if err != nil {
		return nil, err
	}
	if old == nil {
		old = map[string]string{}
	}
	maps.Copy(old, labels)
	return old, l.Set(d, old)
}

// containerdVersion answers like a version of containerd.
type containerdVersion string

func (v containerdVersion) Version(context.Context, *emptypb.Empty, ...grpc.CallOption,
) (*versionapi.VersionResponse, error) {
	return &versionapi.VersionResponse{Version: string(v)}, nil
}

// newBed starts a bed. change changes its configuration.
func newBed(t testing.TB, change func(*config.Config)) *bed {
	t.Helper()
	dir := t.TempDir()
	c := config.Default()
	c.Root, c.Address = dir+"/root", dir+"/s.sock"
	c.Containerd.Address = dir + "/containerd.sock"
	c.Pool.Size = 1 << 30
	c.Registries.HostsDirs = []string{dir + "/certs.d"}
	if change != nil {
		change(c)
	}
	b := &bed{t: t, blobs: map[string][]byte{}}
	b.registry = httptest.NewServer(http.HandlerFunc(b.serve))
	t.Cleanup(b.registry.Close)
	var err error
	if b.content, err = local.NewLabeledStore(dir+"/content", &contentLabels{}); err != nil {
		t.Fatal(err)
	}
	if b.client, err = start(t.Context(), c, b.content); err != nil {
		t.Fatal(err)
	}
	b.Daemon.blobs.store, b.Daemon.blobs.version = b.content, containerdVersion("v2.4.2")
	t.Cleanup(func() {
		ctx := context.Background()
		if err := errors.Join(b.purge(ctx), b.end()); err != nil {
			t.Error(err)
		}
	})
	return b
}

func (b *bed) serve(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/v2/" {
		return
	}
	b.requests.Add(1)
	b.mu.Lock()
	blob, ok := b.blobs[r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]]
	fault := b.fault
	b.mu.Unlock()
	switch {
	case fault != nil && fault(w, r, blob):
	case !ok:
		http.NotFound(w, r)
	default:
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
	}
}

// setFault makes the registry answer with f.
func (b *bed) setFault(f func(w http.ResponseWriter, r *http.Request, blob []byte) bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fault = f
}

// image is an image that containerd is about to unpack.
type image struct {
	ref      string
	manifest ocispec.Manifest
	digest   digest.Digest
	diffIDs  []digest.Digest
	chain    []digest.Digest
	tars     [][]byte
	unnamed  bool // by the labels of its snapshots
}

// layerOf returns the tar of a layer of n files. Files whose number seed does not divide are the same for all seeds.
func layerOf(n int, seed uint64) []byte {
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	for i := range n {
		s := uint64(i)
		if i%5 == 0 {
			s += seed * 1_000_003
		}
		rng := rand.New(rand.NewPCG(s, 7))
		body := make([]byte, 1+rng.IntN(6000))
		for j := range body {
			body[j] = byte(rng.IntN(50))
		}
		w.WriteHeader(&tar.Header{Name: fmt.Sprintf("dir/file-%d", i), Mode: 0o644, Size: int64(len(body))})
		w.Write(body)
	}
	w.Close()
	return raw.Bytes()
}

// push makes an image, its layers in the registry with the options, and its documents in containerd.
func (b *bed) push(repository string, o chunkedtest.Options, tars ...[]byte) *image {
	b.t.Helper()
	img := &image{ref: strings.TrimPrefix(b.registry.URL, "http://") + "/" + repository + ":latest", tars: tars}
	for _, raw := range tars {
		l, err := chunkedtest.Encode(raw, o)
		b.must(err)
		b.mu.Lock()
		b.blobs[l.Desc.Digest.String()] = l.Blob
		b.mu.Unlock()
		img.manifest.Layers = append(img.manifest.Layers, l.Desc)
		img.diffIDs = append(img.diffIDs, l.DiffID)
	}
	b.describe(img)
	return img
}

// describe makes the configuration and the manifest of an image.
func (b *bed) describe(img *image) {
	b.t.Helper()
	var c ocispec.Image
	c.RootFS.Type, c.RootFS.DiffIDs = "layers", img.diffIDs
	img.chain = identity.ChainIDs(append([]digest.Digest(nil), img.diffIDs...))
	img.manifest.Config = b.document(c)
	img.digest = b.document(img.manifest).Digest
}

func (b *bed) document(v any) ocispec.Descriptor {
	b.t.Helper()
	raw, err := json.Marshal(v)
	b.must(err)
	d := ocispec.Descriptor{Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	ctx := namespaces.WithNamespace(b.t.Context(), "ns")
	err = content.WriteBlob(ctx, b.content, "x"+d.Digest.String(), bytes.NewReader(raw), d)
	b.must(err)
	return d
}

func (b *bed) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

type prepared struct {
	key    string
	labels map[string]string
	mounts []cmount.Mount
	// exists means that the layer need not be fetched, staged that its mounts say so
	exists, staged bool
}

// prepare prepares layer i like containerd before a fetch.
func (b *bed) prepare(ctx context.Context, ns string, img *image, i int, parent string) (p prepared, err error) {
	p.key = fmt.Sprintf("%s/%d/extract-1-x %s", ns, b.n.Add(1), img.chain[i])
	p.labels = map[string]string{
		snapshots.LabelSnapshotRef: img.chain[i].String(), labelOf("diff-id"): img.diffIDs[i].String(),
	}
	if !img.unnamed {
		maps.Copy(p.labels, map[string]string{
			labelOf("cri.image-ref"): img.ref, labelOf("cri.manifest-digest"): img.digest.String(),
			labelOf("cri.layer-digest"): img.manifest.Layers[i].Digest.String(),
		})
	}
	if i > 0 {
		p.labels[labelOf("parent-chain-id")] = img.chain[i-1].String()
	}
	ctx = namespaces.WithNamespace(ctx, ns)
	p.mounts, err = b.remote.Prepare(ctx, p.key, parent, snapshots.WithLabels(p.labels))
	if errdefs.IsAlreadyExists(err) {
		p.exists, err = true, nil
	}
	p.staged = len(p.mounts) > 0 && p.mounts[len(p.mounts)-1].ReadOnly()
	return p, err
}

func labelOf(name string) string { return "containerd.io/snapshot/" + name }

// find looks up an existing layer like containerd.
func (b *bed) find(ns string, chain digest.Digest, parent string) (names []string) {
	b.t.Helper()
	filter := fmt.Sprintf(`labels.%q==%s,parent==%q`, snapshots.LabelSnapshotRef, chain, parent)
	ctx := namespaces.WithNamespace(b.t.Context(), ns)
	b.must(b.remote.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		names = append(names, info.Name)
		return nil
	}, filter))
	return names
}

// seed streams a layer into the pool, for a snapshot of another namespace.
func (b *bed) seed(raw []byte) {
	b.t.Helper()
	ctx := namespaces.WithNamespace(b.t.Context(), "seed")
	id := digest.FromBytes(raw)
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: id, Size: int64(len(raw))}
	b.must(content.WriteBlob(ctx, b.content, "seed"+id.String(), bytes.NewReader(raw), d))
	labels := snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef: id.String(), labelOf("diff-id"): id.String(),
	})
	key := fmt.Sprintf("seed/%d/extract-1-x %s", b.n.Add(1), id)
	mounts, err := b.remote.Prepare(ctx, key, "", labels)
	b.must(err)
	_, err = b.applier.Apply(ctx, d, mounts)
	b.must(err)
	b.must(b.remote.Commit(ctx, fmt.Sprintf("seed/%d/%s", b.n.Add(1), id), key, labels))
}

// plant makes an empty committed snapshot with the label of a layer.
func (b *bed) plant(ns string, chain digest.Digest) {
	b.t.Helper()
	ctx := namespaces.WithNamespace(b.t.Context(), ns)
	labels := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: chain.String()})
	key := fmt.Sprintf("%s/%d/lie", ns, b.n.Add(1))
	_, err := b.remote.Prepare(ctx, key, "", labels)
	b.must(err)
	b.must(b.remote.Commit(ctx, fmt.Sprintf("%s/%d/%s", ns, b.n.Add(1), chain), key, labels))
}

// hasLayer reports whether the store has the layer with a diff ID.
func (b *bed) hasLayer(diffID digest.Digest) bool { return b.pool().HasLayer(store.BlobKey(diffID)) }

// A layer with a known parent becomes a snapshot that containerd finds; one unpacked in parallel is
// staged. Only contents missing from the pool are fetched.
func TestPull(t *testing.T) {
	b := newBed(t, nil)
	b.seed(layerOf(100, 1))
	img := b.push("app", chunkedtest.Options{}, layerOf(100, 2), layerOf(100, 3), layerOf(100, 4))
	b.plant("aaa", img.chain[0])
	b.plant("ns", img.chain[0])

	p, err := b.prepare(t.Context(), "ns", img, 0, "")
	b.must(err)
	found := b.find("ns", img.chain[0], "")
	if !p.exists || len(found) != 1 {
		t.Fatalf("%+v, snapshots %q; expected one that exists", p, found)
	}
	for _, ns := range []string{"aaa", "other"} {
		if other := b.find(ns, img.chain[0], ""); len(other) != 0 {
			t.Errorf("namespace %s finds %q", ns, other)
		}
	}
	p, err = b.prepare(t.Context(), "ns", img, 1, found[0])
	b.must(err)
	if found = b.find("ns", img.chain[1], found[0]); !p.exists || len(found) != 1 {
		t.Fatalf("%+v, snapshots %q; expected one that exists", p, found)
	}
	p, err = b.prepare(t.Context(), "ns", img, 2, "")
	b.must(err)
	if !p.staged {
		t.Fatalf("%+v, expected read-only mounts", p)
	}
	ctx := namespaces.WithNamespace(t.Context(), "ns")
	name := "ns/99/" + img.chain[2].String()
	b.must(b.remote.Commit(ctx, name, p.key, snapshots.WithLabels(p.labels), snapshots.WithParent(found[0])))
	for _, id := range img.diffIDs {
		if !b.hasLayer(id) {
			t.Errorf("layer %s is not there", id)
		}
	}
	b.runs(name, img)
}

// runs compares the files of a chain in a container.
func (b *bed) runs(name string, img *image) {
	b.t.Helper()
	needRoot(b.t)
	ctx := namespaces.WithNamespace(b.t.Context(), "ns")
	key := fmt.Sprintf("ns/%d/container", b.n.Add(1))
	mounts, err := b.remote.Prepare(ctx, key, name)
	b.must(err)
	want := filesOf(b.t, img.tars)
	b.must(cmount.WithTempMount(ctx, mounts, func(root string) error { return compareTree(root, want) }))
	b.must(b.remote.Remove(ctx, key))
}

// filesOf returns the files of layers; upper layers hide lower ones.
func filesOf(t testing.TB, tars [][]byte) []file {
	t.Helper()
	all := map[string][]byte{}
	for _, raw := range tars {
		r := tar.NewReader(bytes.NewReader(raw))
		for h, err := r.Next(); err == nil; h, err = r.Next() {
			body, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			all[h.Name] = body
		}
	}
	var files []file
	for name, body := range all {
		files = append(files, file{name: name, body: body})
	}
	return files
}
