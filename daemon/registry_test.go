package daemon

import (
	"bytes"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/daemon/api"
	"github.com/daxfs/daxfs-snapshotter/internal/slow"
	"github.com/daxfs/daxfs-snapshotter/store"
)

// hub is a registry in this process, with one image.
type hub struct {
	t    *testing.T
	ref  name.Reference
	asks atomic.Int64
}

func newHub(t *testing.T) *hub {
	t.Helper()
	h := &hub{t: t}
	reg := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.asks.Add(1)
		reg.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	var err error
	if h.ref, err = name.ParseReference(strings.TrimPrefix(srv.URL, "http://") + "/some/image:tag"); err != nil {
		t.Fatal(err)
	}
	return h
}

// push replaces the image by one with these layers.
func (h *hub) push(tars ...[]byte) {
	h.t.Helper()
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{Architecture: runtime.GOARCH, OS: "linux"})
	for _, tar := range tars {
		var l v1.Layer
		if err == nil {
			l, err = tarball.LayerFromOpener(func() (io.ReadCloser,
				error,
			) {
				return io.NopCloser(bytes.NewReader(tar)), nil
			})
		}
		if err == nil {
			img, err = mutate.AppendLayers(img, l)
		}
	}
	if err == nil {
		err = remote.Write(h.ref, img)
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// A damaged image is restored from the registry if the configuration allows that and nothing else has
// its layers. The current target of the image's name must have a layer with that diff ID, or the image stays lost.
func TestScrubRegistry(t *testing.T) {
	slow.Skip(t, "damages three pools; TestScrub remains")
	for _, c := range []struct {
		name string
		on   bool
		move bool // move the tag before the damage is found
		lost string
	}{
		{"restored", true, false, ""},
		{"off", false, false, "layers.registries"},
		{"moved tag", true, true, "has no layer sha256:"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cl, m := inside(t, flavours[0], func(cfg *config.Config) { cfg.Layers.Registries = c.on })
			ctx := namespaces.WithNamespace(t.Context(), "default")
			h := newHub(t)
			base, a, b := file{"base", random(3, 9000)}, file{"a", random(1, 300_000)}, file{"b", random(2, 50_000)}
			h.push(makeTar(base), makeTar(a))
			out, err := cl.put(ctx, api.PinRequest{Name: "pin", Source: "docker://" + h.ref.Name()})
			m.must(err)
			t.Cleanup(func() { m.must(cl.store.Unpin("pin")) })
			info := out.(store.Info)
			second, err := m.pull(ctx, true, []file{b})
			m.must(err)
			m.must(cl.sn.Flush(ctx))
			other, _, _ := m.run(ctx, "default/101/c", second)
			if c.move {
				h.push(makeTar(base), makeTar(b))
			}
			before := h.asks.Load()
			cl.harm(t, a.body)
			got, err := cl.scrub(ctx, 0)
			if err != nil || len(got.Findings) != 1 || (got.Lost != "") != (c.lost != "") ||
				!strings.Contains(got.Lost, c.lost) {
				t.Fatalf("%+v, %v", got, err)
			}
			if asked := h.asks.Load() > before; asked != c.on {
				t.Errorf("the registry was asked: %v", asked)
			}
			m.holds(other, b)
			if c.lost != "" {
				if err := cl.Healthy(ctx); err == nil {
					t.Error("healthy, with an image that is lost")
				}
				return
			}
			m.must(cl.Healthy(ctx))
			img := store.Image{Key: info.Key, Holder: "pin/pin"}
			for _, l := range info.Layers {
				img.Layers = append(img.Layers, store.Layer{Key: l})
			}
			dir, err := cl.store.Lower(ctx, img)
			m.must(err)
			m.holds(dir, base)
			m.holds(dir, a)
		})
	}
}
