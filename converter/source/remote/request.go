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

// get requests u. Any status not in expected is a *statusError.
func (e *endpoint) get(ctx context.Context, u *url.URL, h http.Header, expected ...int) (*http.Response, error) {
	return e.send(ctx, http.MethodGet, u, h, nil, expected...)
}

// body opens the content of a request and returns its size. It is called for each attempt.
type body func() (rc io.ReadCloser, size int64, err error)

// send sends one request, and repeats it once with credentials if the endpoint asks for them. Any
// status not in expected is a *statusError.
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
		// Digests and ranges refer to stored bytes. Without this header, package http would ask for gzip and
		// decompress it.
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
		// ErrNotImplemented means that the endpoint names no way to log in.
		if err != nil && !errdefs.IsNotImplemented(err) && ctx.Err() == nil {
			failed.detail = err.Error()
		}
		if err != nil {
			return nil, failed
		}
	}
}

// where names an endpoint and the target of its redirect, without the query: a signature there may
// grant access.
func (e *endpoint) where(u *url.URL) string {
	if u.Host == e.base.Host {
		return e.name
	}
	return e.name + " redirects to " + u.Host + u.EscapedPath() + ", which"
}

// blob requests a blob from byte from on; size is its size, or 0 if unknown. If the endpoint does not
// answer the range, blob requests the whole blob and skips the bytes before from.
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

// part requests the bytes [from, to) of a blob of size bytes. It returns nil and no error if the
// endpoint handles ranges in another way.
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

// getRange requests the bytes [from, to) of a blob.
func (e *endpoint) getRange(ctx context.Context, u *url.URL, accept []string, from, to int64) (*http.Response, error) {
	// Some registries do not understand a range without an end.
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

// isRange reports whether a response holds the stored bytes [from, to) of a blob of size bytes.
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

// skip turns the response with a whole blob into a reader that starts at from.
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

// whole checks the header of a response with a whole blob. A response of the right length is the blob,
// whatever its Content-Encoding: object stores report gzip for a gzip file.
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

// decoded removes the encoding that a proxy added to a response. Some proxies report gzip for a body
// they have already unpacked, and object stores keep "aws-chunked" from the upload.
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

// encodedBody reads the content of an encoded response.
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

// noWebPage refuses the pages that login portals and proxies return in place of a registry's response.
func noWebPage(resp *http.Response) error {
	if t, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); t == "text/html" {
		return errWebPage
	}
	return nil
}

// stallGuard ends a request when its response brings no byte for a while. http.Transport only limits
// the wait for the header.
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

// notTLS rewrites the error of a failed TLS handshake with a server on this machine to the one for a
// Go server, the only one that triggers containerd's fallback to plain HTTP.
func notTLS(req *http.Request, err error) error {
	if record, ok := errors.AsType[tls.RecordHeaderError](err); ok && docker.IsLocalhost(req.URL.Host) {
		copy(record.RecordHeader[:], "HTTP/")
		return record
	}
	return err
}

// guardedBody limits the time that a Read waits, not the time between reads.
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
