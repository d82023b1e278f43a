package daemon

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/lease"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/store"
	"github.com/daxfs/daxfs-snapshotter/store/shared"
)

func lacks(t *testing.T, cl *client, lines ...string) (missing []string) {
	t.Helper()
	text := scrape(t, cl)
	for _, l := range lines {
		if !strings.Contains(text, "\n"+l+"\n") {
			missing = append(missing, l)
		}
	}
	return missing
}

// Status and metrics show readers' use of the pool, and follow its changes.
func TestReadersAreSeen(t *testing.T) {
	place := filepath.Join(t.TempDir(), "guest.lease")
	must(t, os.WriteFile(place, make([]byte, lease.MinSize), 0o600))
	cl, m := inside(t, flavours[0],
		func(c *config.Config) { c.Pool.Readers, c.Pool.Leases = "leases", []string{place} })
	ctx := namespaces.WithNamespace(t.Context(), "default")
	top, err := m.pull(ctx, true, []file{{"a", random(1, 5000)}})
	m.must(err)
	_, err = m.sn.Prepare(ctx, "default/100/c", top)
	m.must(err)
	m.must(cl.sn.Flush(ctx))
	claims := func(reader, state string, n int) string {
		return fmt.Sprintf("daxfs_reader_claims{reader=%q,region=%q,state=%q} %d", reader, place, state, n)
	}
	if miss := lacks(t, cl, `daxfs_readers_info{mode="leases"} 1`, claims("", "now", 0), "daxfs_leases_failed 0",
		"daxfs_images_unlisted 0"); miss != nil {
		t.Errorf("before a reader came the metrics lack %q", miss)
	}
	l, err := lease.Open(place, lease.Reader{Name: "guest", Machine: [16]byte{1}})
	m.must(err)
	defer l.Close()
	img := cl.pool().Images()[0]
	_, err = l.Claim(cl.pool().ID(), img)
	m.must(err)
	if miss := lacks(t, cl, claims("guest", "now", 1), claims("guest", "torn", 0),
		"daxfs_images_unlisted 0"); miss != nil {
		t.Errorf("after a claim the metrics lack %q", miss)
	}
	if list, err := cl.images(ctx); err != nil || len(list) != 1 || !slices.Contains(list[0].Holders, "reader/guest") {
		t.Errorf("images %+v, %v; expected reader/guest among the holders", list, err)
	}
	// containerd forgets the image; the image waits for its reader.
	m.must(m.sn.Remove(ctx, "default/100/c"))
	m.must(m.sn.Remove(ctx, top))
	m.must(cl.sn.Cleanup(ctx))
	if miss := lacks(t, cl, claims("guest", "now", 1), "daxfs_images_unlisted 1"); miss != nil {
		t.Errorf("after the image was removed the metrics lack %q", miss)
	}
	s, err := cl.status(ctx)
	m.must(err)
	if r := s.Readers; r.Mode != store.ReadersLeases || r.Error != "" || len(r.List) != 1 ||
		r.List[0].Reader != "guest" ||
		!slices.Equal(r.List[0].Images, []string{img.Key}) {
		t.Errorf("status: %+v", r)
	}
	// While a region cannot be read, nothing is freed, and the status says so.
	raw, err := os.ReadFile(place)
	m.must(err)
	m.must(os.Truncate(place, 100))
	if miss := lacks(t, cl, "daxfs_leases_failed 1"); miss != nil {
		t.Errorf("with a region that is too small the metrics lack %q", miss)
	}
	if s, err = cl.status(ctx); err != nil || !strings.Contains(s.Readers.Error, place) {
		t.Errorf("status: %+v, %v", s.Readers, err)
	}
	m.must(os.WriteFile(place, raw, 0o600))
	m.must(l.Release(cl.pool().ID(), img))
	m.must(cl.sn.Cleanup(ctx))
	if miss := lacks(t, cl, claims("guest", "now", 0), "daxfs_images_unlisted 0", "daxfs_leases_failed 0",
		"daxfs_images 0"); miss != nil {
		t.Errorf("after the reader released the image the metrics lack %q", miss)
	}
}

// otherPool makes a pool of another owner with one image, and returns the image's chain ID.
func otherPool(t *testing.T, path string) digest.Digest {
	t.Helper()
	mem, err := region.Open(region.Config{Kind: region.KindFile, Path: path, Size: 64 << 20, Create: true})
	must(t, err)
	p, err := pool.Create(mem, path+".index", pool.Options{})
	must(t, err)
	b := p.Begin()
	defer b.Discard()
	body := []byte("text")
	d, err := b.Put(t.Context(), int64(len(body)), bytes.NewReader(body))
	must(t, err)
	root := &daxfs.Node{
		Mode:    unix.S_IFDIR | 0o755,
		Entries: map[string]*daxfs.Node{"f": {Mode: unix.S_IFREG | 0o644, Data: d}},
	}
	ids := []digest.Digest{digest.FromString("layer")}
	chain := identity.ChainID(ids)
	_, err = p.AddImage(t.Context(), chain.String(), root, daxfs.Options{})
	must(t, err)
	raw, err := json.Marshal(store.Document{ChainID: chain, DiffIDs: ids})
	must(t, err)
	must(t, p.SetDocument(t.Context(), chain.String(), raw))
	must(t, p.Close())
	must(t, mem.Close())
	return chain
}

// Status, metrics and health show pools of other owners: a broken pool that is not used here costs
// only its own images, one that something stands on makes the daemon unhealthy.
func TestSharedPoolsAreSeen(t *testing.T) {
	dir := t.TempDir()
	there, away, place := filepath.Join(dir, "there"), filepath.Join(dir, "away"), filepath.Join(dir, "lease")
	var chain digest.Digest
	cl, m := inside(t, flavours[0], func(c *config.Config) {
		chain = otherPool(t, there)
		must(t, os.WriteFile(place, make([]byte, lease.MinSize), 0o600))
		c.Shared.Pools, c.Shared.Leases = []string{there, away}, map[string]string{there: place}
	})
	count := func(pool, state string, n int) string {
		return fmt.Sprintf("daxfs_shared_pool_images{pool=%q,state=%q} %d", pool, state, n)
	}
	value := func(name, pool string, n int) string {
		return fmt.Sprintf("daxfs_shared_pool_%s{pool=%q} %d", name, pool, n)
	}
	health := func() (int, string) {
		w := httptest.NewRecorder()
		cl.metrics.handler(false).ServeHTTP(w, httptest.NewRequest("GET", "/healthz", nil))
		return w.Code, w.Body.String()
	}
	if miss := lacks(t, cl, value("up", there, 1), value("up", away, 0), value("generation", away, 0),
		value("leased", there, 1),
		value("leased", away, 0), count(there, "listed", 1), count(there, "claimed", 0), count(there, "mounted", 0),
		count(away, "listed", 0)); miss != nil {
		t.Errorf("before a claim the metrics lack %q", miss)
	}
	if code, text := health(); code != http.StatusOK || !strings.HasPrefix(text, "ok\n") ||
		!strings.Contains(text, away) {
		t.Errorf("health with a pool that is not there: %d %q", code, text)
	}
	ctx := namespaces.WithNamespace(t.Context(), "default")
	labels := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: chain.String()})
	if _, err := m.sn.Prepare(ctx, "default/1/extract-1-x "+chain.String(), "", labels); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("prepare a layer that the pool has: %v", err)
	}
	_, err := m.sn.Prepare(ctx, "default/2/container", chain.String())
	m.must(err)
	if miss := lacks(t, cl, count(there, "claimed", 1), count(there, "mounted", 1)); miss != nil {
		t.Errorf("after a claim the metrics lack %q", miss)
	}
	find := func() shared.Status {
		t.Helper()
		s, err := cl.status(t.Context())
		m.must(err)
		if len(s.Shared) != 2 || s.Shared[1].Name != away || s.Shared[1].Error == "" {
			t.Fatalf("status %+v", s.Shared)
		}
		return s.Shared[0]
	}
	if s := find(); s.Name != there || s.Error != "" || s.Generation == 0 || s.Claimed != 1 ||
		s.Driver != "erofs-file" ||
		s.Lease != place {
		t.Errorf("status %+v", s)
	}

	// Remove the pool below a container.
	m.must(os.Rename(there, there+".gone"))
	cl.shared.Refresh(t.Context())
	if code, text := health(); code != http.StatusServiceUnavailable ||
		!strings.Contains(text, "1 images are in use here") {
		t.Errorf("health without a pool that is in use: %d %q", code, text)
	}
	if miss := lacks(t, cl, value("up", there, 0), value("generation", there, 0),
		count(there, "claimed", 1)); miss != nil {
		t.Errorf("without the pool the metrics lack %q", miss)
	}
	if s := find(); s.Error == "" {
		t.Errorf("status %+v", s)
	}
	m.must(os.Rename(there+".gone", there))
	cl.shared.Refresh(t.Context())
	m.must(cl.Healthy(t.Context()))
	m.must(m.sn.Remove(ctx, "default/2/container"))
	m.must(m.sn.Remove(ctx, chain.String()))
	m.must(cl.sn.Cleanup(t.Context()))
	if miss := lacks(t, cl, value("up", there, 1), count(there, "claimed", 0),
		count(there, "mounted", 0)); miss != nil {
		t.Errorf("after the claim has ended the metrics lack %q", miss)
	}
}
