package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/converter/blob"
)

// MaxManifest bounds a manifest or an index, in bytes. Registries refuse manifests above 4 MiB.
const MaxManifest = 8 << 20

// Config controls the access to registries.
type Config struct {
	// PlainHTTP omits TLS unless a hosts.toml says otherwise.
	PlainHTTP bool
	// HostDirs are directories in the format of containerd's certs.d. The first one that knows a registry counts.
	HostDirs []string
	// Notify receives one line with the reason for each repeated request; nil means the log. Several
	// goroutines may call it.
	Notify func(message string)
	// Push requests permission to write to the Repository.
	Push bool
	// MountFrom is a repository of the same registry from which Push may mount blobs, or empty.
	MountFrom string
}

// DefaultHostDirs returns the directories from the documentation of containerd and Docker.
func DefaultHostDirs() []string { return []string{"/etc/containerd/certs.d", "/etc/docker/certs.d"} }

// Repository is a repository of a registry, with one reference in it. Its methods may be called concurrently.
type Repository struct {
	ref          reference.Named
	domain, path string
	conf         Config
	pace         pace

	once       sync.Once // guards the following fields
	hosts      []*endpoint
	outside    *http.Client
	transports []*http.Transport
	err        error
}

// New parses a reference like docker and containerd. It sends no request. The caller closes the Repository.
func New(ref string, c Config) (*Repository, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, err
	}
	return &Repository{
		ref: named, domain: reference.Domain(named), path: reference.Path(named), conf: c, pace: defaultPace(),
	}, nil
}

// String returns the complete reference, including the parts that docker adds by default.
func (r *Repository) String() string { return r.ref.String() }

// Place returns the registry and the repository, without tag and digest.
func (r *Repository) Place() (registry, repository string) { return r.domain, r.path }

// Close closes idle connections. Open readers stay usable.
func (r *Repository) Close() error {
	for _, t := range r.transports {
		t.CloseIdleConnections()
	}
	return nil
}

// able returns the hosts with the capabilities caps, in the order of trial.
func (r *Repository) able(ctx context.Context, caps docker.HostCapabilities) ([]*endpoint, error) {
	r.once.Do(func() { r.hosts, r.err = r.configure(ctx) })
	if r.err != nil {
		return nil, fmt.Errorf("hosts of registry %s: %w", r.domain, r.err)
	}
	var hosts []*endpoint
	for _, h := range r.hosts {
		if h.caps.Has(caps) {
			hosts = append(hosts, h)
		}
	}
	if len(hosts) == 0 {
		return nil,
			fmt.Errorf("hosts of registry %s: none may %s (capabilities in hosts.toml)", r.domain, capsName(caps))
	}
	return hosts, nil
}

func capsName(caps docker.HostCapabilities) string {
	if caps.Has(docker.HostCapabilityPush) {
		return "push"
	}
	return "pull or resolve"
}

// Manifest is an image manifest or an index.
type Manifest struct {
	Doc       []byte
	MediaType string        // from the registry, unchecked
	Digest    digest.Digest // verified
}

// manifestTypes are the supported media types.
var manifestTypes = []string{
	ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest,
	images.MediaTypeDockerSchema2ManifestList, images.MediaTypeDockerSchema2Manifest,
}

// Manifest fetches the manifest that the reference names. A wrong digest is a *blob.MismatchError.
func (r *Repository) Manifest(ctx context.Context) (*Manifest, error) {
	id, caps := "latest", docker.HostCapabilityPull
	var want digest.Digest
	switch ref := r.ref.(type) {
	case reference.Digested:
		want = ref.Digest()
		id = want.String()
	case reference.Tagged:
		id, caps = ref.Tag(), caps|docker.HostCapabilityResolve
	}
	hosts, err := r.able(ctx, caps)
	if err != nil {
		return nil, err
	}
	var m *Manifest
	err = r.try(ctx, "manifest "+id, hosts, &budget{}, func(ctx context.Context, e *endpoint) (err error) {
		m, err = e.manifest(ctx, r.path, id, want)
		return err
	})
	return m, err
}

func (e *endpoint) manifest(ctx context.Context, repo, id string, want digest.Digest) (*Manifest, error) {
	resp, err := e.get(ctx, e.url(repo, "manifests", id), http.Header{"Accept": manifestTypes}, http.StatusOK)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if err := noWebPage(resp); err != nil {
		return nil, fmt.Errorf("%s: %w", e.name, err)
	}
	body, err := decoded(resp)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", e.name, err)
	}
	doc, err := io.ReadAll(io.LimitReader(body, MaxManifest+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", e.name, err)
	}
	if len(doc) > MaxManifest {
		return nil, fmt.Errorf("%s: more than %d bytes", e.name, MaxManifest)
	}
	if want == "" { // a tag has no digest to verify, but the registry may have sent one
		if d := digest.Digest(resp.Header.Get("Docker-Content-Digest")); d.Validate() == nil {
			want = d
		} else {
			want = digest.FromBytes(doc)
		}
	}
	if got := want.Algorithm().FromBytes(doc); got != want {
		return nil,
			fmt.Errorf("%s: %w", e.name, &blob.MismatchError{What: "digest", Want: want.String(), Got: got.String()})
	}
	m := &Manifest{Doc: doc, Digest: want}
	if m.MediaType, _, err = mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil {
		m.MediaType = resp.Header.Get("Content-Type")
	}
	return m, nil
}

// Open opens a blob or a manifest by its digest. It hides lost connections; see the package's
// documentation. The caller closes the result and verifies what it reads. Cancelling ctx ends it.
//
// If the registry answers 404 for a layer, Open tries the URLs in its descriptor.
func (r *Repository) Open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", d.Digest, err)
	}
	hosts, err := r.able(ctx, docker.HostCapabilityPull)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	s := &stream{repo: r, want: d, hosts: hosts, ctx: ctx, cancel: cancel}
	err = s.open()
	if errors.Is(err, ErrNotFound) && len(d.URLs) > 0 && s.kind() == "blobs" {
		s.hosts, s.budget = r.foreign(d), budget{}
		outside := errNoTLS
		if len(s.hosts) > 0 {
			outside = s.open()
		}
		if outside == nil {
			return s, nil
		}
		err = fmt.Errorf("%w; nor do the urls of the layer lead to it: %w", err, outside)
	}
	if err != nil {
		cancel()
		return nil, err
	}
	return s, nil
}

// pace holds the time-outs of this package. Tests shorten them.
type pace struct {
	answer time.Duration // for the header of a response
	stall  time.Duration // for the next byte of a response
	sleep  func(ctx context.Context, d time.Duration) error
}

func defaultPace() pace {
	return pace{answer: 30 * time.Second, stall: time.Minute, sleep: sleep}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
