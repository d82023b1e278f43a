package remote

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
)

// target is a registry for pushes. It requires tokens, each valid for a limited number of requests.
type target struct {
	good   int
	fault  func(w http.ResponseWriter, r *http.Request) bool
	upload string // host for uploads, if it is another one

	mu     sync.Mutex
	log    []*http.Request
	left   int
	tokens int
	scopes []string // of the last token
	blobs  map[digest.Digest][]byte
}

func (g *target) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.log = append(g.log, r)
	if r.URL.Path == "/token" {
		_ = r.ParseForm()
		g.scopes = strings.Fields(strings.Join(append(r.URL.Query()["scope"], r.PostForm["scope"]...), " "))
		g.tokens, g.left = g.tokens+1, g.good
		fmt.Fprintf(w, `{"token":"t%d"}`, g.tokens)
		return
	}
	if own := r.Host != g.upload; own &&
		(r.Header.Get("Authorization") != fmt.Sprintf("Bearer t%d", g.tokens) || g.left == 0) {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, r.Host))
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	g.left--
	if g.fault != nil && g.fault(w, r) {
		return
	}
	switch {
	case r.Method == http.MethodHead:
		b, ok := g.blobs[idOf(r)]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
	case r.Method == http.MethodPost:
		w.Header().Set("Location", "/v2/some/image/blobs/uploads/1?state=x%2Fy")
		if g.upload != "" {
			w.Header().Set("Location", "http://"+g.upload+"/somewhere?signature=sesame")
		}
		w.WriteHeader(http.StatusAccepted)
	case r.Method == http.MethodPut && r.URL.Query().Get("digest") != "" && err == nil:
		d := digest.Digest(r.URL.Query().Get("digest"))
		if digest.FromBytes(body) != d || int64(len(body)) != r.ContentLength {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		g.blobs[d] = body
		w.WriteHeader(http.StatusCreated)
	default:
		w.WriteHeader(http.StatusCreated)
	}
}

func (g *target) start(t *testing.T) string {
	g.blobs = map[digest.Digest][]byte{}
	if g.good == 0 {
		g.good = 1000
	}
	srv := httptest.NewServer(g)
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

func pushed(t *testing.T, r *Repository, b []byte) (Pushed, error) {
	d := ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}
	return r.PushBlob(t.Context(), d,
		func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }, nil)
}

// TestPushTokens: a token that expires at any request is replaced, and the request is repeated with its body.
func TestPushTokens(t *testing.T) {
	b := bytes.Repeat([]byte("blob"), 100_000)
	for good := 1; good < 6; good++ {
		g := &target{good: good}
		host := g.start(t)
		r, slept := open(t, host+"/some/image:v1", Config{PlainHTTP: true, Push: true, MountFrom: "other/image"})
		if how, err := pushed(t, r, b); err != nil || how != Sent {
			t.Fatalf("tokens for %d requests: %v, error %v", good, how, err)
		}
		if how, err := pushed(t, r, b); err != nil || how != Present {
			t.Fatalf("again: %v, error %v", how, err)
		}
		if err := r.PushManifest(t.Context(), ocispec.MediaTypeImageManifest, []byte("{}"), true); err != nil {
			t.Fatal(err)
		}
		if len(slept.all) > 0 {
			t.Errorf("waits %v", slept.all)
		}
		for _, want := range []string{"repository:some/image:pull,push", "repository:other/image:pull"} {
			if !slices.Contains(g.scopes, want) {
				t.Errorf("asked for tokens for %q, expected %q among them", g.scopes, want)
			}
		}
		last := g.log[len(g.log)-1]
		if last.URL.Path != "/v2/some/image/manifests/v1" ||
			last.Header.Get("Content-Type") != ocispec.MediaTypeImageManifest {
			t.Errorf("last request %s with type %q", last.URL, last.Header.Get("Content-Type"))
		}
	}
}

// TestPushElsewhere: a registry may direct uploads to another host. That host gets no credentials, and
// errors do not show its address, which may be signed.
func TestPushElsewhere(t *testing.T) {
	other := &target{}
	g := &target{}
	g.upload = other.start(t)
	other.upload = g.upload
	r, _ := open(t, g.start(t)+"/some/image:v1", Config{PlainHTTP: true, Push: true})
	if _, err := pushed(t, r, []byte("blob")); err != nil {
		t.Fatal(err)
	}
	if n := len(other.log); n != 1 || other.log[0].Header.Get("Authorization") != "" || len(other.blobs) != 1 {
		t.Errorf("the other host was asked %d times, with %v", n, other.log)
	}
	other.fault = func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusForbidden)
		return true
	}
	if _, err := pushed(t, r, []byte("more")); err == nil || strings.Contains(err.Error(), "sesame") {
		t.Errorf("error %v, expected one without the signature", err)
	}
}

// TestPushRefused: the error describes what the registry does wrong.
func TestPushRefused(t *testing.T) {
	for _, c := range []struct {
		name, holds string
		mismatch    bool
		fault       func(w http.ResponseWriter, r *http.Request) bool
	}{
		{"no Location", "without Location", false, func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPost {
				w.WriteHeader(http.StatusAccepted)
			}
			return r.Method == http.MethodPost
		}},
		{"other digest", "digest mismatch", true, func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut {
				w.Header().Set("Docker-Content-Digest", digest.FromString("other").String())
				w.WriteHeader(http.StatusCreated)
			}
			return r.Method == http.MethodPut
		}},
		{"no room", "answers 413", false, func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut {
				w.WriteHeader(http.StatusRequestEntityTooLarge)
			}
			return r.Method == http.MethodPut
		}},
	} {
		g := &target{fault: c.fault}
		r, slept := open(t, g.start(t)+"/some/image:v1", Config{PlainHTTP: true, Push: true})
		_, err := pushed(t, r, []byte("blob"))
		if err == nil || !strings.Contains(err.Error(), c.holds) || errors.Is(err, blob.ErrMismatch) != c.mismatch ||
			len(slept.all) > 0 {
			t.Errorf("%s: error %v, waits %v", c.name, err, slept.all)
		}
	}
}

// TestPushStalls: a registry that takes no byte is tried again, and finally given up.
func TestPushStalls(t *testing.T) {
	stop := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodHead:
			w.WriteHeader(http.StatusNotFound)
		case http.MethodPost:
			w.Header().Set("Location", "/upload")
			w.WriteHeader(http.StatusAccepted)
		default:
			<-stop
		}
	}))
	t.Cleanup(srv.Close)
	t.Cleanup(func() { close(stop) })
	r, _ := open(t, strings.TrimPrefix(srv.URL, "http://")+"/some/image:v1", Config{PlainHTTP: true, Push: true})
	r.pace.stall = 100 * time.Millisecond
	_, err := pushed(t, r, make([]byte, 64<<20))
	if err == nil || !strings.Contains(err.Error(), "6 attempts") {
		t.Errorf("error %v, expected 6 attempts", err)
	}
}

// TestPushReference: a push by digest must have that digest, and only hosts with the push capability are used.
func TestPushReference(t *testing.T) {
	g := &target{}
	host := g.start(t)
	r, _ := open(t, host+"/some/image@"+digestOf([]byte("other")), Config{PlainHTTP: true, Push: true})
	if err := r.PushManifest(t.Context(), ocispec.MediaTypeImageManifest, []byte("{}"), true); err == nil ||
		len(g.log) > 0 {
		t.Errorf("error %v after %d requests, expected one before any", err, len(g.log))
	}
	dir := hostsFile(t, host,
		fmt.Sprintf("server = \"http://%s\"\n[host.\"http://127.0.0.1:1\"]\ncapabilities = [\"pull\"]\n", host))
	r, _ = open(t, host+"/some/image:v1", Config{PlainHTTP: true, Push: true, HostDirs: []string{dir}})
	if _, err := pushed(t, r, []byte("blob")); err != nil {
		t.Errorf("with a mirror that takes no pushes: %v", err)
	}
}
