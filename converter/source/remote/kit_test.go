package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// image is a manifest and its layers. The content of the manifest does not matter.
type image struct {
	doc    []byte
	layers []ocispec.Descriptor
	blobs  map[digest.Digest][]byte
}

func newImage(sizes ...int) image {
	m := image{doc: []byte(`{"schemaVersion":2}`), blobs: map[digest.Digest][]byte{}}
	random := rand.NewChaCha8([32]byte{1})
	for _, n := range sizes {
		b := make([]byte, n)
		_, _ = random.Read(b)
		d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(b), Size: int64(n)}
		m.blobs[d.Digest] = b
		m.layers = append(m.layers, d)
	}
	return m
}

// registry serves an image under any name, with support for ranges.
type registry struct {
	image
	// fault may handle a request differently. kind is token, manifest, blob or range.
	fault fault
	// locked requires tokens. Each is valid for good requests; 0 means all.
	locked bool
	good   int
	realm  string // address of the token server, if it is another one

	mu     sync.Mutex // guards the following fields
	log    []*http.Request
	tokens map[string]int
	conns  map[net.Conn]http.ConnState
}

type fault func(w http.ResponseWriter, r *http.Request, kind string) bool

func kindOf(r *http.Request) string {
	switch {
	case r.URL.Path == "/token":
		return "token"
	case strings.Contains(r.URL.Path, "/manifests/"):
		return "manifest"
	case r.Header.Get("Range") != "":
		return "range"
	}
	return "blob"
}

func (g *registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind := kindOf(r)
	g.mu.Lock()
	g.log = append(g.log, r.Clone(context.Background())) // faults may change it
	g.mu.Unlock()
	switch {
	case g.fault != nil && g.fault(w, r, kind):
	case kind == "token":
		g.token(w)
	case g.locked && !g.admit(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")):
		realm := g.realm
		if realm == "" {
			realm = "http://" + r.Host + "/token"
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="test"`, realm))
		http.Error(w, "who are you?", http.StatusUnauthorized)
	case kind == "manifest":
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		_, _ = w.Write(g.doc)
	default:
		g.blob(w, r)
	}
}

func (g *registry) token(w http.ResponseWriter) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.tokens == nil {
		g.tokens = map[string]int{}
	}
	token := fmt.Sprint("token", len(g.tokens))
	g.tokens[token] = 0
	fmt.Fprintf(w, `{"token":%q}`, token)
}

func (g *registry) admit(token string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	n, known := g.tokens[token]
	if known {
		g.tokens[token]++
	}
	return known && (g.good == 0 || n < g.good)
}

func (g *registry) blob(w http.ResponseWriter, r *http.Request) {
	b, ok := g.blobs[idOf(r)]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown to registry"}]}`)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
}

func idOf(r *http.Request) digest.Digest {
	return digest.Digest(r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:])
}

// asked returns the requests of a kind, or all requests for "".
func (g *registry) asked(kind string) (all []*http.Request) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, r := range g.log {
		if kind == "" || kindOf(r) == kind {
			all = append(all, r)
		}
	}
	return all
}

// start serves until the end of the test and returns the server and its name in references.
func (g *registry) start(t testing.TB, start func(*httptest.Server)) (srv *httptest.Server, host string) {
	t.Helper()
	g.conns = map[net.Conn]http.ConnState{}
	srv = httptest.NewUnstartedServer(g)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.Config.ConnState = func(c net.Conn, s http.ConnState) {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.conns[c] = s; s == http.StateClosed || s == http.StateHijacked {
			delete(g.conns, c)
		}
	}
	start(srv)
	t.Cleanup(srv.Close)
	_, host, _ = strings.Cut(srv.URL, "://")
	return srv, host
}

func (g *registry) plain(t testing.TB) string {
	t.Helper()
	_, host := g.start(t, (*httptest.Server).Start)
	return host
}

// cut sends n bytes of a response with the rest of the blob and closes the connection.
func (g *registry) cut(w http.ResponseWriter, r *http.Request, n int) {
	g.blob(&cutter{w, n}, r)
}

type cutter struct {
	http.ResponseWriter
	left int
}

func (c *cutter) Write(p []byte) (int, error) {
	if len(p) < c.left {
		c.left -= len(p)
		return c.ResponseWriter.Write(p)
	}
	_, _ = c.ResponseWriter.Write(p[:c.left])
	c.ResponseWriter.(http.Flusher).Flush()
	panic(http.ErrAbortHandler)
}

// waits records the sleeps of a repository without sleeping.
type waits struct {
	mu  sync.Mutex
	all []time.Duration
}

func (s *waits) sleep(ctx context.Context, d time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, d)
	return ctx.Err()
}

// open returns a repository that does not really sleep.
func open(t testing.TB, ref string, c Config) (*Repository, *waits) {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	t.Setenv("HOME", t.TempDir())
	if c.Notify == nil {
		c.Notify = func(string) {}
	}
	r, err := New(ref, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	s := &waits{}
	r.pace.sleep = s.sleep
	return r, s
}

// pull reads a manifest and all layers of an image.
func pull(ctx context.Context, r *Repository, m image) error {
	got, err := r.Manifest(ctx)
	if err != nil {
		return err
	}
	if !bytes.Equal(got.Doc, m.doc) {
		return fmt.Errorf("manifest %q, expected %q", got.Doc, m.doc)
	}
	for _, d := range m.layers {
		if err := read(ctx, r, d); err != nil {
			return err
		}
	}
	return nil
}

var errDigest = errors.New("the digest is wrong")

// read reads a blob to its end.
func read(ctx context.Context, r *Repository, d ocispec.Descriptor) error {
	rc, err := r.Open(ctx, d)
	if err != nil {
		return err
	}
	b, err := io.ReadAll(rc)
	if err := errors.Join(err, rc.Close()); err != nil {
		return err
	}
	if digest.FromBytes(b) != d.Digest {
		return errDigest
	}
	return nil
}

// hostsFile writes a hosts.toml for a registry and returns the directory for Config.HostDirs.
func hostsFile(t testing.TB, host, text string) string {
	t.Helper()
	dir := t.TempDir()
	at := filepath.Join(dir, host)
	if name, port, ok := strings.Cut(host, ":"); ok {
		at = filepath.Join(dir, name+"_"+port+"_")
	}
	if err := os.MkdirAll(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(at, "hosts.toml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func digestOf(b []byte) string { return digest.FromBytes(b).String() }

// oddServer serves without TLS and answers anything but HTTP with bytes that are not HTTP.
func oddServer(t testing.TB, g *registry) (host string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	behind := g.plain(t)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				first := make([]byte, 1)
				if _, err := io.ReadFull(c, first); err != nil {
					return
				}
				if first[0] == 0x16 { // a TLS handshake
					_, _ = c.Write([]byte("<!DOCTYPE html>"))
					return
				}
				d, err := net.Dial("tcp", behind)
				if err != nil {
					return
				}
				defer d.Close()
				_, _ = d.Write(first)
				go func() { _, _ = io.Copy(d, c) }()
				_, _ = io.Copy(c, d)
			}()
		}
	}()
	return l.Addr().String()
}

// resolveHere resolves all host names to one server.
func resolveHere(t testing.TB, r *Repository, address string) {
	t.Helper()
	if _, err := r.able(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	for _, tr := range r.transports {
		tr.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		}
	}
}
