package daemon

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
	"github.com/daxfs/daxfs-snapshotter/internal/chunkedtest"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// ordinary fails the test unless containerd has to fetch the layer, and nothing of it was stored.
func (b *bed) ordinary(img *image, i int, parent string) {
	b.t.Helper()
	had := b.hasLayer(img.diffIDs[i])
	p, err := b.prepare(b.t.Context(), "ns", img, i, parent)
	if err != nil || p.exists || p.staged || len(p.mounts) == 0 {
		b.t.Fatalf("%+v, %v; expected ordinary mounts", p, err)
	}
	if !had && b.hasLayer(img.diffIDs[i]) {
		b.t.Error("the layer is there")
	}
}

// changed returns options that change the first entry with contents in a table.
func changed(change func(*chunked.Entry)) chunkedtest.Options {
	return chunkedtest.Options{TOC: func(t *chunked.TOC) {
		for i := range t.Entries {
			if t.Entries[i].Digest != "" {
				change(&t.Entries[i])
				return
			}
		}
	}}
}

// An image with false tables is pulled ordinarily, and costs no more than the bytes of its blob.
func TestPullLies(t *testing.T) {
	heard := hearLog(t)
	b := newBed(t, nil)
	b.seed(layerOf(200, 1))
	secret := layerOf(200, 9)
	n := 0
	push := func(o chunkedtest.Options) *image {
		n++
		return b.push(fmt.Sprintf("lie-%d", n), o, layerOf(200, uint64(100+n)))
	}
	for name, lie := range chunkedtest.Lies() {
		t.Run(name, func(t *testing.T) {
			var sent atomic.Int64
			b.setFault(func(w http.ResponseWriter, r *http.Request, blob []byte) bool {
				http.ServeContent(&countingWriter{w, &sent}, r, "", time.Time{}, bytes.NewReader(blob))
				return true
			})
			defer b.setFault(nil)
			img := push(lie)
			b.ordinary(img, 0, "")
			lines := heard.take("the layer is not pulled by its files; containerd pulls it as a whole")
			if len(lines) != 1 {
				t.Errorf("%d lines say that the layer is refused", len(lines))
			}
			if size := img.manifest.Layers[0].Size; sent.Load() == 0 || sent.Load() > size {
				t.Errorf("%d bytes were sent of a blob of %d", sent.Load(), size)
			}
		})
	}
	t.Run("contents of another file", func(t *testing.T) {
		// The pool has both contents, and the sizes match: only the diff ID reveals the swap.
		twins := func(a, b string) []byte {
			var raw bytes.Buffer
			w := tar.NewWriter(&raw)
			for name, body := range map[string]string{"a": a, "b": b} {
				w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(body))})
				io.WriteString(w, body)
			}
			w.Close()
			return raw.Bytes()
		}
		b.seed(twins("good", "evil"))
		img := b.push("twins", changed(func(e *chunked.Entry) { e.Digest = digest.FromString("evil") }),
			twins("good", "good"))
		b.ordinary(img, 0, "")
	})
	t.Run("diff ID of another layer", func(t *testing.T) {
		img := push(chunkedtest.Options{})
		img.diffIDs[0] = digest.FromBytes(secret)
		b.describe(img)
		b.ordinary(img, 0, "")
	})
	t.Run("diff ID of a layer that is there", func(t *testing.T) {
		img := push(chunkedtest.Options{})
		img.diffIDs[0] = digest.FromBytes(layerOf(200, 1))
		b.describe(img)
		b.ordinary(img, 0, "")
	})
	t.Run("blob of another image", func(t *testing.T) {
		right, wrong := push(chunkedtest.Options{}), push(chunkedtest.Options{})
		b.mu.Lock()
		b.blobs[wrong.manifest.Layers[0].Digest.String()] = b.blobs[right.manifest.Layers[0].Digest.String()]
		b.mu.Unlock()
		b.ordinary(wrong, 0, "")
	})
	t.Run("chain ID", func(t *testing.T) {
		img := push(chunkedtest.Options{})
		img.chain[0] = digest.FromString("another chain")
		b.ordinary(img, 0, "")
	})
	t.Run("a table of a gigabyte", func(t *testing.T) {
		img := push(chunkedtest.Options{})
		before := b.requests.Load()
		img.manifest.Layers[0].Annotations[chunked.AnnotationTOCPosition] = "100:1073741824:1073741824:1"
		b.describe(img)
		b.ordinary(img, 0, "")
		if got := b.requests.Load() - before; got != 0 {
			t.Errorf("%d requests", got)
		}
	})
	// A correct image is still pulled file by file.
	img := push(chunkedtest.Options{})
	if p, err := b.prepare(t.Context(), "ns", img, 0, ""); err != nil || !p.exists {
		t.Errorf("%+v, %v; expected a layer that exists", p, err)
	}
}

// If the pull does not apply, the registry gets no request, or one for all layers of an image.
func TestPullDoesNotApply(t *testing.T) {
	for _, c := range []struct {
		name     string
		change   func(*config.Config)
		image    func(*bed, *image)
		requests int64
	}{
		{name: "turned off", change: func(c *config.Config) { c.Partial.Enabled = false }},
		{name: "no annotations", image: func(b *bed, img *image) {
			for i := range img.manifest.Layers {
				img.manifest.Layers[i].Annotations = nil
			}
			b.describe(img)
		}},
		{name: "excluded", change: func(c *config.Config) {
			c.Partial.Exclude = []string{"excluded.example.com"}
		}, image: func(_ *bed, img *image) { img.ref = "excluded.example.com/app:latest" }},
		{name: "no reference", image: func(_ *bed, img *image) { img.ref = "no reference:::" }},
		{name: "no manifest", image: func(b *bed, img *image) { img.digest = digest.FromString("x") }},
		{name: "old containerd", image: func(b *bed, _ *image) {
			b.Daemon.blobs.version = containerdVersion("v2.3.9")
		}, requests: 2}, // the first layer has no parent in any case; its tables and its files
		{name: "refused", image: func(b *bed, _ *image) {
			b.setFault(func(w http.ResponseWriter, _ *http.Request, _ []byte) bool {
				w.WriteHeader(http.StatusForbidden)
				return true
			})
		}, requests: 1},
		{name: "no ranges", image: func(b *bed, _ *image) {
			b.setFault(func(w http.ResponseWriter, r *http.Request, blob []byte) bool {
				w.Write(blob)
				return true
			})
		}, requests: 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, c.change)
			b.seed(layerOf(30, 1))
			img := b.push("app", chunkedtest.Options{}, layerOf(30, 2), layerOf(30, 3))
			if c.image != nil {
				c.image(b, img)
			}
			for i := range img.diffIDs {
				p, err := b.prepare(t.Context(), "ns", img, i, "")
				if err != nil || p.staged || p.exists && (i > 0 || c.name != "old containerd") {
					t.Errorf("layer %d: %+v, %v; expected ordinary mounts", i, p, err)
				}
			}
			if got := b.requests.Load(); got != c.requests && !(c.name == "old containerd" && got >= c.requests) {
				t.Errorf("%d requests, expected %d", got, c.requests)
			}
		})
	}
}

// hosts writes a hosts.toml for a registry.
func (b *bed) hosts(registry, server, more string) {
	b.t.Helper()
	dir := filepath.Join(b.cfg.Registries.HostsDirs[0], registry)
	text := fmt.Sprintf("server = %q\n%s", server, more)
	b.must(errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644)))
}

// mirror starts a mirror that forwards to the registry where serve does not answer, and returns its address.
func (b *bed) mirror(registry string, serve http.HandlerFunc) string {
	b.t.Helper()
	m := httptest.NewServer(serve)
	b.t.Cleanup(m.Close)
	b.hosts(registry, b.registry.URL, fmt.Sprintf("[host.%q]\ncapabilities = [\"pull\"]\n", m.URL))
	return m.URL
}

// With TLS and a password: hosts.toml has the CA, docker's configuration our credentials. Without them
// containerd pulls. A changed password is read from the same place.
func TestPullWithLogin(t *testing.T) {
	docker := t.TempDir()
	t.Setenv("DOCKER_CONFIG", docker)
	b := newBed(t, nil)
	b.seed(layerOf(30, 1))
	var right atomic.Value
	right.Store("secret")
	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, ok := r.BasicAuth(); !ok || user != "node" || password != right.Load() {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		b.serve(w, r)
	}))
	defer secure.Close()
	const host = "registry.example.com"
	ca := filepath.Join(t.TempDir(), "ca.crt")
	b.must(os.WriteFile(ca,
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}), 0o644))
	b.hosts(host, "https://"+host, fmt.Sprintf("[host.%q]\ncapabilities = [\"pull\"]\nca = %q\n", secure.URL, ca))

	login := func(password string) {
		auth := fmt.Sprintf(`{"auths":{%q:{"username":"node","password":%q}}}`,
			strings.TrimPrefix(secure.URL, "https://"), password)
		b.must(os.WriteFile(filepath.Join(docker, "config.json"), []byte(auth), 0o600))
	}
	for i, password := range []string{"", "wrong", "secret", "changed"} {
		if password != "" {
			login(password)
		}
		img := b.push("app", chunkedtest.Options{}, layerOf(30, uint64(2+i)))
		img.ref = fmt.Sprintf("%s/app:%d", host, min(i, 2)) // connections and passwords are cached by name
		b.describe(img)
		if i < 2 {
			b.ordinary(img, 0, "")
			continue
		}
		right.Store(password)
		if p, err := b.prepare(t.Context(), "ns", img, 0, ""); err != nil || !p.exists {
			t.Errorf("%+v, %v; expected a layer that exists", p, err)
		}
	}
}

// With an empty pool there is nothing to save, so nobody is asked. A blob in containerd is not fetched again.
func TestPullNothingToSave(t *testing.T) {
	b := newBed(t, nil)
	img := b.push("app", chunkedtest.Options{}, layerOf(30, 2))
	b.ordinary(img, 0, "")
	b.seed(layerOf(30, 1))
	img = b.push("app", chunkedtest.Options{}, layerOf(30, 3))
	layer := img.manifest.Layers[0]
	ctx := namespaces.WithNamespace(t.Context(), "ns")
	b.must(content.WriteBlob(ctx, b.content, "blob", bytes.NewReader(b.blobs[layer.Digest.String()]), layer))
	b.ordinary(img, 0, "")
	if got := b.requests.Load(); got != 0 {
		t.Errorf("%d requests", got)
	}
}

// The configuration bounds the wait for a registry that does not answer.
func TestPullTimeout(t *testing.T) {
	b := newBed(t, func(c *config.Config) { c.Partial.AnswerTimeout = config.Duration(200 * time.Millisecond) })
	b.seed(layerOf(30, 1))
	stop := make(chan struct{})
	defer close(stop)
	b.setFault(func(_ http.ResponseWriter, r *http.Request, _ []byte) bool {
		select {
		case <-stop:
		case <-r.Context().Done():
		}
		return true
	})
	b.ordinary(b.push("app", chunkedtest.Options{}, layerOf(30, 2)), 0, "")
}

// A pool without room for the missing contents leaves the layer to containerd.
func TestPullFull(t *testing.T) {
	b := newBed(t, func(c *config.Config) { c.Pool.Size = 16 << 20 })
	b.seed(layerOf(30, 1))
	free := b.pool().Usage().Free
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	b.must(w.WriteHeader(&tar.Header{Name: "large", Mode: 0o644, Size: free + 1<<20}))
	_, err := io.CopyN(w, zeros{}, free+1<<20)
	b.must(errors.Join(err, w.Close()))
	img := b.push("app", chunkedtest.Options{}, raw.Bytes())
	b.ordinary(img, 0, "")
	if got := b.requests.Load(); got != 1 {
		t.Errorf("%d requests, expected one for the tables", got)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// faults are errors between a registry and us.
var faults = []func(rng *rand.Rand, w http.ResponseWriter, r *http.Request, blob []byte) bool{
	func(rng *rand.Rand, w http.ResponseWriter, _ *http.Request, _ []byte) bool { // statuses
		codes := []int{200, 204, 206, 301, 400, 401, 403, 404, 408, 416, 429, 500, 502, 503, 504}
		w.WriteHeader(codes[rng.IntN(len(codes))])
		return true
	},
	func(*rand.Rand, http.ResponseWriter, *http.Request, []byte) bool { panic(http.ErrAbortHandler) },
	func(_ *rand.Rand, w http.ResponseWriter, _ *http.Request, blob []byte) bool {
		w.Write(blob)
		return true
	},
	func(_ *rand.Rand, w http.ResponseWriter, _ *http.Request, _ []byte) bool {
		w.Header().Set("Content-Type", "text/html")
		w.Write([]byte("<html>log in</html>"))
		return true
	},
	func(rng *rand.Rand, w http.ResponseWriter, r *http.Request, blob []byte) bool { // other bytes
		blob = bytes.Clone(blob)
		for range 1 + len(blob)/100 {
			blob[rng.IntN(len(blob))] ^= 1
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
		return true
	},
	func(rng *rand.Rand, w http.ResponseWriter, r *http.Request, blob []byte) bool { // another range
		r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", rng.IntN(len(blob)/2), len(blob)/2))
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
		return true
	},
	func(rng *rand.Rand, w http.ResponseWriter, r *http.Request, blob []byte) bool { // cut off
		http.ServeContent(&cutWriter{ResponseWriter: w, left: rng.IntN(2000)}, r, "", time.Time{},
			bytes.NewReader(blob))
		panic(http.ErrAbortHandler)
	},
	func(rng *rand.Rand, _ http.ResponseWriter, r *http.Request, _ []byte) bool { // slow
		select {
		case <-time.After(time.Duration(rng.IntN(300)) * time.Millisecond):
		case <-r.Context().Done():
		}
		return false
	},
}

// cutWriter drops everything after a number of bytes.
type cutWriter struct {
	http.ResponseWriter
	left int
}

func (c *cutWriter) Write(b []byte) (int, error) {
	n := min(len(b), c.left)
	c.left -= n
	if _, err := c.ResponseWriter.Write(b[:n]); err != nil {
		return 0, err
	}
	return len(b), nil
}

// Each of two hundred pulls meets a fault at a random request, once or permanently. Each ends with the
// layer or with an ordinary pull, and failed pulls leave nothing behind, which the end of the test checks.
func TestPullFaults(t *testing.T) {
	slow.Skip(t, "waits for faults that do not end")
	b := newBed(t, func(c *config.Config) {
		// A busy machine must not count as a fault, and a permanent fault should not take long.
		c.Partial.AnswerTimeout = config.Duration(5 * time.Second)
		c.Partial.LayerTimeout = config.Duration(15 * time.Second)
	})
	b.seed(layerOf(60, 1))
	var images []*image
	n := 200
	if testing.Short() { // under the race detector
		n = 60
	}
	for i := range n {
		images = append(images, b.push(fmt.Sprintf("app-%d", i), chunkedtest.Options{}, layerOf(60, uint64(1000+i))))
	}
	counts := map[string]*atomic.Int64{}
	for i := range images {
		counts[fmt.Sprintf("app-%d", i)] = &atomic.Int64{}
	}
	b.setFault(func(w http.ResponseWriter, r *http.Request, blob []byte) bool {
		name := strings.Split(r.URL.Path, "/")[2]
		var i uint64
		fmt.Sscanf(name, "app-%d", &i)
		rng := rand.New(rand.NewPCG(i, 11))
		f, at, forGood := faults[rng.IntN(len(faults))], rng.Int64N(5), rng.IntN(2) == 0
		if n := counts[name].Add(1) - 1; n < at || n > at && !forGood {
			return false
		}
		return f(rng, w, r, blob)
	})
	var pulled, left atomic.Int64
	var wg sync.WaitGroup
	next := make(chan *image)
	for range 32 {
		wg.Go(func() {
			for img := range next {
				p, err := b.prepare(context.WithoutCancel(t.Context()), "ns", img, 0, "")
				switch {
				case err != nil || p.staged:
					t.Errorf("%s: %+v, %v", img.ref, p, err)
				case p.exists != b.hasLayer(img.diffIDs[0]):
					t.Errorf("%s: exists: %v, the layer is there: %v", img.ref, p.exists, !p.exists)
				case p.exists:
					pulled.Add(1)
					b.runs(b.find("ns", img.chain[0], "")[0], img)
				default:
					left.Add(1)
				}
			}
		})
	}
	for _, img := range images {
		next <- img
	}
	close(next)
	wg.Wait()
	t.Logf("%d layers were pulled, %d left to containerd", pulled.Load(), left.Load())
	if pulled.Load() < 5 || left.Load() < 5 {
		t.Error("expected some of both")
	}
}
