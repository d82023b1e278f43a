package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
)

// Pushed is the way in which a blob came to the registry.
type Pushed int

const (
	// Sent means that its bytes were sent.
	Sent Pushed = iota
	// Present means that the repository already had it.
	Present
	// Mounted means that the registry mounted it from Config.MountFrom.
	Mounted
)

// pushHost returns the only host to write to: the parts of an image must not be spread over several.
func (r *Repository) pushHost(ctx context.Context) ([]*endpoint, error) {
	hosts, err := r.able(ctx, docker.HostCapabilityPush)
	if err != nil {
		return nil, err
	}
	return hosts[:1], nil
}

// PushBlob adds a blob to the repository. open is called each time the blob has to be sent. If open is
// nil, a blob that can be neither found nor mounted gives an error that wraps ErrNotFound. sent receives
// the number of bytes sent since its last call; a blob that is sent again counts again.
func (r *Repository) PushBlob(
	ctx context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error), sent func(n int),
) (how Pushed, err error) {
	if err := d.Digest.Validate(); err != nil {
		return 0, fmt.Errorf("digest %q: %w", d.Digest, err)
	}
	hosts, err := r.pushHost(ctx)
	if err != nil {
		return 0, err
	}
	err = r.try(ctx, "blob "+d.Digest.String(), hosts, &budget{}, func(ctx context.Context, e *endpoint) (err error) {
		how, err = r.pushBlob(ctx, e, d, open, sent)
		return err
	})
	return how, err
}

// pushBlob is one attempt. It first checks whether an earlier attempt without a response succeeded.
func (r *Repository) pushBlob(
	ctx context.Context, e *endpoint, d ocispec.Descriptor, open func() (io.ReadCloser, error), sent func(n int),
) (Pushed, error) {
	there, err := e.has(ctx, r.path, d)
	if err != nil || there {
		return Present, err
	}
	start := e.url(r.path, "blobs", "uploads")
	start.Path += "/"
	query := start.Query()
	if r.conf.MountFrom != "" {
		query.Set("mount", d.Digest.String())
		query.Set("from", r.conf.MountFrom)
	}
	start.RawQuery = query.Encode()
	if open == nil && r.conf.MountFrom == "" {
		return 0, ErrNotFound
	}
	resp, err := e.send(ctx, http.MethodPost, start, nil, none, http.StatusAccepted, http.StatusCreated)
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	if resp.StatusCode == http.StatusCreated {
		return Mounted, nil
	}
	to, err := location(resp)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", e.name, err)
	}
	if open == nil {
		e.abandon(ctx, to)
		return 0, ErrNotFound
	}
	query = to.Query()
	query.Set("digest", d.Digest.String())
	to.RawQuery = query.Encode()
	return Sent, r.upload(ctx, e, to, d, open, sent)
}

func (e *endpoint) has(ctx context.Context, repo string, d ocispec.Descriptor) (bool, error) {
	resp, err := e.send(ctx, http.MethodHead, e.url(repo, "blobs", d.Digest.String()), nil, nil, http.StatusOK,
		http.StatusNotFound)
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK && (resp.ContentLength < 0 || resp.ContentLength == d.Size), nil
}

// none is an explicitly empty body.
func none() (io.ReadCloser, int64, error) { return http.NoBody, 0, nil }

// location returns the address for the next step of an upload. Registries behind a proxy may not know
// that clients use TLS.
func location(resp *http.Response) (*url.URL, error) {
	text := resp.Header.Get("Location")
	if text == "" {
		return nil, errors.New("answer without Location, expected where to upload to")
	}
	u, err := resp.Request.URL.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("upload to Location %q: %w", text, err)
	}
	if from := resp.Request.URL; u.Scheme == "http" && from.Scheme == "https" {
		if u.Host != from.Host {
			return nil, fmt.Errorf("it directs the upload to %s without TLS", u.Host)
		}
		u.Scheme = "https"
	}
	return u, nil
}

// upload sends a blob to the address from the registry.
func (r *Repository) upload(
	ctx context.Context, e *endpoint, to *url.URL, d ocispec.Descriptor, open func() (io.ReadCloser, error),
	sent func(n int),
) error {
	if to.Host != e.base.Host { // the registry's credentials must not go there
		other := *e
		other.auth, other.header, other.base = nil, http.Header{"User-Agent": {"daxfs"}}, to
		e = &other
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	h := http.Header{"Content-Type": {"application/octet-stream"}}
	resp, err := e.send(ctx, http.MethodPut, to, h, func() (io.ReadCloser, int64, error) {
		rc, err := open()
		if err != nil {
			return nil, 0, err
		}
		return &sender{
			ReadCloser: rc, sent: sent, timer: time.AfterFunc(r.pace.stall, func() { cancel(errStalled) }),
			limit: r.pace.stall,
		}, d.Size, nil
	}, http.StatusCreated, http.StatusNoContent)
	if err != nil {
		if errors.Is(context.Cause(ctx), errStalled) {
			return fmt.Errorf("%s: %w", e.name, errStalled)
		}
		return err
	}
	resp.Body.Close()
	if got := digest.Digest(resp.Header.Get("Docker-Content-Digest")); got.Validate() == nil && got != d.Digest &&
		got.Algorithm() == d.Digest.Algorithm() {
		return fmt.Errorf("%s: %w", e.name,
			&blob.MismatchError{What: "digest", Want: d.Digest.String(), Got: got.String()})
	}
	return nil
}

// abandon cancels an unwanted upload. Its errors do not matter: an upload may stay open for a while.
func (e *endpoint) abandon(ctx context.Context, u *url.URL) {
	if u.Host != e.base.Host {
		return
	}
	if resp, err := e.send(ctx, http.MethodDelete, u, nil, nil, http.StatusNoContent); err == nil {
		resp.Body.Close()
	}
}

// sender ends a request when nobody takes its bytes. The response's header has its own time-out.
type sender struct {
	io.ReadCloser
	sent  func(n int)
	timer *time.Timer
	limit time.Duration
}

func (s *sender) Read(p []byte) (int, error) {
	s.timer.Reset(s.limit)
	n, err := s.ReadCloser.Read(p)
	if err != nil {
		s.timer.Stop()
	}
	if s.sent != nil && n > 0 {
		s.sent(n)
	}
	return n, err
}

func (s *sender) Close() error {
	s.timer.Stop()
	return s.ReadCloser.Close()
}

// PushManifest adds an index or a manifest to the repository: under the reference if name is set, else
// under its digest. The parts that it names must be present.
func (r *Repository) PushManifest(ctx context.Context, mediaType string, doc []byte, name bool) error {
	id := digest.FromBytes(doc).String()
	if name {
		switch ref := r.ref.(type) {
		case reference.Digested:
			if ref.Digest() != digest.FromBytes(doc) {
				return fmt.Errorf("%s: the image has the digest %s: give a tag", r, id)
			}
		case reference.Tagged:
			id = ref.Tag()
		}
	}
	hosts, err := r.pushHost(ctx)
	if err != nil {
		return err
	}
	return r.try(ctx, "manifest "+id, hosts, &budget{}, func(ctx context.Context, e *endpoint) error {
		h := http.Header{"Content-Type": {mediaType}}
		resp, err := e.send(ctx, http.MethodPut, e.url(r.path, "manifests", id), h,
			func() (io.ReadCloser, int64, error) {
				return io.NopCloser(bytes.NewReader(doc)), int64(len(doc)), nil
			}, http.StatusCreated, http.StatusOK)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
}
