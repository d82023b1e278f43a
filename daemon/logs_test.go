package daemon

import (
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"

	"github.com/daxfs/daxfs-snapshotter/config"
)

// logged collects log lines.
type logged struct {
	mu      sync.Mutex
	entries []*logrus.Entry
}

// hearLog collects log lines until the test ends.
func hearLog(t *testing.T) *logged {
	t.Helper()
	h := &logged{}
	old := log.L.Logger.ReplaceHooks(logrus.LevelHooks{})
	log.L.Logger.AddHook(h)
	t.Cleanup(func() { log.L.Logger.ReplaceHooks(old) })
	return h
}

func (h *logged) Levels() []logrus.Level {
	return []logrus.Level{logrus.ErrorLevel, logrus.WarnLevel, logrus.InfoLevel}
}

func (h *logged) Fire(e *logrus.Entry) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.entries = append(h.entries, e)
	return nil
}

// takeAll returns all collected lines and forgets them.
func (h *logged) takeAll() []*logrus.Entry {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := h.entries
	h.entries = nil
	return all
}

// take returns the lines with a message, and forgets all lines.
func (h *logged) take(message string) []*logrus.Entry {
	return slices.DeleteFunc(h.takeAll(), func(e *logrus.Entry) bool { return e.Message != message })
}

// Each image, failure, fallback, eviction and removal is one log line.
func TestLogLines(t *testing.T) {
	heard := hearLog(t)
	cl, m := inside(t, flavours[0], func(c *config.Config) { c.Pool.Size = 16 << 20 })
	ctx := namespaces.WithNamespace(t.Context(), "default")
	shared := file{"shared", random(1, 1<<20)}
	top, err := m.pull(ctx, true, []file{shared}, []file{{"own", random(2, 5000)}})
	m.must(err)
	for _, key := range []string{"default/100/c", "default/101/c"} {
		_, err = m.sn.Prepare(ctx, key, top)
		m.must(err)
	}
	m.must(cl.sn.Flush(ctx))
	lines := heard.take("image added to the pool and mounted")
	if len(lines) != 1 {
		t.Fatalf("%d lines say that an image was made, expected 1", len(lines))
	}
	data := lines[0].Data
	for _, key := range []string{"image", "name", "layers", "bytes", "new", "read", "build", "mount", "driver"} {
		if _, ok := data[key]; !ok {
			t.Errorf("the line lacks %q: %v", key, data)
		}
	}
	contents := int64(1<<20 + 8192)
	if data["layers"] != 2 || data["bytes"].(int64) < contents || data["new"] != data["bytes"] {
		t.Errorf("%v; expected 2 layers and %d bytes of contents, all of them new", data, contents)
	}

	// Contents of an earlier image are not new.
	second, err := m.pull(ctx, true, []file{shared, {"other", random(3, 5000)}})
	m.must(err)
	_, err = m.sn.Prepare(ctx, "default/102/c", second)
	m.must(err)
	lines = heard.take("image added to the pool and mounted")
	if len(lines) != 1 || lines[0].Data["new"].(int64) >= 1<<20 || lines[0].Data["bytes"].(int64) < contents {
		t.Errorf("%v; expected that most of %d bytes are not new", lines, contents)
	}

	// An unreadable layer.
	st := &streaming{m.sn, m.ap, m.store}
	desc, diffID, err := st.put(ctx, makeTar(file{"a", random(4, 100_000)}))
	m.must(err)
	mounts, err := m.sn.Prepare(ctx, "default/1/extract-1-x a", "", snapshots.WithLabels(map[string]string{
		"containerd.io/snapshot/diff-id": diffID.String(),
	}))
	m.must(err)
	m.must(os.Truncate(filepath.Join(m.dir, "content/blobs/sha256", desc.Digest.Encoded()), 50_000))
	heard.take("")
	_, err = m.ap.Apply(ctx, desc, mounts)
	if lines := heard.take("call failed"); err == nil || len(lines) != 1 || lines[0].Data["call"] != "Apply" ||
		lines[0].Data["layer"] != desc.Digest.String() || lines[0].Data[logrus.ErrorKey] == nil {
		t.Errorf("failed Apply (%v): lines %v", err, lines)
	}
	m.must(m.sn.Remove(ctx, "default/1/extract-1-x a"))
	// A negative answer is not a failure.
	if _, err := m.sn.Stat(ctx, "default/1/nothing"); err == nil || len(heard.take("call failed")) != 0 {
		t.Errorf("Stat of nothing: %v", err)
	}

	// An evicted image, and a removed one.
	m.must(m.sn.Remove(ctx, "default/102/c"))
	third, err := m.pull(ctx, false, []file{{"large", random(5, 8<<20)}})
	m.must(err)
	_, err = m.sn.Prepare(ctx, "default/103/c", third)
	m.must(err)
	m.must(m.sn.Remove(ctx, "default/103/c"))
	m.must(cl.sn.Flush(ctx))
	heard.take("")
	fourth, err := m.pull(ctx, false, []file{{"large", random(6, 8<<20)}})
	m.must(err)
	_, err = m.sn.Prepare(ctx, "default/104/c", fourth)
	m.must(err)
	m.must(cl.sn.Flush(ctx)) // the background evicts, too
	evicted := heard.take("evicted an image to make room; it is made again when it is needed")
	if !slices.ContainsFunc(evicted, func(e *logrus.Entry) bool { return e.Data["unshared"] == int64(8<<20) }) {
		t.Errorf("evictions %v, expected one of 8 MiB", evicted)
	}
	for _, key := range []string{"default/100/c", "default/101/c", top} {
		m.must(m.sn.Remove(ctx, key))
	}
	m.must(cl.settle(ctx))
	if n := len(heard.take("removed an image that nothing holds")); n != 1 {
		t.Errorf("%d lines say that an image was removed, expected 1", n)
	}
}
