package daemon

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/converter/source/remote"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// The control API is for people, and for the command line that acts for them: HTTP with JSON on a unix socket that only
// root can use. One process owns a pool, so whoever wants an image of a pool that a daemon owns asks the daemon.
//
//	GET    /v1/pool     {"id": …, "path": …, "kind": …, "usage": {…}}
//	GET    /v1/images   [{"key": …, "names": […], "holders": […], …}, …]
//	GET    /v1/mounts   [{"image": …, "dir": …}, …]
//	POST   /v1/mounts   {"image": NAME, "dir": DIR}       mounts an image, with "suid": true without nosuid and nodev; the
//	                                                     answer is the image
//	DELETE /v1/mounts   {"dir": DIR}
//	POST   /v1/pins     {"source": SOURCE, "name": NAME}  puts an image into the pool and keeps it there
//	DELETE /v1/pins     {"name": NAME}
//	POST   /v1/sweep                                      frees what nobody holds
//	POST   /v1/scrub                                      {"extents": …, "bytes": …, "findings": […]}: reads all contents
//
// An error is {"error": TEXT} with a status of 400 or higher.

// ControlSocket is where a daemon with a gRPC address answers control requests.
func ControlSocket(address string) string {
	return filepath.Join(filepath.Dir(address), "control.sock")
}

// MountRequest is the body of requests to /v1/mounts, and an element of the answer.
type MountRequest struct {
	Image string `json:"image,omitempty"`
	Dir   string `json:"dir"`
	// Suid lets setuid programs and device nodes of the image work.
	Suid bool `json:"suid,omitempty"`
}

// PinRequest is the body of requests to /v1/pins.
type PinRequest struct {
	Name   string `json:"name"`
	Source string `json:"source,omitempty"`
	// PlainHTTP lets docker:// sources talk to a registry without TLS.
	PlainHTTP bool `json:"plainHTTP,omitempty"`
	// HostDirs have the hosts.toml files for docker:// sources; none means the default of daxfs convert.
	HostDirs []string `json:"hostDirs,omitempty"`
	// Namespace is that of containerd: sources; empty means the default.
	Namespace string `json:"namespace,omitempty"`
	// OverlayUpper says that the directory of a rootfs: source is the upper directory of an overlay.
	OverlayUpper bool `json:"overlayUpper,omitempty"`
	// Platform chooses from a multi-platform image; empty means this machine's.
	Platform string `json:"platform,omitempty"`
}

// PoolAnswer is the answer of /v1/pool.
type PoolAnswer struct {
	ID    string     `json:"id"`
	Path  string     `json:"path"`
	Kind  string     `json:"kind"`
	Usage pool.Usage `json:"usage"`
}

// ErrorAnswer is the answer to a request that failed.
type ErrorAnswer struct {
	Error string `json:"error"`
}

// maxRequest bounds the body of a request.
const maxRequest = 64 << 10

// serveControl answers control requests until stop is called.
func (d *Daemon) serveControl(ctx context.Context) (stop func(), err error) {
	l, err := listen(ControlSocket(d.cfg.Address))
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	srv := &http.Server{
		Handler: d.control(), ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	go func() {
		if err := srv.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			log.G(ctx).WithError(err).Error("control server ended")
		}
	}()
	return func() {
		// Its handlers have to end before the pool below them is closed.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if srv.Shutdown(ctx) != nil {
			srv.Close()
		}
	}, nil
}

func (d *Daemon) control() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, do func(ctx context.Context, body *json.Decoder) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			body := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest))
			body.DisallowUnknownFields()
			out, err := do(r.Context(), body)
			answer(r.Context(), w, out, err)
		})
	}
	handle("GET /v1/pool", func(context.Context, *json.Decoder) (any, error) {
		info, id := d.store.Region(), d.store.Pool().ID()
		return PoolAnswer{ID: hex.EncodeToString(id[:]), Path: info.Path, Kind: info.Kind, Usage: d.store.Pool().Usage()}, nil
	})
	handle("GET /v1/images", func(context.Context, *json.Decoder) (any, error) { return d.store.Images(), nil })
	handle("GET /v1/mounts", func(context.Context, *json.Decoder) (any, error) {
		all := []MountRequest{}
		for dir, key := range d.store.Mounts() {
			all = append(all, MountRequest{Image: key, Dir: dir})
		}
		return all, nil
	})
	handle("POST /v1/mounts", func(ctx context.Context, body *json.Decoder) (any, error) {
		var req MountRequest
		if err := decode(body, &req); err != nil {
			return nil, err
		}
		return d.store.MountAt(ctx, req.Image, req.Dir, !req.Suid)
	})
	handle("DELETE /v1/mounts", func(ctx context.Context, body *json.Decoder) (any, error) {
		var req MountRequest
		if err := decode(body, &req); err != nil {
			return nil, err
		}
		return struct{}{}, d.store.UnmountAt(ctx, req.Dir)
	})
	handle("POST /v1/pins", func(ctx context.Context, body *json.Decoder) (any, error) {
		var req PinRequest
		if err := decode(body, &req); err != nil {
			return nil, err
		}
		return d.put(ctx, req)
	})
	handle("DELETE /v1/pins", func(_ context.Context, body *json.Decoder) (any, error) {
		var req PinRequest
		if err := decode(body, &req); err != nil {
			return nil, err
		}
		return struct{}{}, d.store.Unpin(req.Name)
	})
	handle("POST /v1/sweep", func(ctx context.Context, _ *json.Decoder) (any, error) {
		return struct{}{}, d.sn.Cleanup(ctx)
	})
	handle("POST /v1/scrub", func(ctx context.Context, _ *json.Decoder) (any, error) { return d.scrub(ctx, 0) })
	return mux
}

// put puts an image into the pool for a user.
func (d *Daemon) put(ctx context.Context, req PinRequest) (any, error) {
	platform, err := source.ParsePlatform(req.Platform)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, pool.ErrInvalid)
	}
	if len(req.HostDirs) == 0 {
		req.HostDirs = remote.DefaultHostDirs()
	}
	src, err := source.Parse(req.Source, source.Config{
		PlainHTTP: req.PlainHTTP, HostDirs: req.HostDirs, Address: d.cfg.Containerd.Address, Namespace: req.Namespace,
		MaxSize: int64(d.cfg.Layers.MaxSize), OverlayUpper: req.OverlayUpper,
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, pool.ErrInvalid)
	}
	defer src.Close()
	img, err := src.Image(ctx, platform)
	if err != nil {
		return nil, err
	}
	info, err := d.store.Put(ctx, img, req.Name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", src, err)
	}
	return info, nil
}

func decode(body *json.Decoder, into any) error {
	if err := body.Decode(into); err != nil {
		return fmt.Errorf("body of the request: %w: %w", err, pool.ErrInvalid)
	}
	return nil
}

// answer writes the result of a request.
func answer(ctx context.Context, w http.ResponseWriter, out any, err error) {
	status := http.StatusOK
	if err != nil {
		status, out = statusOf(err), ErrorAnswer{Error: err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(out); err != nil {
		log.G(ctx).WithError(err).Debug("the answer to a control request was not taken")
	}
}

func statusOf(err error) int {
	switch err = toErrdefs(err); {
	case errors.Is(err, mount.ErrNotFound), errdefs.IsNotFound(err):
		return http.StatusNotFound
	case errdefs.IsInvalidArgument(err):
		return http.StatusBadRequest
	case errdefs.IsFailedPrecondition(err):
		return http.StatusConflict
	case errdefs.IsResourceExhausted(err):
		return http.StatusInsufficientStorage
	}
	return http.StatusInternalServerError
}
