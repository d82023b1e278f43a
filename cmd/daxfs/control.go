package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// defaultControl is the default address of the daemon's control socket.
const defaultControl = "/run/daxfs-snapshotter/control.sock"

// daemonKeeper is a keeper that asks the daemon. docs/control-api.md describes the answers.
type daemonKeeper struct {
	socket string
	client http.Client
}

func dialControl(socket string) *daemonKeeper {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	transport := &http.Transport{DialContext: dial, DisableKeepAlives: true}
	return &daemonKeeper{socket: socket, client: http.Client{Transport: transport}}
}

// owns reports whether the daemon runs and owns the pool with that id.
func (d *daemonKeeper) owns(ctx context.Context, id string) bool {
	if d.socket == "" {
		return false
	}
	answer, err := d.pool(ctx)
	return err == nil && answer.ID == id
}

func (d *daemonKeeper) pool(ctx context.Context) (a api.Pool, err error) {
	return a, d.ask(ctx, http.MethodGet, "pool", nil, &a)
}

func (d *daemonKeeper) Images(ctx context.Context) (list []store.Info, err error) {
	return list, d.ask(ctx, http.MethodGet, "images", nil, &list)
}

func (d *daemonKeeper) Usage(ctx context.Context) (pool.Usage, error) {
	a, err := d.pool(ctx)
	return a.Usage, err
}

func (d *daemonKeeper) Put(ctx context.Context, src putSource, name string) (info store.Info, err error) {
	from, err := source.Absolute(src.name)
	if err != nil {
		return info, err
	}
	req := api.PinRequest{
		Name: name, Source: from, PlainHTTP: src.plainHTTP, Namespace: src.namespace, Platform: src.platform,
		OverlayUpper: src.overlayUpper,
	}
	for _, dir := range src.hostDirs {
		if dir, err = filepath.Abs(dir); err != nil {
			return info, err
		}
		req.HostDirs = append(req.HostDirs, dir)
	}
	return info, d.ask(ctx, http.MethodPost, "pins", req, &info)
}

func (d *daemonKeeper) Pin(ctx context.Context, image, name string) (info store.Info, err error) {
	return info, d.ask(ctx, http.MethodPost, "pins", api.PinRequest{Name: name, Image: image}, &info)
}

func (d *daemonKeeper) Unpin(ctx context.Context, name string) error {
	return d.ask(ctx, http.MethodDelete, "pins", api.PinRequest{Name: name}, nil)
}

func (d *daemonKeeper) Sweep(ctx context.Context) error {
	return d.ask(ctx, http.MethodPost, "sweep", nil, nil)
}

func (d *daemonKeeper) Readers(ctx context.Context) (list []store.LeaseUser, err error) {
	return list, d.ask(ctx, http.MethodGet, "readers", nil, &list)
}

func (d *daemonKeeper) Release(ctx context.Context, reader string, earlier bool) (int, error) {
	var a api.Released
	err := d.ask(ctx, http.MethodDelete, "readers", api.ReaderRequest{Reader: reader, Earlier: earlier}, &a)
	return a.Claims, err
}

func (d *daemonKeeper) Scrub(ctx context.Context) (found []pool.Finding, lost string, err error) {
	var a api.Scrub
	err = d.ask(ctx, http.MethodPost, "scrub", nil, &a)
	return a.Findings, a.Lost, err
}

// check makes the daemon check its pool while the pool is in use.
func (d *daemonKeeper) check(ctx context.Context) ([]pool.Finding, error) {
	var a api.Check
	err := d.ask(ctx, http.MethodPost, "check", nil, &a)
	return a.Findings, err
}

func (d *daemonKeeper) status(ctx context.Context) (a api.Status, err error) {
	return a, d.ask(ctx, http.MethodGet, "status", nil, &a)
}

func (d *daemonKeeper) images(ctx context.Context) (list []api.Image, err error) {
	return list, d.ask(ctx, http.MethodGet, "images", nil, &list)
}

func (d *daemonKeeper) containers(ctx context.Context) (list []api.Container, err error) {
	return list, d.ask(ctx, http.MethodGet, "containers", nil, &list)
}

func (d *daemonKeeper) Mount(ctx context.Context, name, dir string, suid bool) (string, error) {
	return "by the daemon",
		d.ask(ctx, http.MethodPost, "mounts", api.MountRequest{Image: name, Dir: dir, Suid: suid}, nil)
}

func (d *daemonKeeper) Unmount(ctx context.Context, dir string) error {
	return d.ask(ctx, http.MethodDelete, "mounts", api.MountRequest{Dir: dir}, nil)
}

// mounted reports whether the daemon mounted an image on a directory for a user.
func (d *daemonKeeper) mounted(ctx context.Context, dir string) bool {
	var list []api.MountRequest
	if d.socket == "" || d.ask(ctx, http.MethodGet, "mounts", nil, &list) != nil {
		return false
	}
	for _, m := range list {
		if m.Dir == dir {
			return true
		}
	}
	return false
}

func (d *daemonKeeper) Close() error { return nil }

// maxAnswer bounds an answer of the daemon, in bytes.
const maxAnswer = 256 << 20

// ask sends a request and reads the answer into out, which may be nil.
func (d *daemonKeeper) ask(ctx context.Context, method, what string, body, out any) error {
	var b bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&b).Encode(body); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://daxfs/v1/"+what, &b)
	if err != nil {
		return err
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return fmt.Errorf("daemon at %q: %w", d.socket, err)
	}
	defer resp.Body.Close()
	text := io.LimitReader(resp.Body, maxAnswer)
	if resp.StatusCode != http.StatusOK {
		var failed api.Error
		if json.NewDecoder(text).Decode(&failed) != nil || failed.Error == "" {
			failed.Error = resp.Status
		}
		return errors.New(failed.Error)
	}
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(text).Decode(out); err != nil {
		return fmt.Errorf("answer of the daemon at %q: %w", d.socket, err)
	}
	return nil
}
