package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
	"github.com/daxfs/daxfs-snapshotter/pool"
)

// inside starts a daemon in this process, and a machine without a process that pulls through its socket.
func inside(t *testing.T, f flavour, change func(*config.Config)) (*client, *machine) {
	t.Helper()
	f.need(t)
	m := &machine{t: t, dir: t.TempDir()}
	m.cfg = f.config(m.dir)
	change(m.cfg)
	var err error
	m.store, err = local.NewStore(filepath.Join(m.dir, "content"))
	m.must(err)
	cl, err := start(t.Context(), m.cfg, m.store)
	m.must(err)
	m.sn, m.ap = cl.remote, cl.applier
	t.Cleanup(func() {
		ctx := context.Background()
		if err := errors.Join(cl.purge(ctx), cl.end(), removePool(m.cfg)); err != nil {
			t.Error(err)
		}
	})
	return cl, m
}

// A pool too small for a pull gives plain directories, and existing containers continue; freed room is used again.
func TestFullPool(t *testing.T) {
	slow.Skip(t, "fills a pool many times")
	for _, stream := range []bool{false, true} {
		t.Run(fmt.Sprintf("stream=%v", stream), func(t *testing.T) {
			cl, m := inside(t, flavours[1], func(c *config.Config) { c.Pool.Size = 16 << 20 })
			ctx := namespaces.WithNamespace(t.Context(), "default")
			small, big := file{"small", random(1, 1<<20)}, file{"big", random(2, 20<<20)}
			first, err := m.pull(ctx, stream, []file{small})
			m.must(err)
			running, err := m.sn.Prepare(ctx, "default/100/c", first)
			m.must(err)
			second, err := m.pull(ctx, stream, []file{small}, []file{big})
			m.must(err)
			plain, err := m.sn.Prepare(ctx, "default/101/c", second)
			m.must(err)
			if n := strings.Count(strings.Join(plain[0].Options, " "), "/snapshots/"); n < 3 {
				t.Errorf("%v stands on no directory", plain)
			}
			m.compare(plain, small, big)
			m.compare(running, small)
			metrics := httptest.NewRecorder()
			cl.metrics.handler(false).ServeHTTP(metrics, httptest.NewRequest("GET", "/metrics", nil))
			if !strings.Contains(metrics.Body.String(), `daxfs_fallbacks_total{reason="full"}`) {
				t.Error("the fallback was not counted")
			}
			// Unused images give way to a wanted one.
			for i := range 12 {
				f := file{"f", random(uint64(10+i), 3<<20)}
				top, err := m.pull(ctx, stream, []file{f})
				m.must(err)
				key := fmt.Sprintf("default/%d/c", 200+i)
				mounts, err := m.sn.Prepare(ctx, key, top)
				m.must(err)
				// The kernel frees detached overlays a moment later. Until then earlier images are in use.
				for try := 0; strings.Contains(strings.Join(mounts[0].Options, " "),
					"lowerdir="+m.cfg.Root+"/snapshots"); try++ {
					if try == 1200 {
						t.Fatalf("image %d: %v", i, mounts)
					}
					time.Sleep(50 * time.Millisecond)
					m.must(m.sn.Remove(ctx, key))
					mounts, err = m.sn.Prepare(ctx, key, top)
					m.must(err)
				}
				m.compare(mounts, f)
				m.must(m.sn.Remove(ctx, key))
			}
			m.compare(running, small)
		})
	}
}

// A layer that does not fit into the pool is below one that does.
func TestLargeLayerBelow(t *testing.T) {
	slow.Skip(t, "writes layers larger than the pool")
	for _, f := range flavours[:2] {
		t.Run(f.name, func(t *testing.T) {
			_, m := inside(t, f, func(c *config.Config) { c.Pool.Size = 16 << 20 })
			ctx := namespaces.WithNamespace(t.Context(), "default")
			big, small := file{"big", random(1, 20<<20)}, file{"small", random(2, 1<<20)}
			top, err := m.pull(ctx, true, []file{big}, []file{small})
			m.must(err)
			mounts, err := m.sn.Prepare(ctx, "default/100/c", top)
			m.must(err)
			m.compare(mounts, big, small)
		})
	}
}

// Without slots, containers start from copies on disk. When nothing is mounted, a new epoch has slots again.
func TestSlotsRunOut(t *testing.T) {
	slow.Skip(t, "starts a container for each slot")
	cl, m := inside(t, flavours[1], func(c *config.Config) { c.Pool.Size = 16 << 20 })
	ctx := namespaces.WithNamespace(t.Context(), "default")
	slots := cl.pool().Usage().Slots
	uuid := cl.pool().UUID()
	type started struct {
		key, top string
		mounts   []mount.Mount
		file     file
	}
	var all []started
	for i := range slots + 4 {
		c := started{key: fmt.Sprintf("default/%d/c", 1000+i), file: file{"f", random(uint64(i), 10)}}
		var err error
		c.top, err = m.pull(ctx, true, []file{c.file})
		m.must(err)
		c.mounts, err = m.sn.Prepare(ctx, c.key, c.top)
		m.must(err)
		all = append(all, c)
	}
	plain := 0
	for _, c := range all {
		m.compare(c.mounts, c.file)
		if strings.Contains(strings.Join(c.mounts[0].Options, " "), "lowerdir="+m.cfg.Root+"/plain/") {
			plain++
		}
	}
	if plain != 4 {
		t.Errorf("%d containers stand on copies, expected 4 beside %d slots", plain, slots)
	}
	for _, c := range all {
		m.must(errors.Join(m.sn.Remove(ctx, c.key), m.sn.Remove(ctx, c.top)))
	}
	m.must(cl.settle(ctx))
	if cl.pool().UUID() == uuid {
		t.Error("nothing is mounted, and the epoch is the old one")
	}
	top, err := m.pull(ctx, true, []file{{"f", nil}})
	m.must(err)
	mounts, err := m.sn.Prepare(ctx, "default/2000/c", top)
	m.must(err)
	if !strings.Contains(strings.Join(mounts[0].Options, " "), "lowerdir="+m.cfg.Root+"/images/") {
		t.Errorf("in the new epoch a container stands on %v", mounts)
	}
}

// A pull whose contents fill the pool completely succeeds, and its containers start.
func TestPullFillsPool(t *testing.T) {
	slow.Skip(t, "fills four pools")
	for _, size := range []int{9 << 20, 10 << 20, 11 << 20, 12 << 20} {
		_, m := inside(t, flavours[1], func(c *config.Config) { c.Pool.Size = 16 << 20 })
		ctx := namespaces.WithNamespace(t.Context(), "default")
		var layers [][]file
		var files []file
		for i := range 8 {
			f := file{fmt.Sprintf("f%d", i), random(uint64(i), size/8)}
			layers, files = append(layers, []file{f}), append(files, f)
		}
		top, err := m.pull(ctx, true, layers...)
		m.must(err)
		mounts, err := m.sn.Prepare(ctx, "default/100/c", top)
		m.must(err)
		m.compare(mounts, files...)
	}
}

// A damaged or missing layer pack gives a clear error, never a wrong file.
func TestBadPack(t *testing.T) {
	for name, harm := range map[string]func(path string) error{
		"damaged": func(path string) error {
			raw, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			raw[len(raw)/2] ^= 1
			return os.WriteFile(path, raw, 0o600)
		},
		"cut":     func(path string) error { return os.Truncate(path, 1000) },
		"missing": os.Remove,
	} {
		t.Run(name, func(t *testing.T) {
			cl, m := inside(t, flavours[1], func(*config.Config) {})
			ctx := namespaces.WithNamespace(t.Context(), "default")
			top, err := m.pull(ctx, true, []file{{"a", random(1, 100_000)}})
			m.must(err)
			m.must(cl.sn.Flush(ctx))
			paths, err := filepath.Glob(filepath.Join(m.cfg.Root, "packs", "*"))
			if err != nil || len(paths) != 1 {
				t.Fatalf("packs %q, %v", paths, err)
			}
			cl.restart(m, func() { m.must(errors.Join(loseMemory(m.cfg), harm(paths[0]))) })
			_, err = m.sn.Prepare(ctx, "default/100/c", top)
			want := errdefs.IsDataLoss
			if name == "missing" {
				want = errdefs.IsNotFound
			}
			if !want(err) || !strings.Contains(err.Error(), "pull the image again") {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestUnreadableBlob(t *testing.T) {
	cl, m := inside(t, flavours[1], func(*config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	st := &streaming{m.sn, m.ap, m.store}
	desc, _, err := st.put(ctx, makeTar(file{"a", random(1, 100_000)}))
	m.must(err)
	mounts, err := m.sn.Prepare(ctx, "default/1/extract-1-x a", "", snapshots.WithLabels(map[string]string{
		"containerd.io/snapshot/diff-id": "sha256:" + strings.Repeat("0", 64),
	}))
	m.must(err)
	if _, err := m.ap.Apply(ctx, desc, mounts); !errdefs.IsDataLoss(err) ||
		!strings.Contains(err.Error(), "diff ID mismatch") {
		t.Errorf("a blob that is not the expected layer: %v", err)
	}
	m.must(os.Truncate(filepath.Join(m.dir, "content/blobs/sha256", desc.Digest.Encoded()), 50_000))
	if _, err := m.ap.Apply(ctx, desc, mounts); err == nil {
		t.Error("half a blob was applied")
	}
	m.must(m.sn.Remove(ctx, "default/1/extract-1-x a"))
	m.must(cl.settle(ctx))
	if n := len(cl.pool().Layers()); n != 0 {
		t.Errorf("%d layers were stored", n)
	}
	if u := cl.pool().Usage(); u.Extents != 0 {
		t.Errorf("%d bytes are left over", u.Extents)
	}
}

func TestSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "run", "s.sock")
	first, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	for p, mode := range map[string]os.FileMode{path: 0o600 | os.ModeSocket, filepath.Dir(path): 0o700 | os.ModeDir} {
		if st, err := os.Stat(p); err != nil || st.Mode() != mode {
			t.Errorf("%q: %v, %v; expected mode %s", p, st, err, mode)
		}
	}
	if _, err := listen(path); err == nil || !strings.Contains(err.Error(), "another process answers") {
		t.Errorf("a socket in use: %v", err)
	}
	first.Close() // like a killed process: the socket file stays
	again, err := listen(path)
	if err != nil {
		t.Fatalf("the socket of a dead process: %v", err)
	}
	defer again.Close()
	if conn, err := net.Dial("unix", path); err != nil {
		t.Error(err)
	} else {
		conn.Close()
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("beside the socket there is %v, %v", entries, err)
	}
	other := filepath.Join(dir, "file")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(other); err == nil {
		t.Error("a file that is no socket was replaced")
	}
}

func TestMetricsAndHealth(t *testing.T) {
	cl, m := inside(t, flavours[1], func(*config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	get := func(path string, pprof bool) (int, string) {
		w := httptest.NewRecorder()
		cl.metrics.handler(pprof).ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		return w.Code, w.Body.String()
	}
	_, before := get("/metrics", false)
	for _, want := range []string{
		`daxfs_phase_seconds_count{phase="build"} 0`, `daxfs_phase_failures_total{phase="stream"} 0`,
		"daxfs_build_info{",
		`daxfs_fallbacks_total{reason="full"} 0`, `daxfs_evictions_total{what="image"} 0`,
		`daxfs_mounts{driver="erofs-loop"} 0`,
	} {
		if !strings.Contains(before, want) {
			t.Errorf("before anything happened the metrics lack %q", want)
		}
	}
	top, err := m.pull(ctx, true, []file{{"a", random(1, 5000)}})
	m.must(err)
	for _, key := range []string{"default/100/c", "default/101/c"} {
		_, err = m.sn.Prepare(ctx, key, top)
		m.must(err)
	}
	m.must(cl.sn.Flush(ctx))
	code, text := get("/metrics", false)
	for _, want := range []string{
		`daxfs_images 1`, `daxfs_layers 1`, `daxfs_mounts{driver="erofs-loop"} 1`,
		`daxfs_pool_bytes{kind="extents"} 8192`,
		`daxfs_phase_seconds_count{phase="stream"} 1`, `daxfs_pool_saved_bytes 0`, `go_goroutines`,
		`,kind="own",name=""} 8192`,
		`daxfs_phase_seconds_count{phase="build"} 1`, `daxfs_phase_seconds_count{phase="prepare"} 3`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("status %d, metrics lack %q", code, want)
		}
	}
	if code, text := get("/healthz", false); code != http.StatusOK || text != "ok\n" {
		t.Errorf("health: %d %q", code, text)
	}
	if code, _ := get("/debug/pprof/cmdline", false); code != http.StatusNotFound {
		t.Errorf("pprof although it is off: %d", code)
	}
	if code, _ := get("/debug/pprof/cmdline", true); code != http.StatusOK {
		t.Errorf("pprof: %d", code)
	}
}

func TestKinds(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want func(error) bool
	}{
		{&pool.FullError{What: "extent", Need: 2, Have: 1}, errdefs.IsResourceExhausted},
		{fmt.Errorf("write: %w", syscall.ENOSPC), errdefs.IsResourceExhausted},
		{pool.ErrCorrupt, errdefs.IsDataLoss},
		{fmt.Errorf("x: %w", errdefs.ErrNotFound), errdefs.IsNotFound},
		{fmt.Errorf("x: %w: %w", pool.ErrNotFound, errdefs.ErrAlreadyExists), errdefs.IsAlreadyExists},
	} {
		if got := toErrdefs(tc.err); !tc.want(got) || !errors.Is(got, tc.err) {
			t.Errorf("%v became %v", tc.err, got)
		}
	}
	if err := toErrdefs(context.Canceled); err != context.Canceled || toErrdefs(nil) != nil {
		t.Errorf("%v", err)
	}
}

// A differ must ask containerd in the namespace of its caller, and cannot without one.
func TestBlobsNeedNamespace(t *testing.T) {
	b, err := dialBlobs(filepath.Join(t.TempDir(), "nobody.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := b.ReaderAt(t.Context(), ocispec.Descriptor{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without a namespace: %v", err)
	}
	if _, err := b.ReaderAt(namespaces.WithNamespace(t.Context(), "x"),
		ocispec.Descriptor{}); !errdefs.IsUnavailable(err) {
		t.Errorf("without containerd: %v", err)
	}
}
