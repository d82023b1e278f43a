package remote

import (
	"bufio"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
)

// get asks for what is at u. Any status but those in expected is a *statusError.
func (e *endpoint) get(ctx context.Context, u *url.URL, h http.Header, expected ...int) (*http.Response, error) {
	return e.send(ctx, http.MethodGet, u, h, nil, expected...)
}

// body opens what a request sends, and says how long that is. It is called for each request anew.
type body func() (rc io.ReadCloser, size int64, err error)

// send sends one request, and another one if the endpoint wants to know who asks. Any status but those in expected is a
// *statusError.
func (e *endpoint) send(
	ctx context.Context, method string, u *url.URL, h http.Header, send body, expected ...int,
) (*http.Response, error) {
	for challenged := false; ; challenged = true {
		req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
		if err != nil {
			return nil, err
		}
		for _, from := range []http.Header{e.header, h} {
			for name, values := range from {
				req.Header[name] = values
			}
		}
		// Digests are of bytes as they are stored, and ranges count these. Without this header the http package asks
		// for gzip and decompresses it.
		req.Header.Set("Accept-Encoding", "identity")
		used, err := e.auth.authorize(ctx, req)
		if err != nil {
			return nil, e.tokenError(err)
		}
		if send != nil {
			rc, size, err := send()
			if err != nil {
				return nil, err
			}
			if size == 0 {
				rc.Close()
				rc = http.NoBody
			}
			req.Body, req.ContentLength = rc, size // the client closes it
		}
		resp, err := e.client.Do(req)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.name, withoutQuery(err))
		}
		if slices.Contains(expected, resp.StatusCode) {
			return resp, nil
		}
		failed := statusOf(e.where(resp.Request.URL), resp)
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized || challenged || e.auth == nil {
			return nil, failed
		}
		err = e.auth.challenged(ctx, used, req.Header.Get("Authorization") != "", resp)
		if err != nil && !errdefs.IsNotImplemented(err) && ctx.Err() == nil { // or it does not say how to log in
			failed.detail = err.Error()
		}
		if err != nil {
			return nil, failed
		}
	}
}

// where names an endpoint, and what it redirected to. The query stays out: it may be a signature that opens what it
// leads to.
func (e *endpoint) where(u *url.URL) string {
	if u.Host == e.base.Host {
		return e.name
	}
	return e.name + " redirects to " + u.Host + u.EscapedPath() + ", which"
}

// blob asks for a blob of size bytes, or of a size that is not known if that is 0, from a byte on. The whole blob is
// asked for, and what is before that byte is skipped, if the endpoint answers the range with something else.
func (e *endpoint) blob(ctx context.Context, u *url.URL, accept []string, from, size int64) (io.ReadCloser, error) {
	if from > 0 && size > 0 {
		body, err := e.part(ctx, u, accept, from, size, size)
		if body != nil || err != nil {
			return body, err
		}
	}
	resp, err := e.get(ctx, u, http.Header{"Accept": accept}, http.StatusOK)
	if err != nil {
		return nil, err
	}
	return e.skip(resp, from, size)
}

// part asks for the bytes [from, to) of a blob of size bytes. It returns nil and no error if the endpoint does not
// understand ranges as we do.
func (e *endpoint) part(ctx context.Context, u *url.URL, accept []string, from, to, size int64) (io.ReadCloser, error) {
	resp, err := e.getRange(ctx, u, accept, from, to)
	if err != nil {
		return nil, err
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return e.skip(resp, from, size)
	case http.StatusPartialContent:
		if isRange(resp, from, to, size) {
			return &readCloser{io.LimitReader(resp.Body, to-from), resp.Body}, nil
		}
	}
	resp.Body.Close()
	return nil, nil
}

// getRange asks for the bytes [from, to) of a blob.
func (e *endpoint) getRange(ctx context.Context, u *url.URL, accept []string, from, to int64) (*http.Response, error) {
	// Some registries understand no range without an end.
	h := http.Header{"Accept": accept, "Range": {fmt.Sprintf("bytes=%d-%d", from, to-1)}}
	return e.get(ctx, u, h, http.StatusPartialContent, http.StatusOK, http.StatusRequestedRangeNotSatisfiable)
}

// bytes returns the bytes [from, to) of a blob of size bytes. It reads nothing else.
func (e *endpoint) bytes(ctx context.Context, u *url.URL, from, to, size int64) ([]byte, error) {
	resp, err := e.getRange(ctx, u, nil, from, to)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusPartialContent || !isRange(resp, from, to, size) {
		return nil,
			fmt.Errorf("%s answers %d %s: %w", e.name, resp.StatusCode, http.StatusText(resp.StatusCode), ErrNoRanges)
	}
	b := make([]byte, to-from)
	if _, err := io.ReadFull(resp.Body, b); err != nil {
		return nil, fmt.Errorf("%s: connection lost: %w", e.name, err)
	}
	return b, nil
}

// isRange tells whether an answer has the bytes [from, to) of a blob of size bytes as they are stored.
func isRange(resp *http.Response, from, to, size int64) bool {
	if resp.ContentLength >= 0 && resp.ContentLength != to-from {
		return false
	}
	span, total, _ := strings.Cut(resp.Header.Get("Content-Range"), "/")
	if span != fmt.Sprintf("bytes %d-%d", from, to-1) {
		return false
	}
	return total == strconv.FormatInt(size, 10) || total == "*" && resp.Header.Get("Content-Encoding") == ""
}

// skip makes of the answer with a whole blob one that begins at from.
func (e *endpoint) skip(resp *http.Response, from, size int64) (io.ReadCloser, error) {
	body, err := whole(resp, size)
	if err == nil {
		_, err = io.CopyN(io.Discard, body, from)
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
	}
	if err != nil {
		resp.Body.Close()
		return nil, fmt.Errorf("%s: %w", e.name, err)
	}
	return &readCloser{body, resp.Body}, nil
}

type readCloser struct {
	io.Reader
	io.Closer
}

// whole checks what can be checked of an answer with a whole blob before it is read. One of the right length is that
// blob, whatever its Content-Encoding: object stores say gzip of a gzip file.
func whole(resp *http.Response, size int64) (io.Reader, error) {
	if size > 0 && resp.ContentLength == size {
		return resp.Body, nil
	}
	if err := noWebPage(resp); err != nil {
		if resp.ContentLength >= 0 {
			err = fmt.Errorf("%w: %w", sizeMismatch(size, resp.ContentLength), err)
		}
		return nil, err
	}
	if resp.Header.Get("Content-Encoding") == "" && size > 0 && resp.ContentLength >= 0 {
		return nil, sizeMismatch(size, resp.ContentLength)
	}
	return decoded(resp)
}

func sizeMismatch(want, got int64) error {
	return &blob.MismatchError{What: "size", Want: fmt.Sprint(want, " bytes"), Got: fmt.Sprint(got, " bytes")}
}

// decoded removes the encoding that a proxy put around an answer. Some say gzip of what they have unpacked themselves,
// and object stores keep "aws-chunked", which is how an object came to them.
func decoded(resp *http.Response) (io.Reader, error) {
	said := strings.Join(resp.Header.Values("Content-Encoding"), ", ")
	gzips := 0
	for enc := range strings.SplitSeq(strings.ToLower(said), ",") {
		switch strings.TrimSpace(enc) {
		case "", "identity", "aws-chunked":
		case "gzip", "x-gzip":
			gzips++
		default:
			gzips = 2
		}
	}
	switch gzips {
	case 0:
		return resp.Body, nil
	case 1:
		body := bufio.NewReader(resp.Body)
		if head, err := body.Peek(2); err != nil || head[0] != 0x1f || head[1] != 0x8b {
			return body, nil
		}
		z, err := gzip.NewReader(body)
		return encodedBody{z}, encodedError(err)
	default:
		return nil, fmt.Errorf("answer with Content-Encoding %q, expected none or gzip", said)
	}
}

// encodedBody is what is in an answer with an encoding.
type encodedBody struct{ r io.Reader }

func (b encodedBody) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	return n, encodedError(err)
}

func encodedError(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return fmt.Errorf("answer with Content-Encoding gzip: %w", err)
}

// noWebPage refuses what login pages and proxies answer in the place of a registry.
func noWebPage(resp *http.Response) error {
	if t, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); t == "text/html" {
		return errWebPage
	}
	return nil
}

// stallGuard ends a request that brings no byte of its answer for a while. http.Transport has a limit for the head
// only.
type stallGuard struct {
	next  http.RoundTripper
	limit time.Duration
}

func (g *stallGuard) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	resp, err := g.next.RoundTrip(req.WithContext(ctx))
	if err != nil {
		cancel(nil)
		return nil, notTLS(req, err)
	}
	t := time.AfterFunc(g.limit, func() { cancel(errStalled) })
	t.Stop()
	resp.Body = &guardedBody{ReadCloser: resp.Body, ctx: ctx, cancel: cancel, timer: t, limit: g.limit}
	return resp, nil
}

// notTLS makes of whatever a server on this machine answers instead of a TLS handshake what a Go server answers.
// Containerd's fallback to plain HTTP knows only that.
func notTLS(req *http.Request, err error) error {
	if record, ok := errors.AsType[tls.RecordHeaderError](err); ok && docker.IsLocalhost(req.URL.Host) {
		copy(record.RecordHeader[:], "HTTP/")
		return record
	}
	return err
}

// guardedBody counts the time that a Read waits, not the time in between.
type guardedBody struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
	limit  time.Duration
}

func (b *guardedBody) Read(p []byte) (int, error) {
	b.timer.Reset(b.limit)
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	if err != nil && errors.Is(context.Cause(b.ctx), errStalled) {
		err = errStalled
	}
	return n, err
}

func (b *guardedBody) Close() error {
	err := b.ReadCloser.Close()
	b.timer.Stop()
	b.cancel(nil)
	return err
}
