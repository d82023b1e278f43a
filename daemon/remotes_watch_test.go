package daemon

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/internal/chunkedtest"
)

// countingWriter counts the bytes of a body.
type countingWriter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c *countingWriter) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b)
	c.n.Add(int64(n))
	return n, err
}

// The log line and the metrics of a pull by files contain the bytes from the registry and the bytes of
// the layer. A failed pull is logged with its reason and counted as failed.
func TestPullIsToldAndCounted(t *testing.T) {
	heard := hearLog(t)
	b := newBed(t, nil)
	old, raw := layerOf(100, 1), layerOf(100, 2)
	b.seed(old)
	var have, missing int64
	known := map[string]bool{}
	for _, f := range filesOf(t, [][]byte{old}) {
		known[string(f.body)] = true
	}
	for _, f := range filesOf(t, [][]byte{raw}) {
		if known[string(f.body)] {
			have += int64(len(f.body))
		} else {
			missing += int64(len(f.body))
		}
	}
	var sent atomic.Int64
	b.setFault(func(w http.ResponseWriter, r *http.Request, blob []byte) bool {
		http.ServeContent(&countingWriter{w, &sent}, r, "", time.Time{}, bytes.NewReader(blob))
		return true
	})
	img := b.push("app", chunkedtest.Options{}, raw)
	heard.takeAll()
	if p, err := b.prepare(t.Context(), "ns", img, 0, ""); err != nil || !p.exists {
		t.Fatalf("%+v, %v; expected a layer that exists", p, err)
	}
	lines := heard.take("pulled the files of a layer that the pool did not have")
	if len(lines) != 1 {
		t.Fatalf("%d lines, expected 1", len(lines))
	}
	layer := img.manifest.Layers[0]
	for key, want := range map[string]any{
		"image": img.ref, "layer": layer.Digest, "blob_bytes": layer.Size, "fetched_bytes": sent.Load(),
		"ranges": b.requests.Load(), "missing_bytes": missing, "pool_bytes": have,
	} {
		if got := lines[0].Data[key]; got != want {
			t.Errorf("%s is %v, expected %v", key, got, want)
		}
	}
	if took, ok := lines[0].Data["took"].(time.Duration); !ok || took < 0 {
		t.Errorf("took is %v", lines[0].Data["took"])
	}
	pulled := fmt.Sprintf(`daxfs_partial_bytes_total{from="pool"} %d
daxfs_partial_bytes_total{from="registry"} %d
daxfs_partial_pulls_total{result="failed"} 0
daxfs_partial_pulls_total{result="pulled"} 1
daxfs_partial_ranges_total %d
`, have, sent.Load(), b.requests.Load())
	if got := partialMetrics(t, b.client); got != pulled {
		t.Errorf("metrics\n%s\nexpected\n%s", got, pulled)
	}

	b.setFault(func(w http.ResponseWriter, _ *http.Request, _ []byte) bool {
		w.WriteHeader(http.StatusForbidden)
		return true
	})
	img = b.push("private", chunkedtest.Options{}, layerOf(100, 3))
	b.ordinary(img, 0, "")
	lines = heard.take("the layer is not pulled by its files; containerd pulls it as a whole")
	if len(lines) != 1 || lines[0].Data["image"] != img.ref || lines[0].Data["layer"] != img.manifest.Layers[0].Digest {
		t.Fatalf("%v, expected a line about %s", lines, img.ref)
	}
	why := fmt.Sprint(lines[0].Data["error"])
	for _, part := range []string{"403 Forbidden", "private", img.manifest.Layers[0].Digest.String()} {
		if !strings.Contains(why, part) {
			t.Errorf("the reason %q, expected %q in it", why, part)
		}
	}
	failed := strings.NewReplacer(`{result="failed"} 0`, `{result="failed"} 1`,
		fmt.Sprintf("ranges_total %d", b.requests.Load()-1),
		fmt.Sprintf("ranges_total %d", b.requests.Load())).Replace(pulled)
	if got := partialMetrics(t, b.client); got != failed {
		t.Errorf("metrics\n%s\nexpected\n%s", got, failed)
	}
}

// partialMetrics returns the values of the metrics about pulls by files, as Prometheus gets them.
func partialMetrics(t *testing.T, cl *client) string {
	t.Helper()
	var out strings.Builder
	for line := range strings.Lines(scrape(t, cl)) {
		if strings.HasPrefix(line, "daxfs_partial_") {
			out.WriteString(line)
		}
	}
	return out.String()
}

// Tokens that are valid for a few requests only are replaced during a pull.
func TestPullWithShortTokens(t *testing.T) {
	b := newBed(t, nil)
	b.seed(layerOf(400, 1))
	img := b.push("app", chunkedtest.Options{}, layerOf(400, 2))
	var tokens, used atomic.Int64
	const uses = 30 // more than there are concurrent requests: no request meets the end of two tokens
	b.setFault(func(w http.ResponseWriter, r *http.Request, _ []byte) bool {
		if r.URL.Path == "/token" {
			fmt.Fprintf(w, `{"token":"t%d"}`, tokens.Add(1))
			used.Store(0)
			return true
		}
		if r.Header.Get("Authorization") == fmt.Sprintf("Bearer t%d", tokens.Load()) && used.Add(1) <= uses {
			return false
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="test"`, b.registry.URL))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	if p, err := b.prepare(t.Context(), "ns", img, 0, ""); err != nil || !p.exists {
		t.Fatalf("%+v, %v; expected a layer that exists", p, err)
	}
	if tokens.Load() < 2 {
		t.Errorf("%d tokens for %d requests, expected that one ended in the middle", tokens.Load(), b.requests.Load())
	}
	b.runs(b.find("ns", img.chain[0], "")[0], img)
}

// If a mirror has only the beginning of a blob, or loses it during the pull, the registry is used.
func TestPullMirrorLacksBlob(t *testing.T) {
	for name, answers := range map[string]int64{"always": 0, "in the middle": 4} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, nil)
			b.seed(layerOf(200, 1))
			img := b.push("app", chunkedtest.Options{}, layerOf(200, 2))
			var asked atomic.Int64
			mirror := b.mirror("registry.example.com", func(w http.ResponseWriter, r *http.Request) {
				if asked.Add(1) > answers {
					http.NotFound(w, r)
					return
				}
				b.serve(w, r)
			})
			img.ref = "registry.example.com/app:latest"
			b.describe(img)
			if p, err := b.prepare(t.Context(), "ns", img, 0, ""); err != nil || !p.exists {
				t.Fatalf("%+v, %v; expected a layer that exists", p, err)
			}
			if asked.Load() <= answers {
				t.Errorf("mirror %s was asked %d times", mirror, asked.Load())
			}
			b.runs(b.find("ns", img.chain[0], "")[0], img)
		})
	}
}

// If the disk fills up during a pull by files, containerd pulls the layer, and the files written so far are removed.
func TestPullDiskFull(t *testing.T) {
	disk := smallDisk(t)
	heard := hearLog(t)
	b := newBed(t, func(c *config.Config) { c.Root, c.Pool.Size = filepath.Join(disk, "root"), 256<<20 })
	known := file{"known", random(1, 12<<20)}
	b.seed(makeTar(known))
	img := b.push("app", chunkedtest.Options{}, makeTar(known, file{"new", random(2, 8<<20)}))
	var st unix.Statfs_t
	b.must(unix.Statfs(disk, &st))
	ballast := filepath.Join(disk, "ballast")
	b.must(os.WriteFile(ballast, make([]byte, int64(st.Bavail)*st.Bsize-(4<<20)), 0o600))
	b.ordinary(img, 0, "")
	lines := heard.take("the layer is not pulled by its files; containerd pulls it as a whole")
	if len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0].Data["error"]), "no space left on device") {
		t.Errorf("%v, expected a line that says why", lines)
	}
	// Neither registry nor image is at fault: with room again the same layer is pulled.
	b.must(os.Remove(ballast))
	if p, err := b.prepare(t.Context(), "ns", img, 0, ""); err != nil || !p.exists {
		t.Fatalf("%+v, %v; expected a layer that exists", p, err)
	}
	b.runs(b.find("ns", img.chain[0], "")[0], img)
}

// Layers of a client that does not name the image, such as nerdctl, are pulled by files too:
// containerd records the source of the manifest. The newest image with such a layer is used, if its format is right.
func TestPullUnnamed(t *testing.T) {
	b := newBed(t, nil)
	b.seed(layerOf(100, 1))
	img := b.push("app", chunkedtest.Options{}, layerOf(100, 2), layerOf(100, 3))
	img.unnamed = true
	b.ordinary(img, 0, "") // containerd has no source for it
	if got := b.requests.Load(); got != 0 {
		t.Errorf("%d requests", got)
	}
	b.hosts("registry.example.com", b.registry.URL, "")
	b.fetchedFrom(img, "registry.example.com", "a/b/app,unrelated")
	other := b.push("other", chunkedtest.Options{}, img.tars...)
	for i := range other.manifest.Layers {
		other.manifest.Layers[i].Annotations = nil
	}
	b.describe(other)
	b.fetchedFrom(other, "registry.example.com", "other")

	var asked atomic.Value
	b.setFault(func(_ http.ResponseWriter, r *http.Request, _ []byte) bool {
		asked.Store(r.URL.Path)
		return false
	})
	parent := ""
	for i := range img.chain {
		p, err := b.prepare(t.Context(), "ns", img, i, parent)
		b.must(err)
		found := b.find("ns", img.chain[i], parent)
		if !p.exists || len(found) != 1 {
			t.Fatalf("layer %d: %+v, snapshots %q; expected one that exists", i, p, found)
		}
		parent = found[0]
	}
	if path, _ := asked.Load().(string); !strings.HasPrefix(path, "/v2/a/b/app/blobs/") {
		t.Errorf("%s was asked for", path)
	}
	b.runs(parent, img)
}

// fetchedFrom labels the manifest of an image like containerd after a fetch.
func (b *bed) fetchedFrom(img *image, registry, repositories string) {
	b.t.Helper()
	_, err := b.content.Update(namespaces.WithNamespace(b.t.Context(), "ns"), content.Info{
		Digest: img.digest, Labels: map[string]string{
			labelConfig: img.manifest.Config.Digest.String(),
			"containerd.io/distribution.source." + registry: repositories,
		},
	}, "labels."+labelConfig, "labels.containerd.io/distribution.source."+registry)
	b.must(err)
}
