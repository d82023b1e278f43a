package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// The control API is for people and for the command line: HTTP with JSON on a unix socket that only
// root can use. One process owns a pool, so other programs get its images by asking the daemon.
// Package api defines the requests and answers; docs/control-api.md describes them.

// Limits of requests, in bytes.
const (
	maxRequest = 64 << 10 // of a body
	maxHeader  = 16 << 10
)

// requestTimeout bounds the time to send a request; answering has no limit. Tests shorten it.
var requestTimeout = 10 * time.Second

// serveControl answers control requests until stop is called.
func (d *Daemon) serveControl(ctx context.Context) (stop func(), err error) {
	l, err := d.listen(api.Socket(d.cfg.Address))
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	srv := &http.Server{
		Handler: d.control(), ReadHeaderTimeout: requestTimeout, IdleTimeout: requestTimeout, MaxHeaderBytes: maxHeader,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, callerKey{}, callerOf(c))
		},
		ErrorLog: stdlog.New(io.Discard, "", 0), // errors of a connection concern only its caller
	}
	go func() {
		if err := srv.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			log.G(ctx).WithError(err).Error("control server ended")
		}
	}()
	return func() {
		// The handlers must end before the pool below them is closed.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if srv.Shutdown(ctx) != nil {
			srv.Close()
		}
	}, nil
}

// put puts an image into the pool and pins it.
func (d *Daemon) put(ctx context.Context, req api.PinRequest) (any, error) {
	platform, err := source.ParsePlatform(req.Platform)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, pool.ErrInvalid)
	}
	if len(req.HostDirs) == 0 {
		req.HostDirs = d.cfg.Registries.HostsDirs
	}
	if req.Source == "" && req.Image != "" {
		return d.store.Pin(ctx, req.Image, req.Name)
	}
	if req.Image != "" {
		return nil, fmt.Errorf("\"source\" and \"image\" were both given, expected one: %w", pool.ErrInvalid)
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

func answer(ctx context.Context, w http.ResponseWriter, out any, err error) {
	if err != nil {
		refuse(ctx, w, statusOf(err), err.Error())
		return
	}
	write(ctx, w, http.StatusOK, out)
}

func refuse(ctx context.Context, w http.ResponseWriter, status int, why string) {
	write(ctx, w, status, api.Error{Error: why})
}

func write(ctx context.Context, w http.ResponseWriter, status int, out any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(out); err != nil {
		log.G(ctx).WithError(err).Debug("the client did not read the answer to its control request")
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
