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

// endpoint is one place to ask: a registry, a mirror of it, or an address of a foreign layer.
type endpoint struct {
	name   string   // for messages
	base   *url.URL // of the API; of the blob itself where fixed is set
	fixed  bool
	caps   docker.HostCapabilities
	client *http.Client
	header http.Header
	auth   *authorization // nil where nobody's credentials belong
}

// url is where an endpoint has a blob or a manifest.
func (e *endpoint) url(repo, kind, id string) *url.URL {
	u := *e.base
	if !e.fixed {
		u.Path = path.Join("/", u.Path, repo, kind, id)
	}
	return &u
}

// configure finds the hosts that stand for the registry, as containerd does.
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
			e.base.RawQuery = url.Values{"ns": {r.domain}}.Encode() // tells a mirror whose repository it is
		}
		e.client.CheckRedirect = e.redirected
		e.auth = newAuthorization(e, r.path, r.scopes(), h.Scheme == "http" || docker.IsLocalhost(h.Host))
		endpoints = append(endpoints, e)
	}
	r.outside, err = r.outsideClient()
	return endpoints, err
}

// scopes are what tokens must allow.
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

// guard puts our time-outs into a client of ConfigureHosts, which calls it again for a copy of a client.
func (r *Repository) guard(c *http.Client) error {
	if t, ok := c.Transport.(*http.Transport); ok {
		t.ResponseHeaderTimeout = r.pace.answer
		// Where parts of a blob are fetched at once, Go's default of 2 closes most connections after each part.
		t.MaxIdleConnsPerHost = maxIdleConns
		r.transports = append(r.transports, t)
		c.Transport = &stallGuard{t, r.pace.stall}
	}
	return nil
}

// maxIdleConns is how many connections to a host wait for the next request: as many as are used at once.
const maxIdleConns = 8

const maxRedirects = 10

// redirected keeps the headers of hosts.toml, which may hold secrets, from other hosts. The http package does that for
// Authorization only.
func (e *endpoint) redirected(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return errRedirects
	}
	if req.URL.Host != e.base.Host {
		for name := range e.header {
			if name != "User-Agent" {
				delete(req.Header, name) // not Del: hosts.toml may write it in small letters
			}
		}
	}
	return nil
}

// maxURLs bounds how many addresses of a foreign layer are tried: a manifest may hold a hundred thousand.
const maxURLs = 8

// outsideClient is for addresses that an image names. An image must not weaken the protection that its registry has:
// https, unless that is reached without TLS itself.
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

// mayLead tells whether an address in a descriptor may be asked.
func (r *Repository) mayLead(u *url.URL) bool {
	plain := r.conf.PlainHTTP || docker.IsLocalhost(r.domain)
	return u.Host != "" && (u.Scheme == "https" || plain && u.Scheme == "http")
}

// foreign returns the addresses that a descriptor names. They get no credentials and no header of ours.
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
