package remote

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/log"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// authorization gets credentials, and tokens in exchange, for one endpoint and one repository. Containerd's
// authorizer does the work. It caches failures and rejected tokens for ever, so it is replaced after one. It
// has a data race while it fetches a token (2.4.2), so requests use it one after another.
type authorization struct {
	host, repo string
	scopes     []string
	fresh      func() docker.Authorizer

	turn      chan struct{} // a lock for the following fields that honours a context; it holds a value while taken
	current   docker.Authorizer
	challenge *http.Response    // the last challenge of the endpoint, if any
	ctx       context.Context   // of the request that looks up credentials
	known     *authn.AuthConfig // credentials that were looked up and not rejected

	mu      sync.Mutex // guards failure
	failure error      // why there are no credentials
}

func newAuthorization(e *endpoint, repo string, scopes []string, plain bool) *authorization {
	a := &authorization{host: e.base.Host, repo: repo, scopes: scopes, turn: make(chan struct{}, 1)}
	c := &http.Client{Transport: &tokenTransport{e.client.Transport, e, plain}}
	a.fresh = func() docker.Authorizer {
		return docker.NewDockerAuthorizer(docker.WithAuthClient(c), docker.WithAuthHeader(e.header),
			docker.WithAuthCreds(func(string) (string, string, error) { return a.credentials() }))
	}
	a.current = a.fresh()
	return a
}

// take waits for the turn of a request. The request ends its turn by receiving from turn.
func (a *authorization) take(ctx context.Context) error {
	select {
	case a.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// authorize adds credentials or a token for the endpoint's last challenge to a request.
func (a *authorization) authorize(ctx context.Context, req *http.Request) (docker.Authorizer, error) {
	if a == nil {
		return nil, nil
	}
	if err := a.take(ctx); err != nil {
		return nil, err
	}
	defer func() { <-a.turn }()
	if a.known != nil && a.known.RegistryToken != "" { // it replaces tokens from a server
		req.Header.Set("Authorization", "Bearer "+a.known.RegistryToken)
		return a.current, nil
	}
	for _, s := range a.scopes {
		ctx = docker.WithScope(ctx, s)
	}
	if err := a.current.Authorize(ctx, req); err != nil {
		a.current, a.known = a.fresh(), nil
		if a.challenge != nil {
			_ = a.learn(ctx) // it has succeeded before with this challenge
		}
		return nil, err
	}
	return a.current, nil
}

// challenged learns from a 401 how to authorize the next request. used is the authorizer of the failed
// request, and known says whether the request carried credentials.
func (a *authorization) challenged(ctx context.Context, used docker.Authorizer, known bool, resp *http.Response) error {
	if err := a.take(ctx); err != nil {
		return err
	}
	defer func() { <-a.turn }()
	if used != a.current { // another request has handled it
		return nil
	}
	if known { // the token has expired, or the password was changed
		a.current, a.known = a.fresh(), nil
	}
	a.challenge = &http.Response{Header: resp.Header, Request: resp.Request}
	return a.learn(ctx)
}

// learn passes the challenge to the authorizer.
func (a *authorization) learn(ctx context.Context) error {
	a.ctx = ctx
	return a.current.AddResponses(ctx, []*http.Response{a.challenge})
}

// lookup finds credentials where docker login and podman login store them. A credential helper is
// another program and may never end.
func (a *authorization) lookup(host string) (*authn.AuthConfig, error) {
	type result struct {
		config *authn.AuthConfig
		err    error
	}
	done := make(chan result, 1)
	go func() {
		auth, err := authn.DefaultKeychain.Resolve(place{host, a.repo})
		if err != nil {
			done <- result{nil, err}
			return
		}
		c, err := auth.Authorization()
		done <- result{c, err}
	}()
	select {
	case r := <-done:
		return r.config, r.err
	case <-a.ctx.Done():
		return nil, context.Cause(a.ctx)
	}
}

// credentials returns the credentials for the endpoint. Containerd calls it from learn, with the turn taken.
func (a *authorization) credentials() (user, secret string, err error) {
	if a.known == nil {
		host := a.host
		if host == "registry-1.docker.io" {
			host = name.DefaultRegistry
		}
		c, err := a.lookup(host)
		if a.ctx.Err() != nil {
			return "", "", context.Cause(a.ctx)
		}
		if err != nil {
			// Many images are public. If this one is not, the registry refuses, and the message gives this reason.
			log.L.WithError(err).Warnf("no credentials for %s; going on without", a.host)
			a.mu.Lock()
			a.failure = err
			a.mu.Unlock()
			c = &authn.AuthConfig{}
		}
		a.known = c
	}
	if a.known.IdentityToken != "" {
		return "", a.known.IdentityToken, nil
	}
	return a.known.Username, a.known.Password, nil
}

// whyNone returns the error that prevented reading credentials, if any.
func (a *authorization) whyNone() error {
	if a == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failure
}

// place is a repository in the form that authn looks up.
type place struct{ host, repo string }

func (p place) String() string      { return p.host + "/" + p.repo }
func (p place) RegistryStr() string { return p.host }

// maxToken bounds the response of a token server, in bytes.
const maxToken = 1 << 20

// tokenTransport carries requests to the token server that a registry names. They contain credentials,
// so the registry must not direct them to arbitrary places.
type tokenTransport struct {
	next  http.RoundTripper
	e     *endpoint
	plain bool // the registry itself uses no TLS
}

func (t *tokenTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := t.check(req.URL); err != nil {
		return nil, err
	}
	resp, err := t.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	// Containerd's error lacks Retry-After, and containerd expects a token even in an empty response.
	empty := resp.StatusCode < 400 && resp.StatusCode != 200 && resp.Header.Get("Location") == ""
	if isTransient(resp.StatusCode) || empty {
		defer resp.Body.Close()
		s := statusOf(tokenServer(req.URL.Host), resp)
		s.token = true
		return nil, s
	}
	resp.Body = http.MaxBytesReader(nil, resp.Body, maxToken)
	return resp, nil
}

func tokenServer(host string) string { return "token server " + host }

// tokenError describes why there is no token.
func (e *endpoint) tokenError(err error) error {
	if s, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok {
		u, parseErr := url.Parse(s.RequestURL)
		if parseErr != nil {
			u = e.base
		}
		err = &statusError{from: tokenServer(u.Host), code: s.StatusCode, detail: detail(s.Body), token: true}
	} else if ue, ok := errors.AsType[*url.Error](err); ok {
		err = ue.Err // without the address, whose query is uninteresting
	}
	return fmt.Errorf("%s: no token: %w", e.name, err)
}

// check refuses the same token servers as go-containerregistry: those without TLS if the registry has
// TLS, and addresses of this machine or a private network unless the registry is on the same host.
func (t *tokenTransport) check(u *url.URL) error {
	if u.Scheme != "https" && (u.Scheme != "http" || !t.plain) {
		return fmt.Errorf("the registry names token server %q, expected one with https", u.Redacted())
	}
	if u.Hostname() == t.e.base.Hostname() {
		return nil
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil &&
		(ip.IsPrivate() || ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsUnspecified()) {
		return fmt.Errorf("the registry names token server %q, which is an address of a private network", u.Redacted())
	}
	return nil
}
