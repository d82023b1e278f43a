package daemon

import (
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// held counts a daemon's resources other than garbage-collected memory.
type held struct{ goroutines, files int }

func (c *client) held(t *testing.T) held {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return held{runtime.NumGoroutine(), len(fds)}
}

// A daemon holds no more resources after many pulls, starts and removals than after few.
func TestHoldsNothing(t *testing.T) {
	slow.Skip(t, "serves 220 pulls")
	cl, m := inside(t, flavours[0], func(*config.Config) {})
	ctx := namespaces.WithNamespace(t.Context(), "default")
	serve := func(rounds int) {
		t.Helper()
		for i := range rounds {
			m.names += 10
			first := m.names + 1
			f := file{"f", random(uint64(i), 5000)}
			top, err := m.pull(ctx, i%2 == 0, []file{{"base", nil}}, []file{f})
			m.must(err)
			c := fmt.Sprintf("default/%d/c", m.names+1)
			mounts, err := m.sn.Prepare(ctx, c, top)
			m.must(err)
			if i%10 == 0 {
				m.compare(mounts, file{"base", nil}, f)
			}
			for _, name := range []string{c, top, fmt.Sprintf("default/%d/layer", first)} {
				m.must(m.sn.Remove(ctx, name))
			}
		}
		m.must(cl.settle(ctx))
	}
	serve(20)
	before := cl.held(t)
	serve(200)
	after := cl.held(t)
	for range 600 { // ended goroutines may take a moment to disappear
		if after.goroutines <= before.goroutines && after.files <= before.files {
			break
		}
		time.Sleep(100 * time.Millisecond)
		after = cl.held(t)
	}
	if after.goroutines > before.goroutines || after.files > before.files {
		t.Errorf("held %+v after 20 pulls, %+v after 200 more", before, after)
	}
}
