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
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// defaultControl is where the daemon answers unless its address was changed.
const defaultControl = "/run/daxfs-snapshotter/control.sock"

// daemonKeeper is a daemon, by its control socket. docs/operations.md describes what it answers.
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

// owns tells whether the daemon runs and owns the pool with that id.
func (d *daemonKeeper) owns(ctx context.Context, id string) bool {
	if d.socket == "" {
		return false
	}
	answer, err := d.pool(ctx)
	return err == nil && answer.ID == id
}

// poolAnswer is what GET /v1/pool says.
type poolAnswer struct {
	ID    string     `json:"id"`
	Usage pool.Usage `json:"usage"`
}

func (d *daemonKeeper) pool(ctx context.Context) (a poolAnswer, err error) {
	return a, d.ask(ctx, http.MethodGet, "pool", nil, &a)
}

// mountRequest is the body of requests to /v1/mounts, and an element of its list.
type mountRequest struct {
	Image string `json:"image,omitempty"`
	Dir   string `json:"dir"`
	Suid  bool   `json:"suid,omitempty"`
}

// pinRequest is the body of requests to /v1/pins.
type pinRequest struct {
	Name      string   `json:"name"`
	Source    string   `json:"source,omitempty"`
	PlainHTTP bool     `json:"plainHTTP,omitempty"`
	HostDirs  []string `json:"hostDirs,omitempty"`
	Namespace string   `json:"namespace,omitempty"`
	Platform  string   `json:"platform,omitempty"`
	Upper     bool     `json:"overlayUpper,omitempty"`
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
	req := pinRequest{
		Name: name, Source: from, PlainHTTP: src.plainHTTP, Namespace: src.namespace, Platform: src.platform,
		Upper: src.overlayUpper,
	}
	for _, dir := range src.hostDirs {
		if dir, err = filepath.Abs(dir); err != nil {
			return info, err
		}
		req.HostDirs = append(req.HostDirs, dir)
	}
	return info, d.ask(ctx, http.MethodPost, "pins", req, &info)
}

func (d *daemonKeeper) Unpin(ctx context.Context, name string) error {
	return d.ask(ctx, http.MethodDelete, "pins", pinRequest{Name: name}, nil)
}

func (d *daemonKeeper) Sweep(ctx context.Context) error {
	return d.ask(ctx, http.MethodPost, "sweep", nil, nil)
}

func (d *daemonKeeper) Scrub(ctx context.Context) (found []pool.Finding, lost string, err error) {
	var a struct {
		Findings []pool.Finding `json:"findings"`
		Lost     string         `json:"lost"`
	}
	err = d.ask(ctx, http.MethodPost, "scrub", nil, &a)
	return a.Findings, a.Lost, err
}

func (d *daemonKeeper) Mount(ctx context.Context, name, dir string, suid bool) (string, error) {
	return "by the daemon", d.ask(ctx, http.MethodPost, "mounts", mountRequest{Image: name, Dir: dir, Suid: suid}, nil)
}

func (d *daemonKeeper) Unmount(ctx context.Context, dir string) error {
	return d.ask(ctx, http.MethodDelete, "mounts", mountRequest{Dir: dir}, nil)
}

// mounted tells whether the daemon mounted an image on a directory for a user.
func (d *daemonKeeper) mounted(ctx context.Context, dir string) bool {
	var list []mountRequest
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

// maxAnswer bounds an answer of the daemon.
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
		var failed struct {
			Error string `json:"error"`
		}
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
