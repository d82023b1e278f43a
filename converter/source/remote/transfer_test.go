package remote

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
)

// hijack answers with arbitrary bytes and closes the connection, with a reset if rude.
func hijack(w http.ResponseWriter, b []byte, rude bool) {
	c, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	_, _ = c.Write(b)
	if tcp, ok := c.(*net.TCPConn); ok && rude {
		_ = tcp.SetLinger(0)
	}
	c.Close()
}

// TestConnectionsEndAnywhere: in the header or the body of a response, with or without a reset.
func TestConnectionsEndAnywhere(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, kind := range kinds[1:] {
		for range 40 {
			whole := new(bytes.Buffer)
			n := random.IntN(300)
			if kind != "manifest" && random.IntN(2) == 0 {
				n = random.IntN(300_000)
			}
			g := failing(kind, 1, func(g *registry, w http.ResponseWriter, r *http.Request) {
				b, status, extra := g.doc, "200 OK", ""
				if kind != "manifest" {
					b = g.blobs[idOf(r)]
				}
				if kind == "range" {
					from := 0
					_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
					status, extra = "206 Partial Content",
						fmt.Sprintf("Content-Range: bytes %d-%d/%d\r\n", from, len(b)-1, len(b))
					b = b[from:]
				}
				fmt.Fprintf(whole, "HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n%s", status, len(b), extra, b)
				hijack(w, whole.Bytes()[:min(n, whole.Len()-1)], n%2 == 0)
			})
			g.locked = false
			r, _ := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
			if err := pull(t.Context(), r, g.image); err != nil {
				t.Errorf("%s, cut at byte %d: %v", kind, n, err)
			}
		}
	}
}

// TestManyLosses: a blob may come in any number of pieces that are not too small.
func TestManyLosses(t *testing.T) {
	for _, c := range []struct {
		piece  int
		ranges bool
		err    string
	}{
		{progress, true, ""},
		{progress, false, "connection lost"}, // without ranges, the piece was read already
		{1, true, "connection lost: unexpected EOF"},
		{0, true, "6 attempts"},
	} {
		g := &registry{image: newImage(20 * progress)}
		g.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
			if kind == "manifest" {
				return false
			}
			if !c.ranges {
				r.Header.Del("Range")
			}
			g.cut(w, r, c.piece)
			return true
		}
		r, _ := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
		err := pull(t.Context(), r, g.image)
		if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%+v: error %v", c, err)
		}
		if n := len(g.asked("")); c.err != "" && n > 2*maxAttempts+2 {
			t.Errorf("%+v: asked %d times", c, n)
		}
	}
}

// TestRanges: however a registry handles ranges, the blob is correct.
func TestRanges(t *testing.T) {
	part := func(span, total string, move int) answer {
		return func(g *registry, w http.ResponseWriter, r *http.Request) {
			b, from := g.blobs[idOf(r)], 0
			_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
			if span != "" {
				size := strings.ReplaceAll(total, "N", fmt.Sprint(len(b)))
				w.Header().Set("Content-Range", fmt.Sprintf(span, from+move, len(b)-1)+"/"+size)
			}
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(b[from+move:])
		}
	}
	for _, c := range []struct {
		name   string
		answer answer
		again  bool // requested without a range
	}{
		{"as they should be", part("bytes %d-%d", "N", 0), false},
		{"total unknown", part("bytes %d-%d", "*", 0), false},
		{"other range", part("bytes %d-%d", "N", 1), true},
		{"from the beginning", part("bytes %d-%d", "N", -100_000), true},
		{"other total", part("bytes %d-%d", "1N", 0), true},
		{"no Content-Range", part("", "", 0), true},
		{"other unit", part("lines %d-%d", "N", 0), true},
		{"several parts", func(_ *registry, w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "multipart/byteranges; boundary=x")
			w.WriteHeader(http.StatusPartialContent)
			fmt.Fprint(w, "--x\r\n")
		}, true},
		{"416", func(_ *registry, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(416) }, true},
		{"200", func(g *registry, w http.ResponseWriter, r *http.Request) {
			r.Header.Del("Range")
			g.blob(w, r)
		}, false},
		{"too long", func(g *registry, w http.ResponseWriter, r *http.Request) {
			b := g.blobs[idOf(r)]
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 100000-%d/%d", len(b)-1, len(b)))
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(b)
		}, true},
		{"too long, and does not say so", func(g *registry, w http.ResponseWriter, r *http.Request) {
			b := g.blobs[idOf(r)]
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 100000-%d/%d", len(b)-1, len(b)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(append(b[100_000:], "more"...))
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := failing("range", 1000, c.answer)
			var cut atomic.Bool
			inner := g.fault
			g.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
				if kind == "blob" && !cut.Swap(true) { // whole packets, so that the range is always the same
					w.Header().Set("Content-Length", "300000")
					_, _ = w.Write(g.blobs[idOf(r)][:100_000])
					return true
				}
				if kind == "blob" {
					return false
				}
				return inner(w, r, kind)
			}
			r, slept := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
			if err := pull(t.Context(), r, g.image); err != nil || len(slept.all) > 0 {
				t.Errorf("error %v, waits %v", err, slept.all)
			}
			ranges, again := g.asked("range"), len(g.asked("blob")) > 1 // after the one that was cut
			if len(ranges) != 1 || ranges[0].Header.Get("Range") != "bytes=100000-299999" || again != c.again {
				t.Errorf("asked for %d ranges, again without: %v; the first is %q",
					len(ranges), again, ranges[0].Header.Get("Range"))
			}
		})
	}
}

// TestSilence: a request without an answer, or with a stalled one, is repeated and finally given up.
func TestSilence(t *testing.T) {
	for _, c := range []struct {
		name string
		sent int // bytes before the silence; negative: no header
	}{{"no head", -1}, {"no body", 0}, {"stops", 250_000}} {
		for _, n := range []int32{1, 1000} {
			t.Run(fmt.Sprint(c.name, n), func(t *testing.T) {
				g := failing("blob", n, func(g *registry, w http.ResponseWriter, r *http.Request) {
					if c.sent >= 0 {
						w.Header().Set("Content-Length", fmt.Sprint(g.layers[0].Size))
						_, _ = w.Write(g.blobs[idOf(r)][:c.sent])
						w.(http.Flusher).Flush()
					}
					<-r.Context().Done()
				})
				g.locked = false
				if n > 1 {
					g.fault = silentRanges(g.fault)
				}
				host := g.plain(t)
				r, _ := open(t, host+"/some/image:v1", Config{PlainHTTP: true})
				r.pace.answer, r.pace.stall = 200*time.Millisecond, 200*time.Millisecond
				err := read(t.Context(), r, g.layers[0])
				if n == 1 && err != nil {
					t.Error(err)
				}
				if n > 1 {
					checkError(t, err, host, "blob", "6 attempts", g)
				}
			})
		}
	}
}

// silentRanges never answers a range.
func silentRanges(next fault) fault {
	return func(w http.ResponseWriter, r *http.Request, kind string) bool {
		if kind == "range" {
			<-r.Context().Done()
			return true
		}
		return next(w, r, kind)
	}
}

// TestSlow: a slow reader does not fail.
func TestSlow(t *testing.T) {
	g := &registry{image: newImage(8 << 20)}
	r, _ := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
	r.pace.stall = 200 * time.Millisecond
	rc, err := r.Open(t.Context(), g.layers[0])
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	time.Sleep(500 * time.Millisecond)
	if _, err := io.Copy(io.Discard, rc); err != nil {
		t.Error(err)
	}
}

// TestWrongLengths: a blob with another length than in the manifest is refused as early as possible.
func TestWrongLengths(t *testing.T) {
	send := func(contentType string, length int, b func([]byte) []byte) answer {
		return func(g *registry, w http.ResponseWriter, r *http.Request) {
			out := b(g.blobs[idOf(r)])
			w.Header().Set("Content-Type", contentType)
			if length >= 0 {
				w.Header().Set("Content-Length", fmt.Sprint(len(out)+length))
			} else {
				w.(http.Flusher).Flush() // chunked
			}
			_, _ = w.Write(out)
		}
	}
	same := func(b []byte) []byte { return b }
	shorter := func(b []byte) []byte { return b[1:] }
	longer := func(b []byte) []byte { return append(b, 1) }
	page := func([]byte) []byte { return []byte("<html>") }
	for _, c := range []struct {
		name     string
		answer   answer
		mismatch bool
		holds    string
	}{
		{"shorter", send("x/y", 0, shorter), true, "expected 300000 bytes, found 299999 bytes"},
		{"longer", send("x/y", 0, longer), true, "expected 300000 bytes, found 300001 bytes"},
		{"empty", send("x/y", 0, func([]byte) []byte { return nil }), true, "found 0 bytes"},
		{"says more than it sends", send("x/y", 1, same), true, "found 300001 bytes"},
		{"chunked and shorter", send("x/y", -1, shorter), false, "connection lost"},
		{"chunked and longer", send("x/y", -1, longer), false, errDigest.Error()},
		{"web page", send("text/html; charset=utf-8", 0, page), true, "web page"},
		{"chunked web page", send("text/html", -1, page), false, "web page"},
		{"web page by type only", send("text/html", 0, same), false, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := failing("blob", 1000, c.answer)
			g.locked = false
			inner := g.fault
			g.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
				if kind == "range" {
					w.WriteHeader(416) // so that all blobs are wrong
					return true
				}
				return inner(w, r, kind)
			}
			r, slept := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
			err := read(t.Context(), r, g.layers[0])
			if c.holds == "" && err != nil || c.holds != "" && (err == nil || !strings.Contains(err.Error(), c.holds)) {
				t.Errorf("error %v, expected %q", err, c.holds)
			}
			if errors.Is(err, blob.ErrMismatch) != c.mismatch {
				t.Errorf("error %v, expected a mismatch: %v", err, c.mismatch)
			}
			if c.mismatch && len(slept.all) > 0 {
				t.Errorf("waits %v", slept.all)
			}
		})
	}
}

// TestWebPages: web pages in place of manifests and tokens.
func TestWebPages(t *testing.T) {
	for _, kind := range kinds[:2] {
		g := failing(kind, 1000, func(_ *registry, w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			fmt.Fprint(w, "<html>Please log in")
		})
		r, slept := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
		_, err := r.Manifest(t.Context())
		if err == nil || !strings.Contains(err.Error(), "/some/image: manifest v1") || len(slept.all) > 0 {
			t.Errorf("%s: error %v, waits %v", kind, err, slept.all)
		}
	}
}

// TestContentEncoding: a proxy's encoding is removed, an object store's claim about a gzip file is not.
func TestContentEncoding(t *testing.T) {
	pack := func(b []byte) []byte {
		var out bytes.Buffer
		z := gzip.NewWriter(&out)
		_, _ = z.Write(b)
		z.Close()
		return out.Bytes()
	}
	for _, c := range []struct {
		name, encoding string
		pack           func([]byte) []byte
		holds          string
	}{
		{"as stored", "gzip", bytes.Clone, ""},
		{"packed", "gzip", pack, ""},
		{"identity", "identity", bytes.Clone, ""},
		{"in capitals", "GZIP", pack, ""},
		{"a list", "gzip, identity", pack, ""},
		{"of an object store", "aws-chunked,gzip", pack, ""},
		{"how it was uploaded", "aws-chunked", bytes.Clone, ""},
		{"unpacked by a proxy", "gzip", bytes.Clone, ""},
		{"other", "br", pack, `Content-Encoding "br"`},
		{"twice", "gzip, gzip", pack, `Content-Encoding "gzip, gzip"`},
		{
			"damaged", "gzip", func([]byte) []byte { return []byte("\x1f\x8b\x07 no gzip") },
			"Content-Encoding gzip: gzip: invalid header",
		},
	} {
		for _, kind := range []string{"manifest", "blob"} {
			g := failing(kind, 1000, func(g *registry, w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Accept-Encoding") != "identity" {
					t.Errorf("Accept-Encoding %q", r.Header.Get("Accept-Encoding"))
				}
				w.Header().Set("Content-Encoding", c.encoding)
				b := g.doc
				if kind == "blob" {
					b = g.blobs[idOf(r)]
				}
				b = c.pack(b)
				w.Header().Set("Content-Length", fmt.Sprint(len(b)))
				_, _ = w.Write(b)
			})
			g.locked = false
			r, _ := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
			_, err := r.Manifest(t.Context())
			if kind == "blob" {
				err = read(t.Context(), r, g.layers[0])
			}
			if c.holds == "" && err != nil || c.holds != "" && (err == nil || !strings.Contains(err.Error(), c.holds)) {
				t.Errorf("%s, %s: error %v, expected %q", c.name, kind, err, c.holds)
			}
		}
	}
}

// TestStaticRegistry: a plain web server answers /v2/ like any directory.
func TestStaticRegistry(t *testing.T) {
	for _, status := range []int{204, 301, 403, 404, 418, 500} {
		g := &registry{image: newImage(1000, 70_000)}
		g.fault = func(w http.ResponseWriter, r *http.Request, _ string) bool {
			if r.URL.Path != "/v2/" && r.URL.Path != "/v2" {
				return false
			}
			w.WriteHeader(status)
			return true
		}
		r, slept := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
		if err := pull(t.Context(), r, g.image); err != nil || len(slept.all) > 0 {
			t.Errorf("/v2/ answers %d: %v, waits %v", status, err, slept.all)
		}
	}
}

// TestLastChunkMissing: all bytes are there, only the end of the encoding is missing.
func TestLastChunkMissing(t *testing.T) {
	g := &registry{image: newImage(300_000)}
	g.fault = func(w http.ResponseWriter, r *http.Request, kind string) bool {
		if kind != "blob" {
			return false
		}
		b := g.blobs[idOf(r)]
		hijack(w,
			fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", len(b), b), false)
		return true
	}
	r, _ := open(t, g.plain(t)+"/some/image:v1", Config{PlainHTTP: true})
	if err := read(t.Context(), r, g.layers[0]); err != nil || len(g.asked("")) != 1 {
		t.Errorf("error %v, asked %d times", err, len(g.asked("")))
	}
}

// TestNoSecretsInErrors: registries redirect to signed addresses, and errors must not show the signature.
func TestNoSecretsInErrors(t *testing.T) {
	for _, kind := range kinds {
		g := failing(kind, 1000, func(_ *registry, w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://user:pass@127.0.0.1:1/blob?X-Signature=sesame", http.StatusTemporaryRedirect)
		})
		var said strings.Builder
		r, _ := open(t, g.plain(t)+"/some/image:v1",
			Config{PlainHTTP: true, Notify: func(m string) { said.WriteString(m) }})
		err := pull(context.Background(), r, g.image)
		if err == nil || kind != "token" && !strings.Contains(err.Error(), "127.0.0.1:1/blob") {
			t.Fatalf("%s: error %v, expected one that says what could not be reached", kind, err)
		}
		for _, secret := range []string{"sesame", "pass"} {
			if strings.Contains(err.Error()+said.String(), secret) {
				t.Errorf("%s: error %q, said %q: holds %q", kind, err, said.String(), secret)
			}
		}
	}
}
