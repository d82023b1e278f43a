package remote

import (
	"context"
	"net/http"
	"net/url"
	"path"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// endpoint is one host to ask: a registry, a mirror of it, or the host of a foreign layer.
type endpoint struct {
	name   string   // for messages
	base   *url.URL // of the API, or of the blob itself if fixed is set
	fixed  bool
	caps   docker.HostCapabilities
	client *http.Client
	header http.Header
	auth   *authorization // nil if the endpoint must not get credentials
}

func (e *endpoint) url(repo, kind, id string) *url.URL {
	u := *e.base
	if !e.fixed {
		u.Path = path.Join("/", u.Path, repo, kind, id)
	}
	return &u
}

// configure finds the hosts of the registry like containerd.
func (r *Repository) configure(ctx context.Context) ([]*endpoint, error) {
	o := config.HostOptions{HostDir: r.hostDir, UpdateClient: r.guard}
	if r.conf.PlainHTTP {
		o.DefaultScheme = "http"
	}
	hosts, err := config.ConfigureHosts(ctx, o)(r.domain)
	if err != nil {
		return nil, err
	}
	endpoints := make([]*endpoint, 0, len(hosts))
	for _, h := range hosts {
		e := &endpoint{
			name: h.Host, base: &url.URL{Scheme: h.Scheme, Host: h.Host, Path: h.Path}, caps: h.Capabilities,
			client: &http.Client{Transport: h.Client.Transport}, header: h.Header.Clone(),
		}
		if e.header == nil {
			e.header = http.Header{}
		}
		if e.header.Get("User-Agent") == "" {
			e.header.Set("User-Agent", "daxfs")
		}
		if h.Host != r.domain && (r.domain != "docker.io" || h.Host != "registry-1.docker.io") {
			e.base.RawQuery = url.Values{"ns": {r.domain}}.Encode() // tells a mirror the registry of the repository
		}
		e.client.CheckRedirect = e.redirected
		e.auth = newAuthorization(e, r.path, r.scopes(), h.Scheme == "http" || docker.IsLocalhost(h.Host))
		endpoints = append(endpoints, e)
	}
	r.outside, err = r.outsideClient()
	return endpoints, err
}

// scopes returns the scopes that tokens must grant.
func (r *Repository) scopes() []string {
	if !r.conf.Push {
		return []string{"repository:" + r.path + ":pull"}
	}
	all := []string{"repository:" + r.path + ":pull,push"}
	if from := r.conf.MountFrom; from != "" && from != r.path {
		all = append(all, "repository:"+from+":pull")
	}
	return all
}

// hostDir finds the directory that describes a registry.
func (r *Repository) hostDir(host string) (string, error) {
	for _, root := range r.conf.HostDirs {
		dir, err := config.HostDirFromRoot(root)(host)
		if err == nil || !errdefs.IsNotFound(err) {
			return dir, err
		}
	}
	return "", errdefs.ErrNotFound
}

// guard adds time-outs to a client of ConfigureHosts, which calls guard again for copies of a client.
func (r *Repository) guard(c *http.Client) error {
	if t, ok := c.Transport.(*http.Transport); ok {
		t.ResponseHeaderTimeout = r.pace.answer
		// With concurrent requests for parts of a blob, Go's default of 2 closes most connections after each part.
		t.MaxIdleConnsPerHost = maxIdleConns
		r.transports = append(r.transports, t)
		c.Transport = &stallGuard{t, r.pace.stall}
	}
	return nil
}

// maxIdleConns is the number of idle connections kept per host: as many as are used concurrently.
const maxIdleConns = 8

const maxRedirects = 10

// redirected keeps the headers of hosts.toml, which may hold secrets, from other hosts. Package http
// does that for Authorization only.
func (e *endpoint) redirected(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return errRedirects
	}
	if req.URL.Host != e.base.Host {
		for name := range e.header {
			if name != "User-Agent" {
				delete(req.Header, name) // not Del: hosts.toml may write it in lower case
			}
		}
	}
	return nil
}

// maxURLs bounds the addresses tried for a foreign layer: a manifest may hold a hundred thousand.
const maxURLs = 8

// outsideClient returns a client for addresses that an image names. An image must not weaken the
// protection of its registry: it requires https, unless the registry itself uses no TLS.
func (r *Repository) outsideClient() (*http.Client, error) {
	c := &http.Client{
		Transport: docker.DefaultHTTPTransport(nil),
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if len(via) >= maxRedirects {
				return errRedirects
			}
			if !r.mayLead(req.URL) {
				return errNoTLS
			}
			return nil
		},
	}
	return c, r.guard(c)
}

// mayLead reports whether an address in a descriptor may be requested.
func (r *Repository) mayLead(u *url.URL) bool {
	plain := r.conf.PlainHTTP || docker.IsLocalhost(r.domain)
	return u.Host != "" && (u.Scheme == "https" || plain && u.Scheme == "http")
}

// foreign returns the addresses in a descriptor. They get no credentials and no configured headers.
func (r *Repository) foreign(d ocispec.Descriptor) []*endpoint {
	var all []*endpoint
	for _, s := range d.URLs[:min(len(d.URLs), maxURLs)] {
		u, err := url.Parse(s)
		if err != nil || !r.mayLead(u) {
			continue
		}
		u.User, u.Fragment = nil, ""
		all = append(all, &endpoint{
			name: u.Host, base: u, fixed: true, client: r.outside, header: http.Header{"User-Agent": {"daxfs"}},
		})
	}
	return all
}
