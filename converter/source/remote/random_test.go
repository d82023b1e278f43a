package remote

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// injector makes faults at random.
type injector struct {
	g    *registry
	mu   sync.Mutex // guards rand
	rand *rand.Rand
	rate int // percentage of all requests
	n    map[string]*atomic.Int32
}

func (i *injector) pick(n int) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.rand.IntN(n)
}

// faults are named. Each handles a request differently, the first two in place of a range.
var faults = []struct {
	name string
	make func(i *injector, w http.ResponseWriter, r *http.Request)
}{
	{"other range", func(i *injector, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", i.pick(1000), i.pick(400_000), i.pick(400_000)))
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(i.g.blobs[idOf(r)])
	}},
	{"no ranges", func(_ *injector, w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
	}},
	{"busy", func(i *injector, w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", fmt.Sprint(i.pick(20)))
		w.WriteHeader([]int{408, 429, 500, 502, 503, 504}[i.pick(6)])
	}},
	{"long page", func(_ *injector, w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadGateway)
		fmt.Fprint(w, strings.Repeat("sorry ", 50_000))
	}},
	{"cut", func(i *injector, w http.ResponseWriter, r *http.Request) { i.g.cut(w, r, i.pick(200_000)) }},
	{"cut early", func(i *injector, w http.ResponseWriter, r *http.Request) { i.g.cut(w, r, i.pick(3)) }},
	{"no answer", func(_ *injector, w http.ResponseWriter, _ *http.Request) { hijack(w, nil, false) }},
	{"reset", func(_ *injector, w http.ResponseWriter, _ *http.Request) { hijack(w, nil, true) }},
	{"half a head", func(i *injector, w http.ResponseWriter, _ *http.Request) {
		head := "HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n"
		hijack(w, []byte(head[:i.pick(len(head))]), i.pick(2) == 0)
	}},
	{"garbage", func(i *injector, w http.ResponseWriter, _ *http.Request) {
		b := make([]byte, 100)
		for j := range b {
			b[j] = byte(i.pick(256))
		}
		hijack(w, b, false)
	}},
	{"silence", func(_ *injector, _ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }},
	{"stall", func(i *injector, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(i.g.blobs[idOf(r)])+1))
		b := i.g.blobs[idOf(r)]
		_, _ = w.Write(b[:len(b)/2])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}},
	{"expired", func(i *injector, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="test"`, r.Host))
		w.WriteHeader(http.StatusUnauthorized)
	}},
	{"web page", func(_ *injector, w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, "<html>")
	}},
	{"wrong bytes", func(i *injector, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(i.g.blobs[idOf(r)])))
		_, _ = w.Write(make([]byte, len(i.g.blobs[idOf(r)])))
	}},
	{"long", func(i *injector, w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		_, _ = w.Write(append(i.g.blobs[idOf(r)][:0:0], i.g.blobs[idOf(r)]...))
		fmt.Fprint(w, "more")
	}},
	{"gone", func(_ *injector, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) }},
	{"nowhere", func(_ *injector, w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://127.0.0.1:1/?secret=sesame", http.StatusTemporaryRedirect)
	}},
}

func (i *injector) fault(w http.ResponseWriter, r *http.Request, kind string) bool {
	if i.pick(100) >= i.rate {
		return false
	}
	f := faults[i.pick(len(faults))]
	if kind == "range" && i.pick(2) == 0 {
		f = faults[i.pick(2)]
	}
	i.n[f.name].Add(1)
	f.make(i, w, r)
	return true
}

// TestRandomFaults: for any faults of a registry and its mirror, a pull ends, with the right bytes or
// with a descriptive error. Nothing stays open.
func TestRandomFaults(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	before := runtime.NumGoroutine()
	counts, right, wrong := map[string]*atomic.Int32{}, 0, 0
	for _, f := range faults {
		counts[f.name] = new(atomic.Int32)
	}
	for seed := range uint64(60) {
		ok, failed := randomPulls(t, seed, counts)
		right, wrong = right+ok, wrong+failed
	}
	all := 0
	for _, f := range faults {
		n := int(counts[f.name].Load())
		if n == 0 {
			t.Errorf("fault %q did not occur", f.name)
		}
		all += n
	}
	t.Logf("%d faults, %d pulls right, %d failed", all, right, wrong)
	if all < 200 || right < 20 || wrong < 20 {
		t.Errorf("%d faults, %d pulls right, %d failed: this shows little", all, right, wrong)
	}
	eventually(t, func() string {
		if n := runtime.NumGoroutine(); n > before {
			b := make([]byte, 1<<20)
			return fmt.Sprintf("%d goroutines, %d before:\n%s", n, before, b[:runtime.Stack(b, true)])
		}
		return ""
	})
}

// randomPulls pulls an image a few times and checks that no connection is left.
func randomPulls(t *testing.T, seed uint64, counts map[string]*atomic.Int32) (right, wrong int) {
	t.Helper()
	random := rand.New(rand.NewPCG(seed, 0))
	start := func() (*registry, *httptest.Server, string) {
		g := &registry{image: newImage(300_000, 150_000, 1), locked: random.IntN(2) == 0}
		i := &injector{g: g, rand: rand.New(rand.NewPCG(seed, random.Uint64())), rate: 5 + random.IntN(60), n: counts}
		g.fault = i.fault
		srv, host := g.start(t, (*httptest.Server).Start)
		return g, srv, host
	}
	upstream, srv1, server := start()
	mirror, srv2, address := start()
	c := Config{PlainHTTP: true, Notify: func(m string) {
		if strings.Contains(m, "sesame") {
			t.Errorf("seed %d: said %q", seed, m)
		}
	}}
	ref := server + "/some/image:v1"
	if random.IntN(2) == 0 {
		ref = "registry.example.com/some/image:v1"
		c.HostDirs = []string{hostsFile(t, "registry.example.com",
			fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n", server, address))}
	}
	r, err := New(ref, c)
	if err != nil {
		t.Fatal(err)
	}
	r.pace = pace{answer: 100 * time.Millisecond, stall: 100 * time.Millisecond, sleep: new(waits).sleep}
	for range 3 {
		if err := pullAtOnce(t.Context(), r, upstream.image); err != nil {
			wrong++
			checkRandomError(t, seed, err, upstream.image)
		} else {
			right++
		}
	}
	r.Close()
	for _, g := range []*registry{upstream, mirror} {
		eventually(t, func() string {
			g.mu.Lock()
			defer g.mu.Unlock()
			if len(g.conns) > 0 {
				return fmt.Sprintf("seed %d: %d connections are left", seed, len(g.conns))
			}
			return ""
		})
	}
	srv1.Close()
	srv2.Close()
	return right, wrong
}

// eventually waits until nothing is wrong: the other end of a connection notices its end a little later.
func eventually(t *testing.T, wrong func() string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		w := wrong()
		if w == "" {
			return
		}
		if time.Now().After(end) {
			t.Error(w)
			return
		}
	}
}

// pullAtOnce reads the layers concurrently, like a conversion.
func pullAtOnce(ctx context.Context, r *Repository, m image) error {
	first := m
	first.layers = nil
	if err := pull(ctx, r, first); err != nil {
		return err
	}
	done := make(chan error)
	for _, d := range m.layers {
		go func() {
			err := read(ctx, r, d)
			if errors.Is(err, errDigest) {
				err = fmt.Errorf("%w of %s", err, d.Digest)
			}
			done <- err
		}()
	}
	var all []error
	for range m.layers {
		all = append(all, <-done)
	}
	return errors.Join(all...)
}

// checkRandomError: an error names registry, repository and requested content, and shows no secret.
// The reader detects wrong bytes.
func checkRandomError(t *testing.T, seed uint64, err error, m image) {
	t.Helper()
	if strings.Contains(err.Error(), "sesame") {
		t.Errorf("seed %d: %v", seed, err)
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		named := strings.Contains(line, "/some/image: manifest v1: ")
		for _, d := range m.layers {
			named = named || strings.Contains(line, "/some/image: blob "+d.Digest.String()+": ") ||
				line == fmt.Sprintf("%v of %s", errDigest, d.Digest)
		}
		if !named && !strings.HasPrefix(line, "manifest \"") {
			t.Errorf("seed %d: %q names nothing", seed, line)
		}
	}
}
