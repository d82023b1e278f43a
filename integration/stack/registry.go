package stack

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
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
	served  atomic.Int64 // nanoseconds of the clock
}

// NewRegistry starts an empty registry. The caller ends it with Off.
func NewRegistry() (*Registry, error) {
	r := &Registry{handler: registry.New(registry.Logger(log.New(io.Discard, "", 0))), addr: "127.0.0.1:0"}
	return r, r.On()
}

// On listens again, at the same address and with the same contents, after Off.
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

// Off refuses connections until On; those that are open are cut.
func (r *Registry) Off() error { return r.server.Close() }

// Push uploads an image under repository:latest and returns its reference.
func (r *Registry) Push(repository string, img v1.Image) (string, error) {
	ref, err := name.ParseReference(r.addr+"/"+repository+":latest", name.Insecure)
	if err != nil {
		return "", err
	}
	if err := remote.Write(ref, img); err != nil {
		return "", fmt.Errorf("push %q: %w", ref, err)
	}
	return ref.Name(), nil
}

func (r *Registry) serve(w http.ResponseWriter, req *http.Request) {
	r.handler.ServeHTTP(w, req)
	r.served.Store(time.Now().UnixNano())
}

// Served is when the registry had answered the last request.
func (r *Registry) Served() time.Time { return time.Unix(0, r.served.Load()) }
