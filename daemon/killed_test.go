package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/internal/slow"
)

// rounds is how often the daemon is killed: DAXFS_TEST_CRASHES, or a number small enough for every run.
func rounds(t *testing.T) int {
	v := os.Getenv("DAXFS_TEST_CRASHES")
	switch {
	case v == "" && testing.Short():
		return 4
	case v == "":
		return 100
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("DAXFS_TEST_CRASHES: %v", err)
	}
	return n
}

// TestKilledAnywhere kills the daemon at random moments of its start, and of pulls, starts and
// removals by several clients. Afterwards everything is consistent and nothing is left over, and every
// committed snapshot shows its files.
func TestKilledAnywhere(t *testing.T) {
	rounds := rounds(t)
	for _, f := range flavours[:2] {
		t.Run(f.name, func(t *testing.T) {
			if f != flavours[0] {
				slow.Skip(t, "kills the daemon, for each kind of pool")
			}
			t.Parallel()
			m := newMachine(t, f)
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 0))
			clients := make([]*victim, 3)
			for n := range clients {
				clients[n] = &victim{m: m, ns: fmt.Sprintf("ns%d", n), rng: rand.New(rand.NewPCG(seed, uint64(n+1)))}
			}
			for range rounds {
				if rng.IntN(6) == 0 { // in the middle of its start
					m.launch()
					time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond)
					m.kill()
				}
				m.boot()
				// Count calls, so that slow and fast machines are killed at the same point; then wait up to 10 ms.
				var calls atomic.Int64
				last, delay := int64(1+rng.IntN(40)), time.Duration(rng.IntN(10_000))*time.Microsecond
				daemon := m.cmd.Process
				m.calls = func() {
					if calls.Add(1) == last {
						time.AfterFunc(delay, func() { daemon.Kill() })
					}
				}
				var wg sync.WaitGroup
				for _, v := range clients {
					wg.Go(v.untilKilled)
				}
				wg.Wait()
				m.calls = nil
				m.kill()
				if rng.IntN(2) == 0 { // otherwise the next daemon is the first to see the state
					m.verify()
				}
				for _, v := range clients {
					m.must(v.wrong)
				}
			}
			m.boot()
			cycles, survivors := 0, 0
			for _, v := range clients {
				cycles += v.cycles
				survivors += len(v.committed)
				if err := v.compareAll(); err != nil {
					t.Error(err)
				}
			}
			t.Logf("%d rounds, %d pulls ended before a kill, %d snapshots are left", rounds, cycles, survivors)
			if cycles == 0 {
				t.Error("no pull ended before a kill")
			}
			m.kill()
			m.verify()
			m.boot()
		})
	}
}

// victim is a client, with its own namespace, of a daemon that is killed.
type victim struct {
	m      *machine
	ns     string
	rng    *rand.Rand
	seq    int
	cycles int // completed ones
	// committed are the committed files, by name. The daemon may be killed between a commit or removal and
	// its answer; dying are the snapshots in that state. They may be gone, but not wrong.
	committed map[string][]file
	dying     map[string]bool
	wrong     error
}

// untilKilled pulls, runs and removes images until the daemon is gone.
func (v *victim) untilKilled() {
	if v.committed == nil {
		v.committed, v.dying = map[string][]file{}, map[string]bool{}
	}
	ctx := namespaces.WithNamespace(v.m.t.Context(), v.ns)
	for v.wrong == nil {
		if err := v.cycle(ctx); err != nil {
			if !errdefs.IsUnavailable(err) && !errdefs.IsCanceled(err) {
				v.wrong = fmt.Errorf("%s: an error that no kill explains: %w", v.ns, err)
			}
			return
		}
		v.cycles++
	}
}

func (v *victim) name(key string) string {
	v.seq++
	return fmt.Sprintf("%s/%d/%s", v.ns, v.seq, key)
}

// cycle pulls an image of two layers, which others may have too, runs it, and sometimes removes it.
func (v *victim) cycle(ctx context.Context) error {
	seed, size := v.rng.IntN(20), 1+v.rng.IntN(10_000)
	if seed < 4 {
		size = 2_300_000
	}
	files := []file{
		{fmt.Sprintf("f%d", v.rng.IntN(3)), random(uint64(seed), size)},
		{"own", fmt.Append(nil, v.rng.IntN(10))},
	}
	tops, err := v.pull(ctx, files)
	if err != nil {
		return err
	}
	container := v.name("container")
	mounts, err := v.m.sn.Prepare(ctx, container, tops[1])
	if err != nil {
		return err
	}
	if v.rng.IntN(4) == 0 {
		if err := mount.WithTempMount(ctx, mounts, func(root string) error {
			return errors.Join(compareTree(root, files),
				os.WriteFile(filepath.Join(root, "written"), []byte(container), 0o644))
		}); err != nil {
			return err
		}
		if v.rng.IntN(2) == 0 { // like nerdctl commit and build
			name := v.name("mine")
			v.committed[name], v.dying[name] = append(files[:2:2], file{"written", []byte(container)}), true
			if err := v.m.sn.Commit(ctx, name, container); err != nil {
				return err
			}
			delete(v.dying, name)
			return nil
		}
	}
	if v.rng.IntN(2) == 0 {
		return nil
	}
	for _, name := range []string{container, tops[1], tops[0]} {
		v.dying[name] = true
		if err := v.m.sn.Remove(ctx, name); err != nil {
			return err
		}
		delete(v.committed, name)
		delete(v.dying, name)
	}
	return v.m.sn.(snapshots.Cleaner).Cleanup(ctx)
}

// pull commits a layer per file, streamed or walked, and returns the names of the snapshots, bottom first.
func (v *victim) pull(ctx context.Context, files []file) (names []string, err error) {
	st := &streaming{v.m.sn, v.m.ap, v.m.store}
	stream := v.rng.IntN(2) == 0
	parent, id := "", digest.Digest("")
	for i, f := range files {
		tar := makeTar(f)
		if diffID := digest.FromBytes(tar); id == "" {
			id = diffID
		} else {
			id = digest.FromString(id.String() + " " + diffID.String())
		}
		key, name := v.name("extract-1-x "+id.String()), v.name(id.String())
		v.committed[name], v.dying[name] = files[:i+1], true
		if stream {
			desc, diffID, err := st.put(ctx, tar)
			if err != nil && !errdefs.IsAlreadyExists(err) {
				return nil, err
			}
			if err := st.unpack(ctx, desc, diffID, name, key, parent); err != nil {
				return nil, err
			}
		} else if err := v.m.walk(ctx, name, key, parent, []file{f}); err != nil {
			return nil, err
		}
		delete(v.dying, name)
		names, parent = append(names, name), name
	}
	return names, nil
}

// compareAll mounts every committed snapshot and compares its files.
func (v *victim) compareAll() error {
	ctx := namespaces.WithNamespace(v.m.t.Context(), v.ns)
	var errs []error
	for name, files := range v.committed {
		view := v.name("view")
		mounts, err := v.m.sn.View(ctx, view, name)
		if errdefs.IsNotFound(err) && v.dying[name] {
			continue
		}
		if err == nil {
			err = mount.WithTempMount(ctx, mounts, func(root string) error { return compareTree(root, files) })
			err = errors.Join(err, v.m.sn.Remove(ctx, view))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}
