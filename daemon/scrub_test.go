package daemon

import (
	"bytes"
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/daxfs/daxfs-snapshotter/config"
)

// harm flips a bit in the middle of contents of the pool.
func (c *client) harm(t *testing.T, body []byte) {
	t.Helper()
	r := c.pool().Region()
	page := make([]byte, 4096)
	for off := int64(0); off < r.Size(); off += int64(len(page)) {
		if _, err := r.ReadAt(page, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(page, body[:len(page)]) {
			continue
		}
		at := off + int64(len(body)/2)
		if _, err := r.WriteAt([]byte{body[len(body)/2] ^ 4}, at); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatal("the pool does not hold the contents")
}

// run mounts a new container's root file system until the test ends or stop is called.
func (m *machine) run(ctx context.Context, key, parent string) (dir, lower string, stop func()) {
	m.t.Helper()
	mounts, err := m.sn.Prepare(ctx, key, parent)
	m.must(err)
	for _, o := range mounts[0].Options {
		if rest, ok := strings.CutPrefix(o, "lowerdir="); ok {
			lower = rest
		}
	}
	dir = m.t.TempDir()
	m.must(cmount.All(mounts, dir))
	done := false
	stop = func() {
		if !done {
			done = true
			m.must(cmount.UnmountAll(dir, 0))
			m.must(m.sn.Remove(context.WithoutCancel(ctx), key))
		}
	}
	m.t.Cleanup(stop)
	return dir, lower, stop
}

// offer puts a layer into containerd's content store.
func (m *machine) offer(ctx context.Context, store content.Store, tar []byte) {
	m.t.Helper()
	desc, diffID, err := (&streaming{store: store}).put(ctx, tar)
	m.must(err)
	_, err = store.Update(ctx, content.Info{Digest: desc.Digest, Labels: map[string]string{
		labels.LabelUncompressed: diffID.String(),
	}}, "labels."+labels.LabelUncompressed)
	m.must(err)
}

func (m *machine) holds(dir string, f file) {
	m.t.Helper()
	got, err := os.ReadFile(filepath.Join(dir, f.name))
	if err != nil || !bytes.Equal(got, f.body) {
		m.t.Errorf("%q is not what was pulled: %v", f.name, err)
	}
}

// Contents that change under a running pool are found, and made again from what there is. Containers of other images go
// on, new ones get what was pulled, and what is damaged goes with the last container that stands on it.
func TestScrub(t *testing.T) {
	for _, c := range []struct {
		name   string
		f      flavour
		stream bool
	}{
		{"blob", flavours[0], true},
		{"pack", flavours[1], true},
		{"directory", flavours[1], false},
		{"pack and fuse", flavours[2], true},
	} {
		t.Run(c.name, func(t *testing.T) {
			address := filepath.Join(t.TempDir(), "c.sock")
			cl, m := inside(t, c.f, func(cfg *config.Config) { cfg.Containerd.Address = address })
			ctx := namespaces.WithNamespace(t.Context(), "default")
			a, b, both := file{"a", random(1, 300_000)}, file{"b", random(2, 50_000)}, file{"both", random(3, 9000)}
			if c.name == "blob" {
				m.offer(ctx, serveContents(t, m, address), makeTar(a, both))
			}
			first, err := m.pull(ctx, c.stream, []file{a, both})
			m.must(err)
			second, err := m.pull(ctx, true, []file{b, both})
			m.must(err)
			m.must(cl.sn.Flush(ctx))
			_, damaged, stopOld := m.run(ctx, "default/100/c", first)
			other, _, stopOther := m.run(ctx, "default/101/c", second)

			if got, err := cl.scrub(ctx, 0); err != nil || len(got.Findings) > 0 || got.Bytes == 0 {
				t.Fatalf("before any harm: %+v, %v", got, err)
			}
			cl.harm(t, a.body)
			got, err := cl.scrub(ctx, 0)
			if err != nil || len(got.Findings) != 1 || got.Damaged != 1 || got.Lost != "" {
				t.Fatalf("one flip: %+v, %v", got, err)
			}
			m.must(cl.Healthy(ctx))
			dir, lower, stopNew := m.run(ctx, "default/102/c", first)
			if lower == damaged {
				t.Errorf("a new container stands on %q, which is damaged", lower)
			}
			m.holds(dir, a)
			m.holds(dir, both)
			m.holds(other, b)
			m.holds(other, both)
			if got, err := cl.scrub(ctx, 0); err != nil || got.Damaged != 0 || len(got.Findings) != 1 {
				t.Errorf("scrubbed again: %+v, %v", got, err)
			}
			stopOld()
			stopNew()
			stopOther()
			m.must(cl.purge(ctx))
			if d := cl.pool().Damaged(); len(d) > 0 {
				t.Errorf("damaged and in the pool without an image: %+v", d)
			}
		})
	}
}

// Health and metrics tell of what is damaged for good; pulling it again mends it.
func TestScrubLost(t *testing.T) {
	cl, m := inside(t, flavours[0], func(c *config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	a := file{"a", random(1, 300_000)}
	top, err := m.pull(ctx, true, []file{a})
	m.must(err)
	m.must(cl.sn.Flush(ctx))
	_, damaged, _ := m.run(ctx, "default/100/c", top)
	cl.harm(t, a.body)
	got, err := cl.scrub(ctx, 0)
	if err != nil || len(got.Findings) != 1 || !strings.Contains(got.Lost, "pull the image again") {
		t.Fatalf("%+v, %v", got, err)
	}
	if err := cl.Healthy(ctx); err == nil || !strings.Contains(err.Error(), "damaged contents") {
		t.Errorf("health: %v", err)
	}
	if text := scrape(t, cl); !strings.Contains(text, "daxfs_pool_damaged_files 1\n") {
		t.Error("the metrics do not tell of it")
	}
	refused := func() {
		t.Helper()
		_, err := m.sn.Prepare(ctx, "default/101/c", top)
		if err == nil || !strings.Contains(err.Error(), "pull the image again") {
			t.Errorf("a container of it: %v", err)
		}
	}
	refused()
	cl.restart(m, func() {})
	refused()
	again, err := m.pull(ctx, true, []file{a})
	m.must(err)
	dir, lower, _ := m.run(ctx, "default/102/c", again)
	m.holds(dir, a)
	if lower == damaged {
		t.Errorf("it stands on %q, which is damaged", lower)
	}
	if err := cl.Healthy(ctx); err != nil {
		t.Errorf("health: %v", err)
	}
}

func scrape(t *testing.T, cl *client) string {
	t.Helper()
	w := httptest.NewRecorder()
	cl.metrics.handler(false).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusOK {
		t.Fatal(w.Code)
	}
	return w.Body.String()
}
