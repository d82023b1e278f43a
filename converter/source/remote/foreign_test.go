package remote

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// foreign is a registry with TLS that lacks its layer, and another server that has it.
type foreign struct {
	upstream, elsewhere *registry
	repo                *Repository
	slept               *waits
	layer               ocispec.Descriptor
}

// newForeign starts both, with certificates that the repository trusts. The registry requires a password.
func newForeign(t *testing.T) *foreign {
	f := &foreign{upstream: &registry{image: newImage(1000)}, elsewhere: &registry{image: newImage(200_000)}}
	f.layer = f.elsewhere.layers[0]
	dir := hostsFile(t, "registry.example.com", "")
	of := filepath.Join(dir, "registry.example.com")
	server := withTLS(t, f.upstream, of, "server", 0)
	place := withTLS(t, f.elsewhere, of, "elsewhere", 0)
	text := fmt.Sprintf("server = \"https://%s\"\nca = \"server.crt\"\n[header]\nx-secret = \"sesame\"\n", server)
	if err := os.WriteFile(filepath.Join(of, "hosts.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	f.upstream.fault = func(w http.ResponseWriter, r *http.Request, _ string) bool {
		if _, p, _ := r.BasicAuth(); p == "sesame" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	f.repo, f.slept = open(t, "registry.example.com/some/image:v1", Config{HostDirs: []string{dir}})
	const user = `{"username":"u","password":"sesame"}`
	dockerConfig(t, fmt.Sprintf(`{"auths":{%q:%s,%q:%s}}`, server, user, place, user))
	if _, err := f.repo.able(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	// the transport of outside; all these servers have the same certificate
	last := f.repo.transports[len(f.repo.transports)-1]
	last.TLSClientConfig = f.repo.transports[len(f.repo.transports)-2].TLSClientConfig.Clone()
	f.layer.URLs = []string{"https://" + place + "/store/" + f.layer.Digest.String() + "?signature=x"}
	return f
}

// TestForeignLayers: a layer missing in the registry is fetched from its URLs, without our secrets.
func TestForeignLayers(t *testing.T) {
	f := newForeign(t)
	cut := false
	f.elsewhere.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
		if cut || kind == "range" {
			return false
		}
		cut = true
		f.elsewhere.cut(w, r, 100_000) // it is resumed like from any host
		return true
	}
	f.layer.URLs = append([]string{
		"::", "ftp://127.0.0.1/x", "http://" + f.layer.URLs[0][8:], "/path", "https:///path",
	}, "https://user:pass@"+f.layer.URLs[0][8:])
	if err := read(t.Context(), f.repo, f.layer); err != nil {
		t.Fatal(err)
	}
	all := f.elsewhere.asked("")
	if len(all) != 2 {
		t.Errorf("asked %d times, expected 2", len(all))
	}
	for _, r := range all {
		if r.URL.RawQuery != "signature=x" {
			t.Errorf("asked for %s", r.URL)
		}
		for _, name := range []string{"Authorization", "Cookie", "X-Secret", "Referer"} {
			if v := r.Header.Get(name); v != "" {
				t.Errorf("%s: %q", name, v)
			}
		}
	}
}

// TestForeignOnlyIfNotFound: the URLs are used only if the registry answers 404.
func TestForeignOnlyIfNotFound(t *testing.T) {
	for _, status := range []int{200, 400, 401, 403, 429, 500, 503} {
		f := newForeign(t)
		inner := f.upstream.fault
		f.upstream.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
			if inner(w, r, kind) {
				return true
			}
			if status != 200 {
				w.WriteHeader(status)
			}
			return status != 200
		}
		if status == 200 {
			f.upstream.blobs = f.elsewhere.blobs
		}
		err := read(t.Context(), f.repo, f.layer)
		if (err == nil) != (status == 200) || len(f.elsewhere.asked("")) > 0 {
			t.Errorf("%d: error %v, asked elsewhere %d times", status, err, len(f.elsewhere.asked("")))
		}
	}
}

// TestForeignWithoutTLS: an address without TLS is refused where the registry has TLS, and so is a redirect to one.
func TestForeignWithoutTLS(t *testing.T) {
	f := newForeign(t)
	plain := &registry{image: f.elsewhere.image}
	host := plain.plain(t)
	https := f.layer.URLs[0]
	f.layer.URLs = []string{"http://" + host + "/store/" + f.layer.Digest.String()}
	for range 2 {
		err := read(t.Context(), f.repo, f.layer)
		if err == nil || !strings.Contains(err.Error(), "404") || !strings.Contains(err.Error(), errNoTLS.Error()) {
			t.Errorf("error %v, expected 404 and %q", err, errNoTLS)
		}
		f.layer.URLs = []string{https}
		f.elsewhere.fault = func(w http.ResponseWriter, r *http.Request, _ string) bool {
			http.Redirect(w, r, "http://"+host+"/store/"+f.layer.Digest.String(), http.StatusFound)
			return true
		}
	}
	if n := len(plain.asked("")); n > 0 {
		t.Errorf("asked %d times without TLS", n)
	}

	// If nobody uses TLS, that is the user's choice.
	upstream := &registry{image: newImage(1000)}
	r, _ := open(t, upstream.plain(t)+"/some/image:v1", Config{})
	f.layer.URLs = []string{"http://" + host + "/store/" + f.layer.Digest.String()}
	if err := read(t.Context(), r, f.layer); err != nil {
		t.Error(err)
	}
}

// TestForeignErrors: the error contains both failures without the query, and attempts are limited.
func TestForeignErrors(t *testing.T) {
	f := newForeign(t)
	f.elsewhere.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
		w.WriteHeader(http.StatusForbidden)
		return true
	}
	for range 100 {
		f.layer.URLs = append(f.layer.URLs, f.layer.URLs[0])
	}
	err := read(t.Context(), f.repo, f.layer)
	for _, holds := range []string{
		"registry.example.com/some/image", f.layer.Digest.String(), "404 Not",
		"403 Forbidden",
	} {
		if err == nil || !strings.Contains(err.Error(), holds) {
			t.Errorf("error %v, expected %q in it", err, holds)
		}
	}
	if err != nil && strings.Contains(err.Error(), "signature") {
		t.Errorf("error %v holds the query", err)
	}
	if n := len(f.elsewhere.asked("")); n != maxURLs {
		t.Errorf("asked %d times, expected %d", n, maxURLs)
	}
	// A manifest has no URLs.
	f.layer.MediaType = ocispec.MediaTypeImageManifest
	if err := read(t.Context(), f.repo, f.layer); err == nil || len(f.elsewhere.asked("")) != maxURLs {
		t.Errorf("error %v, asked elsewhere for a manifest", err)
	}
}
