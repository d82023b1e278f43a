package remote

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/log"
)

// dockerConfig writes the file of docker login. It must be called after open, which gives the test a new home.
func dockerConfig(t testing.TB, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(os.Getenv("DOCKER_CONFIG"), "config.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestTokens: tokens are fetched once, and again when they expire during concurrent pulls of blobs.
func TestTokens(t *testing.T) {
	for _, c := range []struct{ good, tokens int }{{0, 1}, {1, 5}, {2, 3}} {
		g := &registry{image: newImage(1000, 1000, 1000, 1000), locked: true, good: c.good}
		r, slept := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
		if err := pull(t.Context(), r, g.image); err != nil || len(slept.all) > 0 {
			t.Errorf("%+v: error %v, waits %v", c, err, slept.all)
		}
		if n := len(g.asked("token")); n != c.tokens {
			t.Errorf("%+v: %d tokens", c, n)
		}
		g.mu.Lock()
		g.good, g.tokens = 0, map[string]int{"another": 0} // expire the old ones
		g.mu.Unlock()
		var failed atomic.Int32
		g.fault = func(w http.ResponseWriter, _ *http.Request, kind string) bool {
			if kind != "token" || failed.Add(1) > 2 {
				return false
			}
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		done := make(chan error)
		for _, d := range g.layers {
			go func() { done <- read(t.Context(), r, d) }()
		}
		for range g.layers {
			if err := <-done; err != nil {
				t.Errorf("%+v: %v", c, err)
			}
		}
	}
}

// TestCredentials: each host gets its own credentials, in the form that it asks for.
func TestCredentials(t *testing.T) {
	upstream, mirror := &registry{image: newImage(1000)}, &registry{image: newImage(1000)}
	basic := func(user, password string) fault {
		return func(w http.ResponseWriter, r *http.Request, _ string) bool {
			u, p, ok := r.BasicAuth()
			if ok && u == user && p == password {
				return false
			}
			if ok {
				t.Errorf("user %q, password %q", u, p)
			}
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
	}
	upstream.fault = basic("up", "stream")
	dir, server, address := pair(t, upstream, mirror)
	mirror.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
		if basic("mir", "ror")(w, r, kind) {
			return true
		}
		if kind == "blob" {
			w.WriteHeader(http.StatusNotFound)
		}
		return kind == "blob"
	}
	r, _ := open(t, "registry.example.com/some/image:v1", Config{HostDirs: []string{dir}})
	auth := func(user, password string) string {
		return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	}
	dockerConfig(t, fmt.Sprintf(`{"auths":{%q:{"auth":%q},%q:{"auth":%q}}}`,
		server, auth("up", "stream"), address, auth("mir", "ror")))
	if err := pull(t.Context(), r, upstream.image); err != nil {
		t.Error(err)
	}
}

// TestStoredTokens: an identity token is exchanged; a registry token is sent unchanged.
func TestStoredTokens(t *testing.T) {
	for _, key := range []string{"identitytoken", "registrytoken"} {
		g := &registry{image: newImage(1000), locked: true, tokens: map[string]int{"mine": 0}}
		g.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
			if kind == "token" && r.FormValue("refresh_token") == "mine" {
				fmt.Fprint(w, `{"access_token":"mine"}`)
			}
			return kind == "token"
		}
		host := g.plain(t)
		r, _ := open(t, host+"/some/image:v1", Config{PlainHTTP: true})
		dockerConfig(t, fmt.Sprintf(`{"auths":{%q:{%q:"mine"}}}`, host, key))
		if err := pull(t.Context(), r, g.image); err != nil {
			t.Errorf("%s: %v", key, err)
		}
	}
}

// helpers installs credential helpers for docker.
func helpers(t testing.TB) {
	t.Helper()
	bin := t.TempDir()
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	for name, script := range map[string]string{
		"fails":   "echo 'the vault is locked'; exit 1",
		"rubbish": "echo hello",
		"hangs":   `while [ -e "$0" ]; do sleep 0.05; done`, // until the end of the test
		"works":   `read host; echo "{\"ServerURL\":\"$host\",\"Username\":\"user\",\"Secret\":\"secret\"}"`,
	} {
		file := filepath.Join(bin, "docker-credential-"+name)
		if err := os.WriteFile(file, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCredentialHelpers: a bad helper gives a warning, and is part of the error for a private image.
func TestCredentialHelpers(t *testing.T) {
	helpers(t)
	var logged bytes.Buffer
	log.L.Logger.SetOutput(&logged)
	t.Cleanup(func() { log.L.Logger.SetOutput(os.Stderr) })
	for _, c := range []struct {
		helper        string
		private, warn bool
	}{
		{"missing", false, true},
		{"missing", true, true},
		{"fails", false, true},
		{"fails", true, true},
		{"rubbish", false, true},
		{"rubbish", true, true},
		{"works", true, false},
	} {
		g := &registry{image: newImage(1000, 1000), locked: true, tokens: map[string]int{"for user": 0}}
		g.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
			switch {
			case kind != "token" || !c.private:
				return false
			case r.FormValue("username") == "user" && r.FormValue("password") == "secret":
				fmt.Fprint(w, `{"access_token":"for user"}`)
			default:
				w.WriteHeader(http.StatusUnauthorized)
			}
			return true
		}
		host := g.plain(t)
		r, _ := open(t, host+"/some/image:v1", Config{PlainHTTP: true})
		dockerConfig(t, fmt.Sprintf(`{"credsStore":%q}`, c.helper))
		logged.Reset()
		err := pull(t.Context(), r, g.image)
		if warned := strings.Contains(logged.String(), "no credentials for "+host); warned != c.warn {
			t.Errorf("%+v: logged %q", c, logged.String())
		}
		if c.private && c.warn {
			checkError(t, err, host, "manifest", "docker login "+host+"; credentials could not be read: ", g)
		} else if err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// TestHelperThatHangs: a hanging helper does not block the caller.
func TestHelperThatHangs(t *testing.T) {
	helpers(t)
	g := &registry{image: newImage(1000), locked: true}
	ctx, cancel := context.WithCancel(t.Context())
	g.fault = func(_ http.ResponseWriter, r *http.Request, _ string) bool {
		time.AfterFunc(100*time.Millisecond, cancel) // most likely while the helper runs
		return false
	}
	r, _ := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
	dockerConfig(t, `{"credsStore":"hangs"}`)
	if err := pull(ctx, r, g.image); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, expected %v", err, context.Canceled)
	}
}

// TestTokenServers: a registry must not direct credentials to arbitrary places.
func TestTokenServers(t *testing.T) {
	for realm, want := range map[string]string{
		"http://token.example.com/token":    "expected one with https",
		"http://169.254.169.254/latest":     "expected one with https",
		"https://169.254.169.254/latest":    "private network",
		"https://[fe80::1]/token":           "private network",
		"https://10.0.0.1:8443/token":       "private network",
		"https://127.0.0.1/token":           "private network",
		"https://[::ffff:127.0.0.1]/token":  "private network",
		"file:///etc/passwd":                "expected one with https",
		"https://user:sesame@10.0.0.1/oken": "private network",
	} {
		g := &registry{image: newImage(1000), locked: true, realm: realm}
		dir := hostsFile(t, "registry.example.com", "")
		of := filepath.Join(dir, "registry.example.com")
		server := withTLS(t, g, of, "server", 0)
		_, port, _ := strings.Cut(server, ":")
		text := fmt.Sprintf("server = \"https://example.com:%s\"\nca = \"server.crt\"\n", port)
		if err := os.WriteFile(filepath.Join(of, "hosts.toml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		r, slept := open(t, "registry.example.com/some/image:v1", Config{HostDirs: []string{dir}})
		resolveHere(t, r, server)
		_, err := r.Manifest(t.Context())
		secret := err != nil && strings.Contains(err.Error(), "sesame")
		if err == nil || !strings.Contains(err.Error(), want) || secret || len(slept.all) > 0 {
			t.Errorf("%s: error %v, waits %v, expected %q", realm, err, slept.all, want)
		}
	}
}

// TestTokenNotFound: a missing token server does not mean a missing image.
func TestTokenNotFound(t *testing.T) {
	g := failing("token", 1000, func(_ *registry, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) })
	r, _ := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
	_, err := r.Manifest(t.Context())
	if err == nil || errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "token server") {
		t.Errorf("error %v, expected one about the token server", err)
	}
}

// TestHugeToken: a token server cannot exhaust memory.
func TestHugeToken(t *testing.T) {
	g := failing("token", 1000, func(_ *registry, w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"token":"`)
		for range 64 {
			if _, err := io.WriteString(w, strings.Repeat("x", 1<<20)); err != nil {
				return
			}
		}
		fmt.Fprint(w, `"}`)
	})
	r, slept := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
	_, err := r.Manifest(t.Context())
	if err == nil || !strings.Contains(err.Error(), "no token") || len(slept.all) > 0 {
		t.Errorf("error %v, waits %v, expected that there is no token", err, slept.all)
	}
}
