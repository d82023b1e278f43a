package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// fakeDaemon answers on a control socket like the owner of a pool. It records the requests.
type fakeDaemon struct {
	socket string
	id     string
	images []store.Info
	// shared and attached are its answers about pools of other owners.
	shared   api.SharedAnswer
	attached []api.Attached

	mu     sync.Mutex
	asked  []string
	mounts []api.MountRequest
}

func startDaemon(t *testing.T, id string, images ...store.Info) *fakeDaemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "daxfs") // a socket needs a short name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &fakeDaemon{socket: filepath.Join(dir, "control.sock"), id: id, images: images}
	l, err := net.Listen("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: d}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return d
}

func (d *fakeDaemon) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	body, _ := io.ReadAll(r.Body)
	what := r.Method + " " + r.URL.Path
	if r.Method != http.MethodGet {
		d.asked = append(d.asked, strings.TrimSpace(what+" "+string(body)))
	}
	var out any = struct{}{}
	switch what {
	case "GET /v1/pool":
		out = api.Pool{ID: d.id, Usage: pool.Usage{Layers: 7, Dead: 8192}}
	case "GET /v1/shared":
		out = d.shared
	case "POST /v1/attach", "DELETE /v1/attach":
		out = d.attached
	case "GET /v1/images":
		out = d.images
	case "GET /v1/mounts":
		out = d.mounts
	case "POST /v1/scrub":
		out = api.Scrub{Findings: []pool.Finding{{Rule: "pool.sum", Key: "image/ff", Off: 4096, Msg: "changed"}}}
	case "POST /v1/pins":
		out = d.images[0]
	case "POST /v1/mounts":
		var req api.MountRequest
		if json.Unmarshal(body, &req) != nil || req.Image == "none" {
			w.WriteHeader(http.StatusNotFound)
			out = api.Error{Error: `image "none": not found`}
		}
		d.mounts = append(d.mounts, req)
	}
	json.NewEncoder(w).Encode(out)
}

func (d *fakeDaemon) take() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := strings.Join(d.asked, "\n")
	d.asked = nil
	return s
}

// TestDaemonOwnsPool: commands on a daemon's pool do nothing themselves, and send the right requests.
func TestDaemonOwnsPool(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "pool")
	mustPool(t, "init", "--size", "64m", p)
	tree := rootfs(t, map[string]string{"f": "x"})
	mustPool(t, "put", "--name", "one", p, tree)
	state := showPool(t, p)
	d := startDaemon(t, state.ID, store.Info{
		Image: state.Images[0].Image, Names: []string{"example.org/one:1"},
		Holders: []string{"containerd/k8s.io", "pin/one"},
	}, store.Info{Image: pool.Image{Key: "image/ff"}, Holders: []string{"containerd/default"}})
	ask := func(status int, want string, args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		args = append(append([]string{"daxfs"}, args...), "--control", d.socket)
		got := run(t.Context(), args, nil, &out, &errs)
		if got != status || !strings.Contains(out.String()+errs.String(), want) {
			t.Errorf("%q: status %d, %s%s; expected %d and %q", args, got, &out, &errs, status, want)
		}
		return d.take()
	}
	if asked := ask(statusOK, "example.org/one:1", "pool", "ls", p); asked != "" {
		t.Errorf("ls asked %s", asked)
	}
	ask(statusOK, "8KiB that nothing holds", "pool", "show", p)
	cwd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(strings.TrimPrefix(tree, "rootfs:"))
	want := fmt.Sprintf(`POST /v1/pins {"name":"two","source":"%s/.","namespace":"default"}`, tree)
	if asked := ask(statusOK, "two: 4KiB", "pool", "put", "--name", "two", p, "rootfs:."); asked != want {
		t.Errorf("put asked %s, expected %s", asked, want)
	}
	put := []string{"pool", "put", "--hosts-dir", "certs", "--hosts-dir", "/b", "--name", "two", p, "rootfs:."}
	want = fmt.Sprintf(
		`POST /v1/pins {"name":"two","source":"%s/.","hostDirs":["%s/certs","/b"],"namespace":"default"}`,
		tree, strings.TrimPrefix(tree, "rootfs:"))
	if asked := ask(statusOK, "two: 4KiB", put...); asked != want {
		t.Errorf("put asked %s, expected %s", asked, want)
	}
	t.Chdir(cwd)
	want = `DELETE /v1/pins {"name":"one"}` + "\nPOST /v1/sweep"
	if asked := ask(statusOK, "removed 0 images", "pool", "rm", p, "example.org/one:1"); asked != want {
		t.Errorf("rm asked %s", asked)
	}
	if asked := ask(statusFailed, "held by containerd/default", "pool", "rm", p, "one", "image/ff"); asked != "" {
		t.Errorf("rm of an image that was not put asked %s", asked)
	}
	if asked := ask(statusOK, "8KiB wait", "pool", "gc", p); asked != "POST /v1/sweep" {
		t.Errorf("gc asked %s", asked)
	}
	if asked := ask(statusFindings, `pool.sum: "image/ff" at 4096: changed`, "pool", "check", "--contents",
		p); asked != "POST /v1/scrub" {
		t.Errorf("check --contents asked %s", asked)
	}
	ask(statusUsage, "a daemon owns the pool", "mount", "--driver", "fuse", "--pool", p, "one", dir)
	want = fmt.Sprintf(`POST /v1/mounts {"image":"one","dir":%q,"suid":true}`, dir)
	if asked := ask(statusOK, "by the daemon", "mount", "--suid", "--pool", p, "one", dir); asked != want {
		t.Errorf("mount asked %s, expected %s", asked, want)
	}
	ask(statusFailed, "not mounted", "umount", dir) // forgets a mount that the daemon did not make
	ask(statusFailed, `image "none": not found`, "mount", "--pool", p, "none", t.TempDir())

	// A daemon that owns another pool is not asked.
	d.id = "00"
	if asked := ask(statusOK, "removed 1 images", "pool", "rm", p, "one"); asked != "" {
		t.Errorf("the owner of another pool was asked %s", asked)
	}
}
