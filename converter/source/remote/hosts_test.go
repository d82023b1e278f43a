package remote

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
)

// trace records the requests to several registries.
type trace struct {
	mu    sync.Mutex
	lines []string
}

func (s *trace) add(name string, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	line := fmt.Sprintf("%s %s secret=%q", name, r.URL.RequestURI(), r.Header.Get("X-Secret"))
	if kindOf(r) == "token" { // the order of its query does not matter
		line = name + " " + r.URL.Path
	}
	s.lines = append(s.lines, line)
}

// take returns each distinct request and resets the trace.
func (s *trace) take() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var l []string
	for _, line := range s.lines { // containerd asks with HEAD first, and more often for a token
		if !slices.Contains(l, line) {
			l = append(l, line)
		}
	}
	s.lines = nil
	return l
}

// withTLS starts a registry and writes its certificate and key to NAME.crt and NAME.key in dir.
func withTLS(t testing.TB, g *registry, dir, name string, clients tls.ClientAuthType) (host string) {
	t.Helper()
	srv, host := g.start(t, func(s *httptest.Server) {
		s.TLS = &tls.Config{ClientAuth: clients}
		s.StartTLS()
	})
	key, err := x509.MarshalPKCS8PrivateKey(srv.TLS.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		name + ".crt": {Type: "CERTIFICATE", Bytes: srv.Certificate().Raw},
		name + ".key": {Type: "PRIVATE KEY", Bytes: key},
	} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return host
}

// TestHostsAsContainerd: for any hosts.toml, the hosts get the same requests in the same order as from
// containerd's resolver and fetcher.
func TestHostsAsContainerd(t *testing.T) {
	const ref = "registry.example.com/some/image:v1"
	for _, c := range []struct {
		name, mirror string // the mirror in hosts.toml; MIRROR stands for its address
		base         string // path of the mirror's address
		clients      tls.ClientAuthType
		fault        func(g *registry) fault
		locked       bool
		noPull       bool
	}{
		{name: "all", mirror: `ca = "mirror.crt"`},
		{name: "pull only", mirror: "ca = \"mirror.crt\"\ncapabilities = [\"pull\"]"},
		{name: "resolve only", noPull: true, mirror: "ca = \"mirror.crt\"\ncapabilities = [\"resolve\"]"},
		{name: "push only", noPull: true, mirror: "ca = \"mirror.crt\"\ncapabilities = [\"push\"]"},
		{name: "skip_verify", mirror: `skip_verify = true`},
		{name: "unknown certificate", mirror: ``},
		{name: "path", mirror: `ca = "mirror.crt"`, base: "/base"},
		{name: "override_path", mirror: "ca = \"mirror.crt\"\noverride_path = true", base: "/base/api"},
		{
			name: "client", clients: tls.RequireAnyClientCert,
			mirror: "ca = \"mirror.crt\"\nclient = [[\"mirror.crt\", \"mirror.key\"]]",
		},
		{name: "no client", clients: tls.RequireAnyClientCert, mirror: `ca = "mirror.crt"`},
		{name: "header", mirror: "ca = \"mirror.crt\"\n[host.\"MIRROR\".header]\nx-secret = \"sesame\""},
		{name: "token", mirror: `ca = "mirror.crt"`, locked: true},
		{name: "lacks the blob", mirror: `ca = "mirror.crt"`, fault: func(*registry) fault {
			return func(w http.ResponseWriter, r *http.Request, kind string) bool {
				if kind == "blob" {
					w.WriteHeader(http.StatusNotFound)
				}
				return kind == "blob"
			}
		}},
		{name: "lacks everything", mirror: `ca = "mirror.crt"`, fault: always(http.StatusNotFound)},
		{name: "forbids everything", mirror: `ca = "mirror.crt"`, fault: always(http.StatusForbidden)},
		{name: "in trouble", mirror: `ca = "mirror.crt"`, fault: always(http.StatusInternalServerError)},
		{name: "unknown key", mirror: "ca = \"mirror.crt\"\nunknown = 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var seen trace
			follow := func(name string, more func(g *registry) fault) *registry {
				g := &registry{image: newImage(1000)}
				var next fault
				if more != nil {
					next = more(g)
				}
				g.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
					seen.add(name, r)
					return next != nil && next(w, r, kind)
				}
				return g
			}
			dir := hostsFile(t, "registry.example.com", "")
			of := filepath.Join(dir, "registry.example.com")
			upstream, mirror := follow("upstream", nil), follow("mirror", c.fault)
			server := withTLS(t, upstream, of, "upstream", tls.NoClientCert)
			address := withTLS(t, mirror, of, "mirror", c.clients)
			mirror.locked, mirror.realm = c.locked, "https://"+address+"/token"
			address = "https://" + address + c.base
			text := fmt.Sprintf("server = \"https://%s\"\nca = \"upstream.crt\"\n[host.%q]\n%s\n", server, address,
				strings.ReplaceAll(c.mirror, "MIRROR", address))
			if err := os.WriteFile(filepath.Join(of, "hosts.toml"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}

			resolver := docker.NewResolver(docker.ResolverOptions{Hosts: config.ConfigureHosts(t.Context(),
				config.HostOptions{HostDir: config.HostDirFromRoot(dir)})})
			_, _, err := resolver.Resolve(t.Context(), ref)
			if err != nil {
				t.Fatal(err)
			}
			fetcher, err := resolver.Fetcher(t.Context(), ref)
			if err != nil {
				t.Fatal(err)
			}
			rc, err := fetcher.Fetch(t.Context(), upstream.layers[0])
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, rc); err != nil {
				t.Fatal(err)
			}
			rc.Close()
			want := seen.take()

			r, slept := open(t, ref, Config{HostDirs: []string{t.TempDir(), dir}})
			if err := pull(t.Context(), r, upstream.image); err != nil || len(slept.all) > 0 {
				t.Errorf("error %v, waits %v", err, slept.all)
			}
			got := seen.take()
			if c.noPull { // containerd's Fetch asks such a mirror for blobs by mistake
				for i := range want {
					want[i] = strings.Replace(want[i], "mirror", "upstream", 1)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("asked for\n%s\ncontainerd asked for\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}

func always(status int) func(*registry) fault {
	return func(*registry) fault {
		return func(w http.ResponseWriter, _ *http.Request, _ string) bool {
			w.WriteHeader(status)
			return true
		}
	}
}

// pair starts a registry and a mirror without TLS and returns the directory with hosts.toml.
func pair(t testing.TB, upstream, mirror *registry) (dir, server, address string) {
	t.Helper()
	server, address = upstream.plain(t), mirror.plain(t)
	return hostsFile(t, "registry.example.com",
		fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n", server, address)), server, address
}

// TestMirrorsTakeTurns: a mirror that fails or asks to wait delays nothing, but is asked again if the
// registry fails, too.
func TestMirrorsTakeTurns(t *testing.T) {
	busy := func(w http.ResponseWriter, _ *http.Request, _ string) bool {
		w.Header().Set("Retry-After", "30")
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	}
	upstream, mirror := &registry{image: newImage(100_000)}, &registry{image: newImage(100_000), fault: busy}
	dir, _, _ := pair(t, upstream, mirror)
	r, slept := open(t, "registry.example.com/some/image:v1", Config{HostDirs: []string{dir}})
	if err := pull(t.Context(), r, upstream.image); err != nil || len(slept.all) > 0 {
		t.Errorf("error %v, waits %v", err, slept.all)
	}

	// A network that cannot reach the registry, and a mirror that fails once for each request.
	failed := map[string]bool{}
	upstream.fault = always(http.StatusForbidden)(nil)
	mirror.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
		if failed[kind] {
			return false
		}
		failed[kind] = true
		return busy(w, r, kind)
	}
	before := len(upstream.asked(""))
	if err := pull(t.Context(), r, mirror.image); err != nil || len(slept.all) != 2 {
		t.Errorf("error %v, waits %v", err, slept.all)
	}
	if n := len(upstream.asked("")) - before; n != 2 {
		t.Errorf("the registry was asked %d times, expected 2: it said for good that it has nothing", n)
	}

	// Neither has the image.
	mirror.fault = always(http.StatusNotFound)(nil)
	err := pull(t.Context(), r, mirror.image)
	for _, holds := range []string{"registry.example.com/some/image: manifest v1", "404 Not Found; ", "403 Forbidden"} {
		if err == nil || !strings.Contains(err.Error(), holds) {
			t.Errorf("error %v, expected %q in it", err, holds)
		}
	}
	if errors.Is(err, ErrNotFound) {
		t.Errorf("%v is taken for not found", err)
	}
	upstream.fault = always(http.StatusNotFound)(nil)
	if err := pull(t.Context(), r, mirror.image); !errors.Is(err, ErrNotFound) {
		t.Errorf("error %v, expected %v", err, ErrNotFound)
	}
}

// TestMirrorStopsInTheMiddle: the registry sends the rest of a blob.
func TestMirrorStopsInTheMiddle(t *testing.T) {
	upstream, mirror := &registry{image: newImage(300_000)}, &registry{image: newImage(300_000)}
	dir, _, _ := pair(t, upstream, mirror)
	mirror.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
		switch kind {
		case "blob":
			mirror.cut(w, r, 50_000)
		case "range":
			w.WriteHeader(http.StatusNotFound)
		}
		return kind != "manifest"
	}
	r, _ := open(t, "registry.example.com/some/image:v1", Config{HostDirs: []string{dir}})
	if err := pull(t.Context(), r, upstream.image); err != nil {
		t.Error(err)
	}
	// It sends nothing and claims to be complete.
	mirror.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
		if kind != "manifest" {
			mirror.cut(w, r, 0)
		}
		return kind != "manifest"
	}
	if err := pull(t.Context(), r, upstream.image); err != nil {
		t.Error(err)
	}
	if n := len(upstream.asked("")); n != 2 {
		t.Errorf("the registry was asked %d times, expected 2", n)
	}
}

// TestMirrorLies: after a manifest with wrong bytes or length, the next host is asked.
func TestMirrorLies(t *testing.T) {
	upstream, mirror := &registry{image: newImage(1000)}, &registry{image: newImage(1000)}
	dir, _, _ := pair(t, upstream, mirror)
	mirror.fault = func(w http.ResponseWriter, _ *http.Request, _ string) bool {
		fmt.Fprint(w, `{"schemaVersion":3}`)
		return true
	}
	r, slept := open(t, "registry.example.com/some/image@"+digestOf(upstream.doc), Config{HostDirs: []string{dir}})
	if err := pull(t.Context(), r, upstream.image); err != nil || len(slept.all) > 0 {
		t.Errorf("error %v, waits %v", err, slept.all)
	}
}

// TestHeadersStay: a header from hosts.toml does not follow a redirect to another host.
func TestHeadersStay(t *testing.T) {
	store := &registry{image: newImage(1000)}
	g := &registry{image: store.image}
	server := g.plain(t)
	_, port, _ := strings.Cut(store.plain(t), ":")
	g.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
		if kind == "blob" {
			http.Redirect(w, r, "http://localhost:"+port+r.URL.Path, http.StatusTemporaryRedirect)
		}
		return kind == "blob"
	}
	dir := hostsFile(t, "registry.example.com",
		fmt.Sprintf("server = \"http://%s\"\n[header]\nx-secret = \"sesame\"\n", server))
	r, _ := open(t, "registry.example.com/some/image:v1", Config{HostDirs: []string{dir}})
	if err := pull(t.Context(), r, store.image); err != nil {
		t.Fatal(err)
	}
	if got := g.asked("blob")[0].Header.Get("X-Secret"); got != "sesame" {
		t.Errorf("the registry got header %q", got)
	}
	if got := store.asked("blob")[0].Header.Get("X-Secret"); got != "" {
		t.Errorf("another host got header %q", got)
	}
}

// TestLocalhost: without hosts.toml, only registries on this machine may lack TLS.
func TestLocalhost(t *testing.T) {
	g := &registry{image: newImage(1000)}
	r, _ := open(t, g.plain(t)+"/some/image:v1", Config{})
	if err := pull(t.Context(), r, g.image); err != nil {
		t.Errorf("without TLS: %v", err)
	}
	secure := &registry{image: newImage(1000)}
	_, host := secure.start(t, (*httptest.Server).StartTLS)
	r, _ = open(t, host+"/some/image:v1", Config{})
	if err := pull(t.Context(), r, g.image); err != nil {
		t.Errorf("with TLS: %v", err)
	}
	// The response to a handshake need not look like a registry's.
	odd := &registry{image: newImage(1000)}
	r, _ = open(t, oddServer(t, odd)+"/some/image:v1", Config{})
	if err := pull(t.Context(), r, odd.image); err != nil {
		t.Errorf("without TLS, and an answer to it that is no HTTP: %v", err)
	}
}

// TestBrokenHosts: an invalid hosts.toml is an error or treated like in containerd, and never a panic.
func TestBrokenHosts(t *testing.T) {
	for _, text := range []string{
		"server = ", "server = \"http://%zz\"", "[host]\n[host.\"\"]", "capabilities = [\"fly\"]", "ca = 5",
		"ca = \"no.such.file\"",
		"client = [1, 2]", "\x00", "server = \"\"\n[host.\"http://127.0.0.1:1\"]\ncapabilities=[\"push\"]\n",
	} {
		dir := hostsFile(t, "127.0.0.1:1", text)
		r, _ := open(t, "127.0.0.1:1/some/image:v1", Config{PlainHTTP: true, HostDirs: []string{dir}})
		ctx, cancel := context.WithCancel(t.Context())
		r.conf.Notify = func(string) { cancel() }
		if err := pull(ctx, r, image{}); err == nil {
			t.Errorf("%q: no error", text)
		}
		cancel()
	}
}

// TestDockerHub: Docker Hub has three names, for references, requests and credentials.
func TestDockerHub(t *testing.T) {
	g := &registry{image: newImage(1000)}
	g.fault = func(w http.ResponseWriter, r *http.Request, _ string) bool {
		if _, p, _ := r.BasicAuth(); p == "secret" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	_, address := g.start(t, (*httptest.Server).StartTLS)
	r, _ := open(t, "debian", Config{})
	dockerConfig(t, `{"auths":{"https://index.docker.io/v1/":{"username":"user","password":"secret"}}}`)
	resolveHere(t, r, address)
	for _, tr := range r.transports {
		tr.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} // of a test server
	}
	if err := pull(t.Context(), r, g.image); err != nil {
		t.Fatal(err)
	}
	last := g.asked("manifest")[1]
	if u := last.Host + last.URL.RequestURI(); u != "registry-1.docker.io/v2/library/debian/manifests/latest" {
		t.Errorf("asked for %s", u)
	}
	if r.String() != "docker.io/library/debian:latest" {
		t.Errorf("named %s", r)
	}
}
