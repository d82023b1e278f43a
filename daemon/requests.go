package daemon

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/store"
)

func (d *Daemon) control() http.Handler {
	mux := http.NewServeMux()
	bare := func(pattern string, do func(ctx context.Context) (any, error)) {
		handle(mux, pattern, func(r *http.Request, body []byte) (any, error) {
			if len(bytes.TrimSpace(body)) > 0 {
				return nil, fmt.Errorf("%s takes no body, found %d bytes: %w", pattern, len(body), pool.ErrInvalid)
			}
			return do(r.Context())
		})
	}
	bare("GET /v1/status", func(ctx context.Context) (any, error) { return d.status(ctx) })
	bare("GET /v1/pool", func(context.Context) (any, error) { return d.poolAnswer(), nil })
	bare("GET /v1/images", func(ctx context.Context) (any, error) { return d.images(ctx) })
	bare("GET /v1/containers", func(ctx context.Context) (any, error) { return d.containers(ctx) })
	bare("GET /v1/mounts", func(context.Context) (any, error) {
		all := []api.MountRequest{}
		for dir, key := range d.store.Mounts() {
			all = append(all, api.MountRequest{Image: key, Dir: dir})
		}
		return all, nil
	})
	bare("GET /v1/shared", func(ctx context.Context) (any, error) { return d.listShared(ctx), nil })
	bare("POST /v1/sweep",
		func(ctx context.Context) (any, error) { return struct{}{}, d.sn.Cleanup(store.ByCommand(ctx)) })
	bare("GET /v1/readers", func(context.Context) (any, error) { return d.store.LeaseUsers() })
	bare("POST /v1/scrub", func(ctx context.Context) (any, error) { return d.scrub(ctx, 0) })
	bare("POST /v1/check", func(ctx context.Context) (any, error) { return d.checkPool(ctx) })
	handleBody(mux, "POST /v1/mounts", func(ctx context.Context, req api.MountRequest) (any, error) {
		return d.store.MountAt(ctx, req.Image, req.Dir, !req.Suid)
	})
	handleBody(mux, "DELETE /v1/mounts", func(ctx context.Context, req api.MountRequest) (any, error) {
		return struct{}{}, d.store.UnmountAt(ctx, req.Dir)
	})
	handleBody(mux, "POST /v1/pins",
		func(ctx context.Context, req api.PinRequest) (any, error) { return d.put(ctx, req) })
	handleBody(mux, "DELETE /v1/pins", func(_ context.Context, req api.PinRequest) (any, error) {
		return struct{}{}, d.store.Unpin(req.Name)
	})
	handleBody(mux, "DELETE /v1/readers", func(_ context.Context, req api.ReaderRequest) (any, error) {
		n, err := d.store.Release(req.Reader, req.Earlier)
		return api.Released{Claims: n}, err
	})
	handleBody(mux, "POST /v1/attach", func(ctx context.Context, req api.AttachRequest) (any, error) {
		return d.attachImages(ctx, req)
	})
	handleBody(mux, "DELETE /v1/attach", func(ctx context.Context, req api.AttachRequest) (any, error) {
		return d.detachImages(ctx, req)
	})
	handle(mux, "/", func(r *http.Request, _ []byte) (any, error) {
		return nil, fmt.Errorf("request %s %s: %w", r.Method, r.URL.Path, pool.ErrNotFound)
	})
	return mux
}

// handleBody adds a request with a JSON body of type T.
func handleBody[T any](mux *http.ServeMux, pattern string, do func(ctx context.Context, req T) (any, error)) {
	handle(mux, pattern, func(r *http.Request, body []byte) (any, error) {
		var req T
		dec := json.NewDecoder(bytes.NewReader(body))
		dec.DisallowUnknownFields()
		err := dec.Decode(&req)
		if err == nil {
			if _, more := dec.Token(); !errors.Is(more, io.EOF) {
				err = errors.New("there is more data after the value")
			}
		}
		if err != nil {
			return nil, fmt.Errorf("body of the request: %w: %w", err, pool.ErrInvalid)
		}
		return do(r.Context(), req)
	})
}

// callerKey is the context key of the caller's *unix.Ucred.
type callerKey struct{}

// handle adds a request. It calls do once the whole body has arrived, from an authorized caller.
func handle(mux *http.ServeMux, pattern string, do func(r *http.Request, body []byte) (any, error)) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		// The socket's mode already keeps others out. Check again, because people change modes with good intentions.
		if cred, ok := r.Context().Value(callerKey{}).(*unix.Ucred); ok && !mayAsk(cred) {
			refuse(r.Context(), w, http.StatusForbidden, "only root may ask the daemon")
			return
		}
		// A caller that stops in the middle must not keep a connection for ever.
		rc := http.NewResponseController(w)
		_ = rc.SetReadDeadline(time.Now().Add(requestTimeout))
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
		if err == nil { // else the server waits for the rest of the body, but not for ever
			_ = rc.SetReadDeadline(time.Time{})
		}
		if large, ok := errors.AsType[*http.MaxBytesError](err); ok {
			refuse(r.Context(), w, http.StatusRequestEntityTooLarge,
				fmt.Sprintf("the body of a request may have %d bytes", large.Limit))
			return
		}
		if err != nil {
			refuse(r.Context(), w, http.StatusBadRequest, "body of the request: "+err.Error())
			return
		}
		out, err := do(r, body)
		answer(r.Context(), w, out, err)
	})
}

// mayAsk reports whether a caller is root or the daemon's own user. An unknown caller may not ask.
func mayAsk(cred *unix.Ucred) bool {
	return cred != nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
}

func (d *Daemon) poolAnswer() api.Pool {
	info, id := d.store.Region(), d.store.Pool().ID()
	return api.Pool{
		ID: hex.EncodeToString(id[:]), Path: info.Path, Kind: info.Kind, Region: info,
		Usage: d.store.Pool().Usage(),
	}
}

// checkPool checks the pool while it is in use.
func (d *Daemon) checkPool(ctx context.Context) (api.Check, error) {
	a := api.Check{Findings: []pool.Finding{}}
	err := d.store.Pool().Check(ctx, func(f pool.Finding) bool {
		a.Findings = append(a.Findings, f)
		return true
	})
	return a, err
}
