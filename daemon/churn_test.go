package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/config"
)

// Several namespaces concurrently pull, run and remove the same few images, streamed and unpacked, in
// a pool too small for all of them, with cleanups in between. A container never sees a file of another image.
func TestChurn(t *testing.T) {
	const namespaceCount, imageCount = 4, 3
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	for _, f := range fewFlavours(2) {
		t.Run(f.name, func(t *testing.T) {
			cl, m := inside(t, f, func(c *config.Config) {
				c.Pool.Size = 24 << 20
			})
			// Image i has a layer common to all images, then one of its own.
			base := file{"base", random(99, 2<<20)}
			var own []file
			for i := range imageCount {
				own = append(own, file{fmt.Sprintf("own%d", i), random(uint64(i), 3<<20)})
			}
			var wg sync.WaitGroup
			errs := make([]error, namespaceCount)
			for n := range namespaceCount {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(n), 7))
					u := &churner{client: cl, m: m, ns: fmt.Sprintf("ns%d", n)}
					ctx := namespaces.WithNamespace(t.Context(), u.ns)
					for round := range rounds {
						files := []file{base, own[rng.IntN(imageCount)]}
						if err := u.cycle(ctx, rng, files); err != nil {
							errs[n] = fmt.Errorf("namespace %d, round %d: %w", n, round, err)
							return
						}
					}
				})
			}
			wg.Wait()
			if err := errors.Join(errs...); err != nil {
				t.Fatal(err)
			}
			if err := cl.settle(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// churner is one namespace of a client.
type churner struct {
	*client
	m     *machine
	ns    string
	seq   int
	names []string // its snapshots, bottom first
}

func (u *churner) name(key string) string {
	u.seq++
	return fmt.Sprintf("%s/%d/%s", u.ns, u.seq, key)
}

// cycle pulls an image of one file for each layer, runs it, and removes it.
func (u *churner) cycle(ctx context.Context, rng *rand.Rand, files []file) error {
	stream := rng.IntN(2) == 0
	st := &streaming{u.remote, u.applier, u.m.store}
	parent, id := "", digest.Digest("")
	u.names = nil
	for _, f := range files {
		tar := makeTar(f)
		if id = digest.FromString(string(id) + " " + digest.FromBytes(tar).String()); parent == "" {
			id = digest.FromBytes(tar)
		}
		key, name := u.name("extract-1-x "+id.String()), u.name(id.String())
		if stream {
			desc, diffID, err := st.put(ctx, tar)
			if err != nil && !errdefs.IsAlreadyExists(err) {
				return fmt.Errorf("put: %w", err)
			}
			if err := st.unpack(ctx, desc, diffID, name, key, parent); err != nil {
				return fmt.Errorf("stream: %w", err)
			}
		} else if err := u.m.walk(ctx, name, key, parent, []file{f}); err != nil {
			return fmt.Errorf("walk: %w", err)
		}
		u.names, parent = append(u.names, name), name
	}
	time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
	if rng.IntN(3) > 0 {
		c := u.name("container")
		mounts, err := u.remote.Prepare(ctx, c, parent)
		switch {
		case errdefs.IsResourceExhausted(err): // others use all of the pool
		case err != nil:
			return fmt.Errorf("prepare: %w", err)
		default:
			u.names = append(u.names, c)
			if err := mount.WithTempMount(ctx, mounts,
				func(root string) error { return compareTree(root, files) }); err != nil {
				return fmt.Errorf("stream=%v %v: %w", stream, mounts, err)
			}
		}
	}
	for i := range u.names {
		if err := u.remote.Remove(ctx, u.names[len(u.names)-1-i]); err != nil {
			return fmt.Errorf("remove: %w", err)
		}
	}
	if rng.IntN(2) == 0 {
		return u.remote.(snapshots.Cleaner).Cleanup(ctx)
	}
	return nil
}
