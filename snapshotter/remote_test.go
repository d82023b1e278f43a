package snapshotter_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// fakeRemotes pulls layers of one file, which is named after the first letter of the chain ID.
type fakeRemotes struct {
	lowers *fakeLowers
	dir    string
	staged bool
	err    error
	asked  []snapshotter.Remote
}

func (f *fakeRemotes) Pull(_ context.Context, layer snapshotter.Remote) (snapshotter.Pulled, error) {
	pin := layer.Pin
	layer.Pin = nil
	f.asked = append(f.asked, layer)
	if f.err != nil {
		return snapshotter.Pulled{}, f.err
	}
	name := layer.ChainID.Encoded()[:1]
	dir := filepath.Join(f.dir, name)
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, name), nil, 0o644)); err != nil {
		return snapshotter.Pulled{}, err
	}
	key := "blob/" + layer.ChainID.String()
	pin(key)
	f.lowers.mu.Lock()
	defer f.lowers.mu.Unlock()
	err := f.lowers.addDir(key, dir)
	return snapshotter.Pulled{Streamed: snapshotter.Streamed{
		Key: key, DiffID: layer.ChainID, Usage: snapshots.Usage{Size: 7, Inodes: 2},
	}, Staged: f.staged}, err
}

func newPulling(t *testing.T) (*env, *fakeRemotes) {
	r := &fakeRemotes{dir: t.TempDir()}
	e := newEnv(t, snapshotter.Options{Remotes: r})
	r.lowers = e.fake
	return e, r
}

const (
	labelImage    = "containerd.io/snapshot/cri.image-ref"
	labelManifest = "containerd.io/snapshot/cri.manifest-digest"
	labelBlob     = "containerd.io/snapshot/cri.layer-digest"
)

// unpack prepares a chain like containerd's unpacker of a named image.
func (e *env) unpack(ctx context.Context, namespace, chain, parent string) ([]mount.Mount, error) {
	return e.Prepare(ctx, namespace+"/7/extract-1-abcd "+chain, parent, labels(snapshots.LabelSnapshotRef, chain,
		labelImage, "example.com/app:1", labelManifest, chainA, labelBlob, chainB))
}

// A layer that the daemon pulls is committed for the namespace that asked, once, and other namespaces
// do not see it: their clients have to prove that they may have it.
func TestPulled(t *testing.T) {
	e, remotes := newPulling(t)
	for _, namespace := range []string{"default", "default", "other"} {
		if _, err := e.unpack(t.Context(), namespace, chainA, ""); !errdefs.IsAlreadyExists(err) {
			t.Fatalf("a pulled layer in %s: %v, expected that it exists", namespace, err)
		}
	}
	a := e.found("default", chainA, "")
	other := e.found("other", chainA, "")
	if !strings.HasPrefix(a, "default/0/") || !strings.HasPrefix(other, "other/0/") {
		t.Fatalf("containerd finds %q and %q", a, other)
	}
	if _, err := e.unpack(t.Context(), "default", chainB, a); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("the layer above: %v, expected that it exists", err)
	}
	layer := snapshotter.Remote{
		Namespace: "default", Image: "example.com/app:1", Manifest: chainA, Blob: chainB, ChainID: chainA,
	}
	foreign, above := layer, layer
	foreign.Namespace = "other"
	above.ChainID, above.HasParent = chainB, true
	got, want := fmt.Sprintf("%+v", remotes.asked), fmt.Sprintf("%+v", []snapshotter.Remote{layer, foreign, above})
	if got != want {
		t.Errorf("pulled were %s, expected %s", got, want)
	}
	b := e.found("default", chainB, a)
	if usage, err := e.Usage(t.Context(), b); err != nil || usage != (snapshots.Usage{Size: 7, Inodes: 2}) {
		t.Errorf("usage of a pulled layer: %+v, %v", usage, err)
	}
	e.expectFiles(e.prepare("default/9/c", b), "a b")
}

// A client that cannot be told that a layer exists gets it as a snapshot with read-only mounts.
func TestStaged(t *testing.T) {
	e, remotes := newPulling(t)
	remotes.staged = true
	mounts, err := e.unpack(t.Context(), "default", chainA, "")
	e.must(err)
	if len(mounts) != 1 || mounts[0].Type != "bind" || !slices.Contains(mounts[0].Options, "ro") {
		t.Errorf("mounts of a staged layer: %v", mounts)
	}
	e.must(e.Commit(t.Context(), "default/8/"+chainA, "default/7/extract-1-abcd "+chainA))
	e.expectFiles(e.prepare("default/9/c", "default/8/"+chainA), "a")
}

// A layer that cannot be pulled is left to containerd, whatever the reason, unless the call itself ended.
func TestNotPulled(t *testing.T) {
	e, remotes := newPulling(t)
	notOurs := fmt.Errorf("not ours: %w", errdefs.ErrNotImplemented)
	for i, err := range []error{notOurs, errors.New("the registry lies")} {
		remotes.err = err
		mounts, perr := e.unpack(t.Context(), fmt.Sprint("n", i), chainA, "")
		if perr != nil || len(mounts) != 1 || slices.Contains(mounts[0].Options, "ro") {
			t.Errorf("after %v: %v, %v, expected mounts to unpack into", err, mounts, perr)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.unpack(ctx, "ended", chainA, ""); err == nil {
		t.Error("a call that had ended got mounts")
	}
	asked := len(remotes.asked)
	_, err := e.Prepare(t.Context(), "default/7/extract-1-abcd "+chainB, "",
		labels(snapshots.LabelSnapshotRef, "no digest"))
	e.must(err)
	e.prepare("default/7/container", "")
	if len(remotes.asked) != asked {
		t.Errorf("asked for %+v, which names no layer", remotes.asked[asked:])
	}
	remotes.err = nil
	_, err = e.Prepare(t.Context(), "default/7/extract-1-efgh "+chainB, "",
		labels(snapshots.LabelSnapshotRef, chainB, labelImage, "example.com/app:1", labelManifest, "no digest"))
	if !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	if last := remotes.asked[len(remotes.asked)-1]; last.Image != "" || last.ChainID != digest.Digest(chainB) {
		t.Errorf("half a name became %+v", last)
	}
}

// Standing describes what containers stand on, and leaves out layers that are being unpacked.
func TestStanding(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	e.layer("default/1/"+chainA, "", "a")
	e.must(e.Flush(t.Context()))
	e.prepare("default/2/container", "default/1/"+chainA)
	_, err := e.View(t.Context(), "default/3/view", "default/1/"+chainA)
	e.must(err)
	e.prepare(extractKey("default/4/"+chainB), "default/1/"+chainA)
	e.prepare("default/5/nothing below", "")
	list, err := e.Standing(t.Context())
	e.must(err)
	var got []string
	for _, s := range list {
		if s.Since.IsZero() || !strings.HasPrefix(s.Image, "image/") || s.Plain || s.Why != "" {
			t.Errorf("%s stands on %+v", s.Name, s)
		}
		got = append(got, fmt.Sprint(s.Namespace, " ", s.Name, " ", s.View, " ", s.Dirs))
	}
	if want := []string{"default container false 0", "default view true 0"}; !slices.Equal(got, want) {
		t.Errorf("standing are %q, expected %q", got, want)
	}
}

// Check reports directories that contradict the metadata.
func TestCheckReports(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	e.must(e.Flush(t.Context())) // the first cleanup
	upper := e.prepare("active", "")[0].Source
	stray := filepath.Join(e.root, "snapshots", "77")
	e.must(errors.Join(os.Rename(upper, upper+"-away"), os.Mkdir(stray, 0o700)))
	err := e.check()
	for _, want := range []string{`snapshot "active": upper directory`, `"` + stray + `" belongs to no snapshot`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Check reports %v, expected %q", err, want)
		}
	}
	e.must(os.Rename(upper+"-away", upper))
}
