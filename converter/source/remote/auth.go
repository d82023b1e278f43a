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

// authorization gets credentials for one endpoint and one repository, and tokens with them. Containerd's authorizer
// does the work. It keeps failures and rejected tokens for ever, so it is replaced when there was one. It also has a
// data race while it fetches a token (2.4.2), so one request after the other uses it.
type authorization struct {
	host, repo string
	scopes     []string
	fresh      func() docker.Authorizer

	turn      chan struct{} // holds a value while somebody uses the following; a lock would not end with a context
	current   docker.Authorizer
	challenge *http.Response    // what the endpoint asked for last, if it did
	ctx       context.Context   // of the request for which credentials are looked up
	known     *authn.AuthConfig // the credentials, once they were looked up and until they are rejected

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

// take waits for the turn of a request, which gives it back by reading from turn.
func (a *authorization) take(ctx context.Context) error {
	select {
	case a.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// authorize adds what the endpoint asked for last to a request.
func (a *authorization) authorize(ctx context.Context, req *http.Request) (docker.Authorizer, error) {
	if a == nil {
		return nil, nil
	}
	if err := a.take(ctx); err != nil {
		return nil, err
	}
	defer func() { <-a.turn }()
	if a.known != nil && a.known.RegistryToken != "" { // no server has to give one
		req.Header.Set("Authorization", "Bearer "+a.known.RegistryToken)
		return a.current, nil
	}
	for _, s := range a.scopes {
		ctx = docker.WithScope(ctx, s)
	}
	if err := a.current.Authorize(ctx, req); err != nil {
		a.current, a.known = a.fresh(), nil
		if a.challenge != nil {
			_ = a.learn(ctx) // did not fail before
		}
		return nil, err
	}
	return a.current, nil
}

// challenged learns from a 401 how to authorize the next request. used is what authorize returned for the one that
// failed, and known says whether it told who we are.
func (a *authorization) challenged(ctx context.Context, used docker.Authorizer, known bool, resp *http.Response) error {
	if err := a.take(ctx); err != nil {
		return err
	}
	defer func() { <-a.turn }()
	if used != a.current {
		return nil // another request has done this
	}
	if known { // the token has expired, or the password is another one now
		a.current, a.known = a.fresh(), nil
	}
	a.challenge = &http.Response{Header: resp.Header, Request: resp.Request}
	return a.learn(ctx)
}

// learn gives the challenge to the authorizer.
func (a *authorization) learn(ctx context.Context) error {
	a.ctx = ctx
	return a.current.AddResponses(ctx, []*http.Response{a.challenge})
}

// lookup looks where docker login and podman login put credentials. A credential helper is another program, and may
// never end.
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

// credentials are those for the endpoint. Containerd calls it below challenged, whose turn it is.
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
			// Many images are public. If this one is not, the registry says so, and then it is told why.
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

// whyNone returns why the credentials that there may be were not read.
func (a *authorization) whyNone() error {
	if a == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failure
}

// place is a repository as authn looks it up.
type place struct{ host, repo string }

func (p place) String() string      { return p.host + "/" + p.repo }
func (p place) RegistryStr() string { return p.host }

// maxToken bounds the answer of a token server.
const maxToken = 1 << 20

// tokenTransport carries requests to the token server that a registry names. Credentials go there, so the registry must
// not lead them, or us, anywhere.
type tokenTransport struct {
	next  http.RoundTripper
	e     *endpoint
	plain bool // the registry itself is reached without TLS
}

func (t *tokenTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := t.check(req.URL); err != nil {
		return nil, err
	}
	resp, err := t.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	// Containerd's error would not hold Retry-After, and it looks for a token in answers that have none.
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
		err = ue.Err // without the address, whose query is of no interest
	}
	return fmt.Errorf("%s: no token: %w", e.name, err)
}

// check refuses addresses of token servers as go-containerregistry does: without TLS where the registry has it, and
// those of this machine or a private network unless the registry is there.
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
