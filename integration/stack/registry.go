package stack

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Registry is an OCI registry on 127.0.0.1 that keeps everything in memory.
type Registry struct {
	handler http.Handler
	addr    string
	server  *http.Server
	served  atomic.Int64 // Unix time in nanoseconds
	sent    atomic.Int64 // bytes of blobs and manifests
	rate    atomic.Int64 // bytes per second for all answers together; 0 is no limit
	line    sync.Mutex   // held while sending with a limit

	mu      sync.Mutex
	fetched []string
	hold    *hold // nil unless a range is to be held
}

// hold delays one answer.
type hold struct {
	left          int // requests before that one
	held, release chan struct{}
}

// NewRegistry starts an empty registry. The caller ends it with Off.
func NewRegistry() (*Registry, error) {
	r := &Registry{handler: registry.New(registry.Logger(log.New(io.Discard, "", 0))), addr: "127.0.0.1:0"}
	return r, r.On()
}

// On listens again after Off, at the same address and with the same contents.
func (r *Registry) On() error {
	l, err := net.Listen("tcp", r.addr)
	if err != nil {
		return fmt.Errorf("listen for the registry: %w", err)
	}
	r.addr = l.Addr().String()
	r.server = &http.Server{Handler: http.HandlerFunc(r.serve), ErrorLog: log.New(io.Discard, "", 0)}
	go r.server.Serve(l)
	return nil
}

// Addr returns the registry's address, HOST:PORT.
func (r *Registry) Addr() string { return r.addr }

// Off refuses connections until On, and closes open ones.
func (r *Registry) Off() error { return r.server.Close() }

// Push uploads an image under repository:latest and returns its reference.
func (r *Registry) Push(repository string, img v1.Image) (string, error) {
	return r.PushTag(repository, "latest", img)
}

// PushTag uploads an image under a tag and returns its reference.
func (r *Registry) PushTag(repository, tag string, img v1.Image) (string, error) {
	ref, err := name.ParseReference(r.addr+"/"+repository+":"+tag, name.Insecure)
	if err != nil {
		return "", err
	}
	if err := remote.Write(ref, img); err != nil {
		return "", fmt.Errorf("push %q: %w", ref, err)
	}
	return ref.Name(), nil
}

// Fetched returns the digests of the blobs requested since the last call, without manifests.
func (r *Registry) Fetched() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := r.fetched
	r.fetched = nil
	return list
}

// HoldRange delays the answer to the n-th request for a part of a blob, until release is called or the
// client is gone. held is closed when the request arrives.
func (r *Registry) HoldRange(n int) (held <-chan struct{}, release func()) {
	h := &hold{n - 1, make(chan struct{}), make(chan struct{})}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hold = h
	return h.held, sync.OnceFunc(func() { close(h.release) })
}

// maybeHold returns when a request for a part may be answered.
func (r *Registry) maybeHold(req *http.Request) {
	r.mu.Lock()
	h := r.hold
	if h == nil || h.left > 0 {
		if h != nil {
			h.left--
		}
		r.mu.Unlock()
		return
	}
	r.hold = nil
	r.mu.Unlock()
	close(h.held)
	select {
	case <-h.release:
	case <-req.Context().Done():
	}
}

func (r *Registry) serve(w http.ResponseWriter, req *http.Request) {
	if _, digest, ok := strings.Cut(req.URL.Path, "/blobs/sha256:"); ok && req.Method == http.MethodGet {
		r.mu.Lock()
		r.fetched = append(r.fetched, "sha256:"+digest)
		r.mu.Unlock()
	}
	// The handler refuses a range without an end, with which containerd resumes an interrupted pull.
	// Answer with the whole blob instead.
	if strings.HasSuffix(req.Header.Get("Range"), "-") {
		req.Header.Del("Range")
	}
	if req.Header.Get("Range") != "" {
		r.maybeHold(req)
	}
	r.handler.ServeHTTP(&sending{w, r}, req)
	r.served.Store(time.Now().UnixNano())
}

// Served returns the time of the last answer.
func (r *Registry) Served() time.Time { return time.Unix(0, r.served.Load()) }

// Sent returns the number of bytes sent in bodies of answers.
func (r *Registry) Sent() int64 { return r.sent.Load() }

// Throttle limits all answers together to rate bytes per second. 0 ends the limit.
func (r *Registry) Throttle(rate int64) { r.rate.Store(rate) }

// sending counts and delays the bytes of a body.
type sending struct {
	http.ResponseWriter
	r *Registry
}

func (s *sending) Write(b []byte) (int, error) {
	if rate := s.r.rate.Load(); rate > 0 {
		s.r.line.Lock()
		time.Sleep(time.Duration(len(b)) * time.Second / time.Duration(rate))
		s.r.line.Unlock()
	}
	n, err := s.ResponseWriter.Write(b)
	s.r.sent.Add(int64(n))
	return n, err
}
