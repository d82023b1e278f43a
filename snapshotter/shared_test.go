package snapshotter_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// fakeShared has images of some chains, each a directory.
type fakeShared struct {
	root string

	mu      sync.Mutex
	images  map[digest.Digest]bool
	claimed map[digest.Digest]bool
}

var _ snapshotter.Shared = (*fakeShared)(nil)

func newFakeShared(t *testing.T) *fakeShared {
	return &fakeShared{root: t.TempDir(), images: map[digest.Digest]bool{}, claimed: map[digest.Digest]bool{}}
}

func (f *fakeShared) add(t *testing.T, chain string, files ...string) {
	t.Helper()
	for _, name := range files {
		path := filepath.Join(f.dir(digest.Digest(chain)), name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.images[digest.Digest(chain)] = true
}

func (f *fakeShared) dir(chain digest.Digest) string {
	return filepath.Join(f.root, chain.Encoded()[:8])
}

func (f *fakeShared) Claim(_ context.Context, chain digest.Digest) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.images[chain] {
		return fmt.Errorf("chain %s: %w", chain, errdefs.ErrNotFound)
	}
	f.claimed[chain] = true
	return nil
}

func (f *fakeShared) Lower(ctx context.Context, chain digest.Digest) (string, error) {
	return f.dir(chain), f.Claim(ctx, chain)
}

func (f *fakeShared) Sweep(_ context.Context, needed func(digest.Digest) bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for chain := range f.claimed {
		if !needed(chain) {
			delete(f.claimed, chain)
		}
	}
	return nil
}

// claims lists the claimed chains by the first letter of their digests.
func (f *fakeShared) claims() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := ""
	for _, c := range "abcdef" {
		if f.claimed[digest.Digest("sha256:"+strings.Repeat(string(c), 64))] {
			out += string(c)
		}
	}
	return out
}

// claim prepares a chain like containerd's unpacker, and returns the snapshot that containerd then finds for it.
func (e *env) claim(namespace, chain, parent string) string {
	e.t.Helper()
	_, err := e.Prepare(e.t.Context(), namespace+"/7/extract-1-abcd "+chain, parent,
		labels(snapshots.LabelSnapshotRef, chain))
	if !errdefs.IsAlreadyExists(err) {
		e.t.Fatalf("claim of %s: %v, expected that it exists", chain, err)
	}
	name := e.found(namespace, chain, parent)
	if name == "" {
		e.t.Fatalf("containerd finds no snapshot of the claimed chain %s over %q", chain, parent)
	}
	return name
}

// found returns the snapshot that containerd takes for a chain in a namespace after Prepare reported that it exists.
func (e *env) found(namespace, chain, parent string) (name string) {
	e.t.Helper()
	e.must(e.Walk(namespaces.WithNamespace(e.t.Context(), namespace), func(_ context.Context, i snapshots.Info) error {
		if name == "" && i.Kind == snapshots.KindCommitted && i.Labels[snapshots.LabelSnapshotRef] == chain &&
			i.Parent == parent {
			name = i.Name
		}
		return nil
	}, fmt.Sprintf("labels.%q==%s,parent==%q", snapshots.LabelSnapshotRef, chain, parent)))
	return name
}

const chainC = "sha256:cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"

func TestClaim(t *testing.T) {
	shared := newFakeShared(t)
	shared.add(t, chainA, "a")
	shared.add(t, chainB, "a", "b")
	e := newEnv(t, snapshotter.Options{Shared: shared})
	a := e.claim("default", chainA, "")
	b := e.claim("default", chainB, a)
	if a != chainA || b != chainB {
		t.Errorf("claimed snapshots are %q and %q, expected the chain IDs", a, b)
	}
	if again := e.claim("other", chainA, ""); again != a {
		t.Errorf("another namespace is given %q, expected %q", again, a)
	}
	c := e.prepare("default/8/c", b)
	e.expectFiles(c, "a b")
	if got := option(c, "lowerdir"); got != shared.dir(chainB) {
		t.Errorf("the container stands on %q, expected the shared image %q", got, shared.dir(chainB))
	}
	if u, err := e.Usage(t.Context(), b); err != nil || u.Size != 0 {
		t.Errorf("usage of a claimed snapshot: %+v, %v", u, err)
	}
	if info, err := e.Stat(t.Context(), b); err != nil || info.Parent != a || info.Kind != snapshots.KindCommitted {
		t.Errorf("stat of a claimed snapshot: %+v, %v", info, err)
	}
	// A chain in no pool is prepared as usual. Without the label, or for a view, nothing is claimed.
	e.layer("default/9/"+chainC, b, "c", labels(snapshots.LabelSnapshotRef, chainC))
	e.prepare("default/10/extract-1-x "+chainA, "")
	if _, err := e.View(t.Context(), "default/11/v", "", labels(snapshots.LabelSnapshotRef, chainA)); err != nil {
		t.Errorf("view: %v", err)
	}
	v, err := e.View(t.Context(), "default/12/v", "default/9/"+chainC)
	e.must(err)
	e.expectFiles(v, "a b c")

	// The same chain over another parent is another snapshot.
	e.layer("default/13/mine", "", "m")
	if over := e.claim("default", chainA, "default/13/mine"); over == a {
		t.Errorf("%q was given for another parent", over)
	}

	// Claims end with the last snapshot that needs them.
	shared.mu.Lock()
	clear(shared.claimed)
	shared.mu.Unlock()
	e.restart()
	e.eventually(func() string {
		if got := shared.claims(); got != "ab" {
			return fmt.Sprintf("after a restart %q are claimed", got)
		}
		return ""
	})
	for _, name := range []string{
		"default/12/v", "default/11/v", "default/10/extract-1-x " + chainA,
		"default/9/" + chainC,
	} {
		e.must(e.Remove(t.Context(), name))
	}
	e.must(e.Cleanup(t.Context()))
	if got := shared.claims(); got != "ab" {
		t.Errorf("%q are claimed", got)
	}
	e.must(mount.WithTempMount(t.Context(), c, func(string) error {
		e.must(e.Remove(t.Context(), "default/8/c"))
		e.must(e.Remove(t.Context(), b))
		e.must(e.Cleanup(t.Context()))
		if got := shared.claims(); got != "ab" {
			t.Errorf("while a container of a removed image is mounted %q are claimed", got)
		}
		return nil
	}))
	e.must(e.Cleanup(t.Context()))
	if got := shared.claims(); got != "a" {
		t.Errorf("after its end %q are claimed", got)
	}
}

// A layer above a claimed chain becomes a directory, in every way of unpacking.
func TestLayerOverClaim(t *testing.T) {
	for _, parallel := range []bool{false, true} {
		t.Run(fmt.Sprintf("parallel %v", parallel), func(t *testing.T) {
			shared := newFakeShared(t)
			shared.add(t, chainA, "a", "gone", "d/x")
			e := newEnv(t, snapshotter.Options{Shared: shared})
			p := newPull(e)
			a := e.claim("default", chainA, "")
			over := func(name, parent string, parentName string, tar []byte) {
				t.Helper()
				desc := p.put(tar)
				key := "default/9/extract-1-abcd " + name
				opts := []snapshots.Opt{labels(snapshots.LabelSnapshotRef, name, labelDiffID, desc.Digest.String())}
				under, commit := parentName, opts
				if parallel {
					opts = []snapshots.Opt{labels(snapshots.LabelSnapshotRef, name, labelDiffID, desc.Digest.String(),
						"containerd.io/snapshot/parent-chain-id", parent)}
					under, commit = "", append(opts, snapshots.WithParent(parentName))
				}
				m := e.prepare(key, under, opts...)
				got, err := p.Apply(t.Context(), desc, m)
				e.must(err)
				if got.Digest != desc.Digest {
					t.Errorf("applied %s, expected %s", got.Digest, desc.Digest)
				}
				e.must(e.Commit(t.Context(), "default/9/"+name, key, commit...))
			}
			over(chainB, chainA, a, tarOf("b", ".wh.gone"))
			over(chainC, chainB, "default/9/"+chainB, tarOf("c"))
			c := e.prepare("default/8/c", "default/9/"+chainC)
			e.expectFiles(c, "a b c d")
			if dirs := strings.Split(option(c, "lowerdir"), ":"); len(dirs) != 3 || dirs[2] != shared.dir(chainA) {
				t.Errorf("the container stands on %q, expected two directories over the shared image", dirs)
			}
			e.must(e.Flush(t.Context()))
			e.restart()
			again, err := e.Mounts(t.Context(), "default/8/c")
			if err != nil || fmt.Sprint(again) != fmt.Sprint(c) {
				t.Errorf("after a restart %v, %v, before %v", again, err, c)
			}
			// A container's changes are a layer, too.
			e.must(os.WriteFile(filepath.Join(option(c, "upperdir"), "w"), nil, 0o644))
			e.must(e.Commit(t.Context(), "default/10/mine", "default/8/c"))
			e.expectFiles(e.prepare("default/11/d", "default/10/mine"), "a b c d w")
			e.must(e.Flush(t.Context()))
			if s := e.fake.state(); len(s.builds)+len(s.layers)+len(e.fallbacks()) > 0 {
				t.Errorf("images %v were built, layers %v stored, and fallbacks %q counted", s.builds, s.layers,
					e.fallbacks())
			}
			e.must(e.check())
		})
	}
}

// The first layer of another OCI image is streamed while a container stands on a shared image.
func TestStreamBesideClaim(t *testing.T) {
	shared := newFakeShared(t)
	shared.add(t, chainA, "a")
	e := newEnv(t, snapshotter.Options{Shared: shared})
	e.prepare("default/8/c", e.claim("default", chainA, ""))
	p := newPull(e)
	p.stream("default/1/"+chainB, "", tarOf("b"))
	e.must(e.Flush(t.Context()))
	for key := range e.fake.state().layers {
		if !strings.HasPrefix(key, "blob/") {
			t.Errorf("layer %q was stored, expected one that was streamed", key)
		}
	}
	if n := len(e.fake.state().layers); n != 1 {
		t.Errorf("%d layers were stored, expected one", n)
	}
	e.expectFiles(e.prepare("default/9/c", "default/1/"+chainB), "b")
}

// A client cannot give others its own snapshot by labelling it.
func TestPlantedReference(t *testing.T) {
	shared := newFakeShared(t)
	e := newEnv(t, snapshotter.Options{Shared: shared})
	e.layer("evil/1/"+chainA, "", "planted", labels(snapshots.LabelSnapshotRef, chainA))
	e.layer("evil/2/x", "", "planted")
	_, err := e.Update(t.Context(),
		snapshots.Info{Name: "evil/2/x", Labels: map[string]string{snapshots.LabelSnapshotRef: chainA}})
	e.must(err)
	if name := e.found("default", chainA, ""); name != "" {
		t.Errorf("containerd would take %q for the chain", name)
	}
	shared.add(t, chainA, "right")
	e.expectFiles(e.prepare("good/3/c", e.claim("good", chainA, "")), "right")
}

// Starting a container on a pool that is gone or no longer configured fails with the name of the pool.
func TestClaimLost(t *testing.T) {
	shared := newFakeShared(t)
	shared.add(t, chainA, "a")
	e := newEnv(t, snapshotter.Options{Shared: shared})
	a := e.claim("default", chainA, "")
	shared.mu.Lock()
	clear(shared.images)
	shared.mu.Unlock()
	if _, err := e.Prepare(t.Context(), "default/8/c", a); !errdefs.IsNotFound(err) ||
		!strings.Contains(err.Error(), "pull it") {
		t.Errorf("image that is gone: %v", err)
	}
	e.opts.Shared = nil
	e.restart()
	if _, err := e.Prepare(t.Context(), "default/8/c", a); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("no shared pool is configured: %v", err)
	}
	e.must(e.Remove(t.Context(), a))
}
