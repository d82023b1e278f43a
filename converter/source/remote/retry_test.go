package remote

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// kinds are the kinds of requests that a pull makes.
var kinds = []string{"token", "manifest", "blob", "range"}

// answer replaces the response of a registry.
type answer func(g *registry, w http.ResponseWriter, r *http.Request)

// failing is a registry that replaces its first n responses to requests of a kind. It cuts the first
// response with a blob, so that there are ranges.
func failing(kind string, n int32, by answer) *registry {
	g := &registry{image: newImage(300_000), locked: true}
	var failed, cut atomic.Int32
	g.fault = func(w http.ResponseWriter, r *http.Request, k string) bool {
		if k == kind && failed.Load() < n {
			failed.Add(1)
			by(g, w, r)
			return true
		}
		if k == "blob" && kind == "range" && cut.Add(1) == 1 {
			g.cut(w, r, 100_000)
		}
		return false
	}
	return g
}

// TestStatuses: requests of any kind are repeated after transient statuses, and only then.
func TestStatuses(t *testing.T) {
	again := []int{408, 429, 500, 502, 503, 504}
	for _, status := range append([]int{
		204, 304, 400, 402, 403, 404, 405, 406, 409, 410, 412, 413, 416, 418, 421, 425, 431, 451, 501, 505, 507, 511,
	}, again...) {
		for _, kind := range kinds {
			t.Run(fmt.Sprint(status, " ", kind), func(t *testing.T) {
				g := failing(kind, 2,
					func(_ *registry, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) })
				host := g.plain(t)
				r, slept := open(t, host+"/some/image:v1", Config{PlainHTTP: true})
				err := pull(t.Context(), r, g.image)
				switch {
				case slices.Contains(again, status):
					if err != nil || len(slept.all) != 2 {
						t.Errorf("error %v, waits %v, expected 2 waits", err, slept.all)
					}
				case status == 416 && kind == "range": // then the blob is read from its start
					if err != nil || len(slept.all) != 0 {
						t.Errorf("error %v, waits %v", err, slept.all)
					}
				default:
					checkError(t, err, host, kind, fmt.Sprint(status), g)
					if n := len(g.asked(kind)); n != 1 || len(slept.all) != 0 {
						t.Errorf("asked %d times, waits %v", n, slept.all)
					}
				}
			})
		}
	}
}

// checkError: a message names the registry, the repository, the requested content and the responses.
func checkError(t *testing.T, err error, host, kind, holds string, g *registry) {
	t.Helper()
	e, ok := errors.AsType[*Error](err)
	if !ok {
		t.Fatalf("error %v, expected an Error", err)
	}
	want := []string{host + "/some/image", "v1", holds}
	if kind == "blob" || kind == "range" {
		want[1] = g.layers[0].Digest.String()
	}
	for _, w := range want {
		if !strings.Contains(e.Error(), w) {
			t.Errorf("error %q, expected %q in it", e, w)
		}
	}
}

// TestUnauthorized: a 401 leads to the token server once.
func TestUnauthorized(t *testing.T) {
	for _, kind := range kinds[1:] {
		for n := range int32(3) {
			g := failing(kind, n+1, func(g *registry, w http.ResponseWriter, r *http.Request) {
				w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="test"`, r.Host))
				w.WriteHeader(http.StatusUnauthorized)
			})
			host := g.plain(t)
			r, slept := open(t, host+"/some/image:v1", Config{PlainHTTP: true})
			err := pull(t.Context(), r, g.image)
			if n == 0 && err != nil {
				t.Errorf("%s: %v", kind, err)
			}
			if n > 0 {
				checkError(t, err, host, kind, "docker login "+host, g)
			}
			if len(slept.all) > 0 {
				t.Errorf("%s: waits %v", kind, slept.all)
			}
		}
	}
}

// TestGivesUp: permanent failures are given up after the documented attempts and time.
// A registry's error is shown only in part: it is a stranger's text in logs and on terminals.
func TestLongErrors(t *testing.T) {
	g := failing("blob", 1000, func(_ *registry, w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprintf(w, `{"errors":[{"code":"DENIED","message":%q}]}`, strings.Repeat("ä", 5000))
	})
	r, _ := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
	err := pull(t.Context(), r, g.image)
	if want := "DENIED: " + strings.Repeat("ä", 292) + "…"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, expected one with 300 characters of the registry's: %q", err, want)
	}
}

func TestGivesUp(t *testing.T) {
	for _, kind := range kinds {
		g := failing(kind, 1000, func(_ *registry, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) })
		host := g.plain(t)
		var said []string
		notify := func(m string) { said = append(said, m) }
		r, slept := open(t, host+"/some/image:v1", Config{PlainHTTP: true, Notify: notify})
		err := pull(t.Context(), r, g.image)
		checkError(t, err, host, kind, "6 attempts", g)
		checkError(t, err, host, kind, "try again later", g)
		if n := len(g.asked(kind)); n != maxAttempts {
			t.Errorf("%s: asked %d times, expected %d", kind, n, maxAttempts)
		}
		for i, d := range slept.all {
			if longest := firstWait << i; d < longest/2 || d > longest {
				t.Errorf("%s: wait %d took %s, expected %s to %s", kind, i, d, longest/2, longest)
			}
		}
		if len(said) != maxAttempts-1 || !strings.Contains(said[0], "503 Service Unavailable; attempt 2 of 6") {
			t.Errorf("%s: said %q", kind, said)
		}
	}
}

// TestRetryAfter: a registry may lengthen a wait, but not for ever.
func TestRetryAfter(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	in := func(d time.Duration) string { return now.Add(d).Format(http.TimeFormat) }
	for _, c := range []struct {
		after, date string
		least       time.Duration // minimal wait; 0: it gives up
	}{
		{"7", "", 7 * time.Second},
		{"0", "", firstWait / 2},
		{"-5", "", firstWait / 2},
		{"1.5", "", firstWait / 2},
		{"soon", "", firstWait / 2},
		{"", "", firstWait / 2},
		{"120", "", 2 * time.Minute},
		{"121", "", 0},
		{"3600", "", 0},
		{"99999999999999999999", "", firstWait / 2}, // out of range
		{"9999999999999999999", "", 0},
		{in(20 * time.Second), in(0), 20 * time.Second},
		{in(20 * time.Second), in(-time.Hour), 0},                           // in an hour by the registry's clock
		{in(-time.Hour + 20*time.Second), in(-time.Hour), 20 * time.Second}, // in 20 seconds by the registry's clock
		{in(-time.Hour), in(0), firstWait / 2},
		{in(time.Hour), in(0), 0},
		{in(0)[:20], in(0), firstWait / 2},
	} {
		for _, kind := range kinds {
			for _, status := range []int{429, 503} {
				g := failing(kind, 1, func(_ *registry, w http.ResponseWriter, _ *http.Request) {
					w.Header().Set("Retry-After", c.after)
					if c.date != "" {
						w.Header().Set("Date", c.date)
					}
					w.WriteHeader(status)
				})
				host := g.plain(t)
				r, slept := open(t, host+"/some/image:v1", Config{PlainHTTP: true})
				err := pull(t.Context(), r, g.image)
				if c.least == 0 {
					checkError(t, err, host, kind, "we wait for 2m0s at most", g)
				}
				if c.least == 0 && len(slept.all) > 0 || c.least > 0 &&
					(err != nil || len(slept.all) != 1 || slept.all[0] < c.least || slept.all[0] > c.least+firstWait) {
					t.Errorf("%s, %d, Retry-After %q at %q: error %v, waits %v, expected %s",
						kind, status, c.after, c.date, err, slept.all, c.least)
				}
			}
		}
	}
}

// TestCancel: a wait ends with its context. Without that, this test takes two minutes.
func TestCancel(t *testing.T) {
	for _, kind := range kinds {
		g := failing(kind, 1000, func(_ *registry, w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "120")
			w.WriteHeader(429)
		})
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("enough")
		r, _ := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true, Notify: func(string) { cancel(why) }})
		r.pace.sleep = sleep
		if err := pull(ctx, r, g.image); !errors.Is(err, why) {
			t.Errorf("%s: error %v, expected %v", kind, err, why)
		}
	}
}

// TestClosedWhileItWaits: Close ends a Read that waits for the next attempt.
func TestClosedWhileItWaits(t *testing.T) {
	g := failing("range", 1000, func(_ *registry, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) })
	waiting := make(chan struct{}, 10)
	r, _ := open(t, g.plain(t)+"/some/image:v1",
		Config{PlainHTTP: true, Notify: func(string) { waiting <- struct{}{} }})
	r.pace.sleep = func(ctx context.Context, _ time.Duration) error { return sleep(ctx, time.Hour) }
	rc, err := r.Open(t.Context(), g.layers[0])
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		b := make([]byte, 1<<20)
		var err error
		for err == nil {
			_, err = rc.Read(b)
		}
		done <- err
	}()
	<-waiting
	rc.Close()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, expected %v", err, context.Canceled)
	}
}

// TestCertificates: an untrusted certificate is not retried.
func TestCertificates(t *testing.T) {
	g := &registry{image: newImage(1000)}
	srv, _ := g.start(t, (*httptest.Server).StartTLS)
	// The registry has another name, because containerd verifies no certificate of localhost.
	dir := hostsFile(t, "registry.example.com", fmt.Sprintf("server = %q\n", srv.URL))
	r, slept := open(t, "registry.example.com/some/image:v1", Config{HostDirs: []string{dir}})
	err := pull(t.Context(), r, g.image)
	if err == nil || !strings.Contains(err.Error(), "hosts.toml") || len(slept.all) > 0 {
		t.Errorf("error %v, waits %v, expected one that names hosts.toml and no waits", err, slept.all)
	}
}
