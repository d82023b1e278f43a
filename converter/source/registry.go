package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// normal is a reference with the parts that docker lets one leave out, as containerd and docker save write it.
func normal(ref string) string {
	r, err := reference.ParseDockerRef(ref)
	if err != nil {
		return ref
	}
	return r.String()
}

// registry is an image in a registry that speaks the distribution protocol.
type registry struct {
	name string
	ref  name.Reference

	once   sync.Once // guards the two below
	client *http.Client
	err    error
}

func newRegistry(full, ref string, c Config) (Source, error) {
	var opts []name.Option
	if c.PlainHTTP {
		opts = append(opts, name.Insecure)
	}
	r, err := name.ParseReference(ref, opts...)
	if err != nil {
		return nil, fmt.Errorf("source %q: %w", full, err)
	}
	return &registry{name: full, ref: r}, nil
}

func (s *registry) String() string { return s.name }

func (s *registry) Close() error {
	if s.client != nil {
		s.client.CloseIdleConnections()
	}
	return nil
}

// login does the handshake with the registry, with the credentials that docker login or a credential helper keeps.
func (s *registry) login(ctx context.Context) (*http.Client, error) {
	s.once.Do(func() {
		repo := s.ref.Context()
		auth, err := authn.Resolve(ctx, authn.DefaultKeychain, repo)
		if err != nil {
			s.err = fmt.Errorf("credentials for %s: %w", repo.RegistryStr(), err)
			return
		}
		t, err := transport.NewWithContext(ctx, repo.Registry, auth, transport.NewRetry(remote.DefaultTransport),
			[]string{repo.Scope(transport.PullScope)})
		if err != nil {
			s.err = explain(err, repo.RegistryStr())
			return
		}
		s.client = &http.Client{Transport: t}
	})
	return s.client, s.err
}

// withoutQuery takes the query out of the address in an error: registries redirect to addresses that are signed, and who
// has one can read what it leads to.
func withoutQuery(err error) error {
	var ue *url.Error
	if !errors.As(err, &ue) {
		return err
	}
	u, parseErr := url.Parse(ue.URL)
	if parseErr != nil {
		return ue.Err
	}
	u.RawQuery, u.Fragment = "", ""
	ue.URL = u.Redacted()
	return err
}

// explain adds what a user can do about an error.
func explain(err error, registry string) error {
	var te *transport.Error
	if errors.As(err, &te) && (te.StatusCode == http.StatusUnauthorized || te.StatusCode == http.StatusForbidden) {
		return fmt.Errorf("%w (is the name right? if it is private: docker login %s)", err, registry)
	}
	return err
}

func (s *registry) get(ctx context.Context, kind, id string, accept ...string) (*http.Response, error) {
	return s.getFrom(ctx, 0, kind, id, accept...)
}

// getFrom asks for what begins at an offset. The response begins there.
func (s *registry) getFrom(ctx context.Context, offset int64, kind, id string, accept ...string) (*http.Response, error) {
	client, err := s.login(ctx)
	if err != nil {
		return nil, err
	}
	repo := s.ref.Context()
	u := url.URL{Scheme: repo.Scheme(), Host: repo.RegistryStr(), Path: "/v2/" + repo.RepositoryStr() + "/" + kind + "/" + id}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	for _, a := range accept {
		req.Header.Add("Accept", a)
	}
	if offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, withoutQuery(err)
	}
	if offset > 0 && resp.StatusCode == http.StatusPartialContent {
		if at := resp.Header.Get("Content-Range"); !strings.HasPrefix(at, fmt.Sprintf("bytes %d-", offset)) {
			resp.Body.Close()
			return nil, fmt.Errorf("asked for what begins at byte %d, got %q", offset, at)
		}
		return resp, nil
	}
	err = transport.CheckError(resp, http.StatusOK)
	if err == nil && offset > 0 { // all of it
		_, err = io.CopyN(io.Discard, resp.Body, offset)
	}
	if err != nil {
		resp.Body.Close()
		return nil, explain(err, repo.RegistryStr())
	}
	return resp, nil
}

func (s *registry) Image(ctx context.Context, p Platform) (*Image, error) {
	d, err := s.root(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	img, err := resolve(ctx, s, d, p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	img.Remote, img.Name = true, normal(s.ref.String())
	return img, nil
}

// root describes what the reference names. A tag has no digest to verify; what it leads to is verified.
func (s *registry) root(ctx context.Context) (ocispec.Descriptor, error) {
	resp, err := s.get(ctx, "manifests", s.ref.Identifier(), manifestTypes...)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer resp.Body.Close()
	doc, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: resp.Header.Get("Content-Type"), Digest: digest.FromBytes(doc), Size: int64(len(doc))}
	if t := mediaTypeOf(doc); t != "" {
		d.MediaType = t
	}
	if byDigest, ok := s.ref.(name.Digest); ok {
		d.Digest = digest.Digest(byDigest.DigestStr())
	} else if h := digest.Digest(resp.Header.Get("Docker-Content-Digest")); h.Validate() == nil {
		d.Digest = h
	}
	return d, verify(doc, d)
}

var manifestTypes = []string{ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, dockerIndex, dockerManifest}

func (s *registry) open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	kind, accept := "blobs", []string(nil)
	if isIndex(d.MediaType) || isManifest(d.MediaType) {
		kind, accept = "manifests", manifestTypes
	}
	ctx, cancel := context.WithCancel(ctx)
	from := func(offset int64) (io.ReadCloser, error) {
		resp, err := s.getFrom(ctx, offset, kind, d.Digest.String(), accept...)
		if err != nil {
			return nil, err
		}
		return resp.Body, nil
	}
	body, err := from(0)
	if err != nil {
		cancel()
		return nil, err
	}
	return &resuming{from: from, ctx: ctx, cancel: cancel, body: body}, nil
}

// maxLost is how often the connection may be lost in a row without a byte that was read.
const maxLost = 5

// resuming reads a blob, and asks for the rest when the connection is lost: layers are large, and registries give up on
// whoever reads slowly. Containerd's fetcher does so too. Read is for one goroutine, Close for any.
type resuming struct {
	from   func(offset int64) (io.ReadCloser, error)
	ctx    context.Context // until Close
	cancel context.CancelFunc
	at     int64
	lost   int // times since the last byte

	mu   sync.Mutex // guards changes of body, which only Read makes
	body io.ReadCloser
}

func (r *resuming) Read(p []byte) (int, error) {
	for {
		n, err := r.body.Read(p)
		r.at += int64(n)
		if n > 0 {
			r.lost = 0
			if err != io.EOF {
				err = nil // it comes again
			}
		}
		if err == nil || err == io.EOF {
			return n, err
		}
		if err := r.resume(err); err != nil {
			return 0, err
		}
	}
}

// resume replaces the body, which gave err.
func (r *resuming) resume(err error) error {
	for {
		if r.lost++; r.lost > maxLost {
			return fmt.Errorf("connection lost: %w", err)
		}
		select {
		case <-r.ctx.Done():
			return context.Cause(r.ctx)
		case <-time.After(time.Duration(r.lost-1) * 100 * time.Millisecond):
		}
		var body io.ReadCloser
		if body, err = r.from(r.at); err != nil {
			continue
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.body.Close()
		r.body = body
		if r.ctx.Err() != nil {
			body.Close()
			return context.Cause(r.ctx)
		}
		return nil
	}
}

func (r *resuming) Close() error {
	r.cancel()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.body.Close()
}
