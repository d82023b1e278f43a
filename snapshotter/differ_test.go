package snapshotter_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// pull is a differ and its content store.
type pull struct {
	*env
	*snapshotter.Differ
	store content.Store
}

func newPull(e *env) *pull {
	e.t.Helper()
	store, err := local.NewStore(e.t.TempDir())
	e.must(err)
	return &pull{e, snapshotter.NewDiffer(e.Snapshotter, store), store}
}

// put stores an uncompressed layer.
func (p *pull) put(tar []byte) ocispec.Descriptor {
	p.t.Helper()
	desc := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(tar),
		Size: int64(len(tar)),
	}
	err := content.WriteBlob(p.t.Context(), p.store, desc.Digest.String(), bytes.NewReader(tar), desc)
	if !errdefs.IsAlreadyExists(err) {
		p.must(err)
	}
	return desc
}

// stream commits a layer that our differ applied.
func (p *pull) stream(name, parent string, tar []byte) {
	p.t.Helper()
	desc := p.put(tar)
	key := extractKey(name)
	m := p.prepare(key, parent, unpackLabels(name, desc.Digest))
	got, err := p.Apply(p.t.Context(), desc, m)
	p.must(err)
	if got.Digest != desc.Digest || got.MediaType != ocispec.MediaTypeImageLayer || got.Size != desc.Size {
		p.t.Fatalf("applied %+v, expected %+v", got, desc)
	}
	p.must(p.Commit(p.t.Context(), name, key))
}

// unpackLabels returns the labels of containerd's unpacker on the snapshot of a layer.
func unpackLabels(name string, diffID digest.Digest) snapshots.Opt {
	return labels(snapshots.LabelSnapshotRef, name, labelDiffID, diffID.String())
}

const labelDiffID = "containerd.io/snapshot/diff-id"

func TestStream(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	p := newPull(e)
	p.stream("default/1/"+chainA, "", tarOf("a", "gone"))
	p.stream("default/2/"+chainB, "default/1/"+chainA, tarOf("b", ".wh.gone"))
	if e.fake.state().builds[1] != 0 {
		t.Error("the image of an inner layer was built for a layer that was streamed")
	}
	entries, err := filepath.Glob(filepath.Join(e.root, "snapshots/*/fs/*"))
	if e.must(err); len(entries) != 0 {
		t.Errorf("streaming wrote %q", entries)
	}
	c := e.prepare("default/3/c", "default/2/"+chainB)
	e.expectFiles(c, "a b")
	if u, err := e.Usage(t.Context(), "default/2/"+chainB); err != nil || u.Size == 0 {
		t.Errorf("usage of a streamed layer: %+v, %v", u, err)
	}
	// A container's changes on top of streamed layers, as in nerdctl commit and build.
	e.must(os.WriteFile(filepath.Join(option(c, "upperdir"), "c"), nil, 0o644))
	e.must(e.Commit(t.Context(), "default/4/mine", "default/3/c"))
	e.expectFiles(e.prepare("default/5/d", "default/4/mine"), "a b c")
	e.layer("default/6/walked", "default/2/"+chainB, "w")
	e.expectFiles(e.prepare("default/7/e", "default/6/walked"), "a b w")
}

func TestForeignMounts(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	p := newPull(e)
	desc := p.put(tarOf("a"))
	upper := filepath.Join(e.root, "snapshots/1/fs")
	ours := e.prepare("default/1/extract-1-x a", "")
	if ours[0].Source != upper {
		t.Fatalf("prepared %v", ours)
	}
	for name, m := range map[string][]mount.Mount{
		"other bind":     {{Type: "bind", Source: t.TempDir(), Options: []string{"rw"}}},
		"other overlay":  {{Type: "overlay", Options: []string{"upperdir=/x/snapshots/1/fs"}}},
		"two mounts":     {ours[0], ours[0]},
		"none":           {},
		"read-only bind": {{Type: "bind", Source: upper, Options: []string{"ro", "rbind"}}},
		"work directory": {{Type: "bind", Source: filepath.Dir(upper), Options: []string{"rw"}}},
		"way around":     {{Type: "bind", Source: e.root + "/snapshots/../snapshots/1/fs", Options: []string{"rw"}}},
		"erofs":          {{Type: "erofs", Source: upper}},
	} {
		if _, err := p.Apply(t.Context(), desc, m); !errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v, expected ErrNotImplemented", name, err)
		}
	}
	for _, mediaType := range []string{
		"application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
		ocispec.MediaTypeImageConfig, "application/vnd.erofs.layer.v1",
	} {
		desc := desc
		desc.MediaType = mediaType
		if _, err := p.Apply(t.Context(), desc, ours); !errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v, expected ErrNotImplemented", mediaType, err)
		}
	}
	if _, err := p.Compare(t.Context(), nil, nil); !errdefs.IsNotImplemented(err) {
		t.Errorf("Compare: %v", err)
	}
	gone := []mount.Mount{{Type: "bind", Source: filepath.Join(e.root, "snapshots/99/fs"), Options: []string{"rw"}}}
	if _, err := p.Apply(t.Context(), desc, gone); !errdefs.IsNotFound(err) {
		t.Errorf("snapshot that was removed: %v", err)
	}
}

// Without room for a layer it is unpacked into its directory, over the layers below.
func TestStreamFallsBack(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	p := newPull(e)
	e.fake.setFull(true)
	p.stream("default/1/"+chainA, "", tarOf("dir/", "gone"))
	p.stream("default/2/"+chainB, "default/1/"+chainA, tarOf("dir/new", ".wh.gone"))
	if strings.Join(e.fallbacks(), " ") != "full full" {
		t.Errorf("fallbacks %q", e.fallbacks())
	}
	c := e.prepare("default/3/c", "default/2/"+chainB)
	e.expectFiles(c, "dir")
	err := mount.WithTempMount(t.Context(), c, func(root string) error {
		// The upper layer does not list dir; walking takes its mode from the layer below.
		st, err := os.Stat(filepath.Join(root, "dir"))
		if err == nil && st.Mode().Perm() != 0o750 {
			t.Errorf("dir is %s", st.Mode())
		}
		_, err = os.Stat(filepath.Join(root, "dir/new"))
		return err
	})
	e.must(err)
	e.fake.setFull(false)
}

// A layer that was prepared to be streamed and then walked may have wrong attributes for directories
// of the layers below, which the walker did not see. The worker or the first container restores it from its blob.
func TestDifferChanges(t *testing.T) {
	for _, atOnce := range []bool{true, false} {
		t.Run(fmt.Sprintf("blob at once=%v", atOnce), func(t *testing.T) {
			e := newEnv(t, snapshotter.Options{})
			p := newPull(e)
			p.stream("default/1/"+chainA, "", tarOf("dir/"))
			desc := p.put(tarOf("dir/walked"))
			offer := func() {
				e.fake.mu.Lock()
				defer e.fake.mu.Unlock()
				e.fake.blobs[desc.Digest] = snapshotter.Blob{
					MediaType: desc.MediaType, DiffID: desc.Digest, Size: desc.Size,
					Open: func(context.Context) (io.ReadCloser, error) {
						return io.NopCloser(bytes.NewReader(tarOf("dir/walked"))), nil
					},
				}
			}
			if atOnce {
				offer()
			}
			top, key := "default/2/"+chainB, "default/2/extract-1-x "+chainB
			m := e.prepare(key, "default/1/"+chainA, unpackLabels(chainB, desc.Digest))
			upper := option(m, "upperdir")
			if option(m, "lowerdir") != "" {
				t.Fatalf("prepared %v, expected a mount without a lower directory", m)
			}
			e.must(os.Mkdir(filepath.Join(upper, "dir"), 0o755))
			e.must(os.WriteFile(filepath.Join(upper, "dir/walked"), nil, 0o644))
			e.must(e.Commit(t.Context(), top, key))
			e.must(e.Flush(t.Context()))
			// containerd may discard the blob later, so the worker asks for it now. What was walked is no layer.
			stored := 1
			if atOnce {
				stored = 2
			}
			if s := e.fake.state(); len(s.claims) != 1 || len(s.layers) != stored {
				t.Errorf("the worker claimed %+v; layers %v are stored, expected %d", s.claims, s.layers, stored)
			}
			if !atOnce {
				if _, err := e.Prepare(t.Context(), "default/3/c", top); !errdefs.IsNotFound(err) {
					t.Fatalf("without the blob: %v", err)
				}
				offer()
			}
			c := e.prepare("default/3/c", top)
			e.must(mount.WithTempMount(t.Context(), c, func(root string) error {
				return expectFile(filepath.Join(root, "dir/walked"), "dir/walked")
			}))
			for _, claim := range e.fake.state().claims {
				if claim.Namespace != "default" || claim.DiffID != desc.Digest {
					t.Errorf("asked for %+v", claim)
				}
			}
			e.must(e.Cleanup(t.Context()))
			if _, err := os.Stat(upper); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the directory that was walked: %v", err)
			}
			e.restart()
			e.expectFiles(e.prepare("default/4/d", top), "dir")
		})
	}
}

func expectFile(path, want string) error {
	got, err := os.ReadFile(path)
	if err == nil && string(got) != want {
		err = fmt.Errorf("%q holds %q, expected %q", path, got, want)
	}
	return err
}

func TestBadBlob(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	p := newPull(e)
	m := e.prepare("default/1/extract-1-x a", "")
	missing := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("nothing"), Size: 7}
	if _, err := p.Apply(t.Context(), missing, m); !errdefs.IsNotFound(err) ||
		!strings.Contains(err.Error(), missing.Digest.String()) {
		t.Errorf("missing blob: %v", err)
	}
	if _, err := p.Apply(t.Context(), p.put([]byte(strings.Repeat("not a tar ", 100))), m); err == nil {
		t.Error("a blob that is no tar was applied")
	}
	// The snapshot is empty again.
	desc := p.put(tarOf("a"))
	if _, err := p.Apply(t.Context(), desc, m); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Mounts(t.Context(), "default/1/extract-1-x a"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("mounts of a snapshot that was streamed to: %v", err)
	}
	// Two layers in one snapshot, in order.
	if _, err := p.Apply(t.Context(), p.put(tarOf("b", ".wh.a")), m); err != nil {
		t.Fatal(err)
	}
	e.must(e.Commit(t.Context(), "default/2/a", "default/1/extract-1-x a"))
	e.expectFiles(e.prepare("default/3/c", "default/2/a"), "b")
}

func TestStreamCancelled(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	p := newPull(e)
	m := e.prepare("default/1/extract-1-x a", "")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Apply(ctx, p.put(tarOf("a")), m); err == nil {
		t.Error("a cancelled Apply succeeded")
	}
}

// The caller's deadline does not stop the work on an image: a second call finds it done.
func TestBuildOutlivesCaller(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	e.layer("default/1/"+chainA, "", "a")
	e.fake.mu.Lock() // nothing is built until it is unlocked
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err := e.Prepare(ctx, "default/2/c", "default/1/"+chainA)
	e.fake.mu.Unlock()
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Prepare with a deadline: %v", err)
	}
	e.expectFiles(e.prepare("default/2/c", "default/1/"+chainA), "a")
	if n := e.fake.state().builds[1]; n != 1 {
		t.Errorf("built %d times", n)
	}
}
