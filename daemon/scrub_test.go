package daemon

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// harm flips a bit in the middle of contents in the pool. It searches from the end, where a pool has its
// first contents.
func (c *client) harm(t *testing.T, body []byte) {
	t.Helper()
	r := c.pool().Region()
	page := make([]byte, 4096)
	for off := r.Size() - int64(len(page)); off >= 0; off -= int64(len(page)) {
		if _, err := r.ReadAt(page, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(page, body[:len(page)]) {
			continue
		}
		flipBit(t, r, off+int64(len(body)/2), 2)
		return
	}
	t.Fatal("the pool does not hold the contents")
}

// run mounts the root file system of a new container until the test ends or stop is called.
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

// Contents that change in a running pool are found and restored. Containers of other images continue,
// new ones get the original contents, and the damaged ones are freed with the last container on them.
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
			if c.name != "blob" {
				slow.Skip(t, "damages a pool, for each kind of source")
			}
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

// Health and metrics report contents that stay damaged; a new pull repairs them.
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

// The loop finds changes while the daemon runs, and does nothing if the configuration turns it off.
func TestScrubLoop(t *testing.T) {
	cl, m := inside(t, flavours[1], func(*config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	a := file{"a", random(1, 300_000)}
	_, err := m.pull(ctx, true, []file{a})
	m.must(err)
	m.must(cl.sn.Flush(ctx))
	cl.harm(t, a.body)
	cl.scrubLoop(ctx, 0, 0, 0)
	if d := cl.pool().Damaged(); len(d) > 0 {
		t.Errorf("found without a scrub: %+v", d)
	}
	lctx, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		cl.scrubLoop(lctx, 1<<30, time.Millisecond, time.Millisecond)
	}()
	for deadline := time.Now().Add(patience); len(cl.pool().Damaged()) == 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	stop()
	<-done
	if d := cl.pool().Damaged(); len(d) != 1 {
		t.Errorf("damaged: %+v", d)
	}
}

// flipsEnv sets the number of flipped bits per daemon in TestScrubMany.
const flipsEnv = "DAXFS_TEST_FLIPS"

// Bits flip one after another in the contents of a running container's image. One scrub finds each,
// and nobody gets damaged contents. Containers of another image are not affected.
func TestScrubMany(t *testing.T) {
	flips := 12
	if s := os.Getenv(flipsEnv); s != "" {
		var err error
		if flips, err = strconv.Atoi(s); err != nil {
			t.Fatalf("%s: %v", flipsEnv, err)
		}
	}
	for _, f := range flavours[:2] {
		for done := 0; done < flips; done += mostFlips {
			t.Run(fmt.Sprintf("%s/%d", f.name, done), func(t *testing.T) {
				if f != flavours[0] {
					slow.Skip(t, "damages a pool, for each kind of pool")
				}
				scrubMany(t, f, min(flips-done, mostFlips), uint64(8+done))
			})
		}
	}
}

// mostFlips is the number of flipped bits per daemon: damaged images stay as long as the container
// runs, and each scrub reads all of them.
const mostFlips = 100

func scrubMany(t *testing.T, f flavour, flips int, seed uint64) {
	address := filepath.Join(t.TempDir(), "c.sock")
	cl, m := inside(t, f, func(cfg *config.Config) { cfg.Containerd.Address = address })
	ctx := namespaces.WithNamespace(t.Context(), "default")
	blobs := serveContents(t, m, address)
	other := file{"other", random(9, 200_000)}
	var files []file
	for i, size := range []int{1, 4096, 10_000, 300_000, 1 << 20} {
		files = append(files, file{fmt.Sprint(i), random(uint64(i), size)})
	}
	m.offer(ctx, blobs, makeTar(files...))
	first, err := m.pull(ctx, true, files)
	m.must(err)
	second, err := m.pull(ctx, true, []file{other})
	m.must(err)
	m.must(cl.sn.Flush(ctx))
	m.run(ctx, "default/100/c", first)
	dir, _, _ := m.run(ctx, "default/101/c", second)
	rng := rand.New(rand.NewPCG(7, seed))
	for i := range flips {
		victim := files[rng.IntN(len(files))]
		off := cl.place(t, victim.name)
		at := off + rng.Int64N((int64(len(victim.body))+4095)/4096*4096)
		flipBit(t, cl.pool().Region(), at, rng.IntN(8))
		got, err := cl.scrub(ctx, 0)
		if err != nil || got.Damaged != 1 || got.Lost != "" {
			t.Fatalf("flip %d, at %d: %+v, %v", i, at, got, err)
		}
		if now := cl.place(t, victim.name); now == off {
			t.Fatalf("flip %d: the image still leads to the contents at %d", i, off)
		}
		mounts, err := m.sn.Prepare(ctx, "default/102/c", first)
		m.must(err)
		m.compare(mounts, files...)
		m.must(m.sn.Remove(ctx, "default/102/c"))
		m.holds(dir, other)
	}
}

// place returns the offset in the pool of a file with that name, in the first image that has one.
func (c *client) place(t *testing.T, name string) int64 {
	t.Helper()
	r := c.pool().Region()
	live, err := daxfs.OpenLive(r, r.Size())
	if err != nil {
		t.Fatal(err)
	}
	for _, info := range c.store.Images() {
		img, err := live.Image(info.Slot)
		if err != nil {
			t.Fatal(err)
		}
		if st, err := img.Stat(name); err == nil {
			return st.Sys().(*daxfs.Stat).Off
		}
	}
	t.Fatalf("no image has %q", name)
	return 0
}

func flipBit(t *testing.T, r region.Region, at int64, bit int) {
	t.Helper()
	b := make([]byte, 1)
	if _, err := r.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1 << bit
	if _, err := r.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}
