package snapshotter_test

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// fakeLowers implements snapshotter.Lowers with containerd's own parts: a layer is a copy of a
// directory, an image is a read-only overlay of layers. It shares nothing and uses no code of ours.
type fakeLowers struct {
	root string

	mu     sync.Mutex
	full   bool            // AddDir, AddBlob and Lower find no room for new things
	fail   error           // another error for them to return
	opens  int             // blobs read
	builds map[int]int     // images built, by their number of layers
	images map[string]bool // images that exist
	plains map[string]bool // images that exist as directories
	layers map[string]bool
	blobs  map[digest.Digest]snapshotter.Blob // the blobs for AddClaimed, by diff ID
	claims []snapshotter.Claim                // the arguments of AddClaimed
	// called once each: by the next AddDir before and after its work, and by the next Lower before its work
	beforeAdd, afterAdd, beforeLower func()
}

func newFakeLowers(root string) *fakeLowers {
	return &fakeLowers{
		root: root, builds: map[int]int{}, images: map[string]bool{}, plains: map[string]bool{},
		layers: map[string]bool{},
		blobs:  map[digest.Digest]snapshotter.Blob{},
	}
}

// setFull sets whether there is room. The snapshotter may be at work.
func (f *fakeLowers) setFull(full bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.full = full
}

// set makes one of the calls of fn that f describes happen. The snapshotter may be at work.
func (f *fakeLowers) set(call *func(), fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	*call = fn
}

// once calls a function that set has set, the first time.
func (f *fakeLowers) once(call *func()) {
	f.mu.Lock()
	fn := *call
	*call = nil
	f.mu.Unlock()
	if fn != nil {
		fn()
	}
}

// setFail sets the error that calls return, or nil. The snapshotter may be at work.
func (f *fakeLowers) setFail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = err
}

// fakeState is a copy of a fakeLowers' state.
type fakeState struct {
	builds         map[int]int
	images, layers map[string]bool
	claims         []snapshotter.Claim
}

func (f *fakeLowers) state() fakeState {
	f.mu.Lock()
	defer f.mu.Unlock()
	return fakeState{maps.Clone(f.builds), maps.Clone(f.images), maps.Clone(f.layers), slices.Clone(f.claims)}
}

func (f *fakeLowers) BlobKey(diffID digest.Digest) string { return "blob/" + diffID.String() }

func (f *fakeLowers) ImageKey(layers []string) string { return "image/" + strings.Join(layers, "+") }

func (f *fakeLowers) path(kind, key string) string {
	return filepath.Join(f.root, kind, fmt.Sprintf("%x", sha256.Sum256([]byte(key)))[:16])
}

func (f *fakeLowers) room() error {
	if f.full {
		return fmt.Errorf("fake memory: %w", errdefs.ErrResourceExhausted)
	}
	return f.fail
}

func (f *fakeLowers) AddDir(ctx context.Context, _, key, dir string) error {
	f.once(&f.beforeAdd)
	defer f.once(&f.afterAdd)
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.addDir(key, dir)
}

func (f *fakeLowers) addDir(key, dir string) error {
	if f.layers[key] {
		return nil
	}
	if err := f.room(); err != nil {
		return err
	}
	if err := copyUpper(f.path("layers", key), dir); err != nil {
		return err
	}
	f.layers[key] = true
	return nil
}

func copyUpper(dst, src string) error {
	if err := os.MkdirAll(dst, 0o700); err != nil {
		return err
	}
	return fs.CopyDir(dst, src)
}

func (f *fakeLowers) AddClaimed(ctx context.Context, claim snapshotter.Claim) (s snapshotter.Streamed, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.claims = append(f.claims, claim)
	blob, ok := f.blobs[claim.DiffID]
	if !ok {
		return s,
			fmt.Errorf("no blob of layer %s in namespace %q: %w", claim.DiffID, claim.Namespace, errdefs.ErrNotFound)
	}
	blob.Pin = func(string) {}
	return f.addBlob(ctx, blob)
}

func (f *fakeLowers) AddBlob(ctx context.Context, blob snapshotter.Blob) (s snapshotter.Streamed, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.addBlob(ctx, blob)
}

func (f *fakeLowers) addBlob(ctx context.Context, blob snapshotter.Blob) (s snapshotter.Streamed, err error) {
	if err := f.room(); err != nil {
		return s, err
	}
	f.opens++
	rc, err := blob.Open(ctx)
	if err != nil {
		return s, err
	}
	defer rc.Close()
	var r io.Reader = rc
	if strings.HasSuffix(blob.MediaType, "gzip") {
		if r, err = gzip.NewReader(rc); err != nil {
			return s, err
		}
	}
	if err := os.MkdirAll(f.root, 0o700); err != nil {
		return s, err
	}
	temp, err := os.MkdirTemp(f.root, "blob-")
	if err != nil {
		return s, err
	}
	defer os.RemoveAll(temp)
	digester := digest.Canonical.Digester()
	counter := &counter{r: io.TeeReader(r, digester.Hash())}
	if _, err := archive.Apply(ctx, temp, counter,
		archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)); err != nil {
		return s, err
	}
	if _, err := io.Copy(io.Discard, counter); err != nil {
		return s, err
	}
	s.Key, s.DiffID, s.Size = "blob/"+digester.Digest().String(), digester.Digest(), counter.n
	s.Usage = snapshots.Usage{Size: counter.n, Inodes: 1}
	blob.Pin(s.Key)
	return s, f.addDir(s.Key, temp)
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

func (f *fakeLowers) Lower(ctx context.Context, img snapshotter.Image) (string, error) {
	f.once(&f.beforeLower)
	f.mu.Lock()
	defer f.mu.Unlock()
	dir := filepath.Join(f.path("images", img.Key), "mnt")
	if f.images[img.Key] {
		return dir, nil
	}
	if err := f.room(); err != nil {
		return "", err
	}
	m, err := f.assemble(img)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if err := m.Mount(dir); err != nil {
		return "", err
	}
	f.images[img.Key] = true
	f.builds[len(img.Layers)]++
	return dir, nil
}

// assemble returns a read-only mount of the layers of an image.
func (f *fakeLowers) assemble(img snapshotter.Image) (mount.Mount, error) {
	var dirs, keys []string
	for _, l := range img.Layers {
		keys = append(keys, l.Key)
		if !f.layers[l.Key] && l.Dir == "" {
			return mount.Mount{}, fmt.Errorf("layer %q was never stored: %w", l.Key, errdefs.ErrNotFound)
		}
		if err := f.addDir(l.Key, l.Dir); err != nil {
			return mount.Mount{}, err
		}
		dirs = append([]string{f.path("layers", l.Key)}, dirs...)
	}
	if want := f.ImageKey(keys); img.Key != want {
		return mount.Mount{}, fmt.Errorf("image key %q, expected %q", img.Key, want)
	}
	if len(dirs) > 1 {
		options := []string{"ro", "index=off", "lowerdir=" + strings.Join(dirs, ":")}
		return mount.Mount{Type: "overlay", Source: "overlay", Options: options}, nil
	}
	return mount.Mount{Type: "bind", Source: dirs[0], Options: []string{"ro", "rbind"}}, nil
}

func (f *fakeLowers) Plain(ctx context.Context, img snapshotter.Image) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	dir := f.path("plain", img.Key)
	if f.plains[img.Key] {
		return dir, nil
	}
	m, err := f.assemble(img)
	if err != nil {
		return "", err
	}
	f.plains[img.Key] = true
	return dir, mount.WithTempMount(ctx, []mount.Mount{m}, func(root string) error { return copyUpper(dir, root) })
}

func (f *fakeLowers) Sweep(ctx context.Context, use snapshotter.Uses, short bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for key := range f.images {
		if u := use.Image(key); u == snapshotter.Unused || short && u < snapshotter.InUse {
			if err := f.drop(key); err != nil {
				return err
			}
		}
	}
	for key := range f.plains {
		if !use.Plain(key) {
			delete(f.plains, key)
			if err := os.RemoveAll(f.path("plain", key)); err != nil {
				return err
			}
		}
	}
	if len(f.images) > 0 {
		return nil // an overlay may stand on any layer
	}
	for key := range f.layers {
		u := use.Layer(key)
		if u == snapshotter.Unused || short && u < snapshotter.InUse && strings.HasPrefix(key, "dir/") {
			delete(f.layers, key)
			if err := os.RemoveAll(f.path("layers", key)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *fakeLowers) drop(key string) error {
	if err := mount.UnmountAll(filepath.Join(f.path("images", key), "mnt"), 0); err != nil {
		return err
	}
	delete(f.images, key)
	return os.RemoveAll(f.path("images", key))
}

// reboot drops everything in memory.
func (f *fakeLowers) reboot() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var err error
	for key := range f.images {
		err = errors.Join(err, f.drop(key))
	}
	for key := range f.layers {
		if strings.HasPrefix(key, "dir/") {
			delete(f.layers, key)
			err = errors.Join(err, os.RemoveAll(f.path("layers", key)))
		}
	}
	return err
}

// tarOf makes an uncompressed layer of files with their own name as contents; a name that ends in / is a directory.
func tarOf(names ...string) []byte {
	var b strings.Builder
	w := tar.NewWriter(&b)
	for _, name := range names {
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(name)), Typeflag: tar.TypeReg}
		if strings.HasSuffix(name, "/") {
			h = &tar.Header{Name: name, Mode: 0o750, Typeflag: tar.TypeDir}
		}
		if err := w.WriteHeader(h); err != nil {
			panic(err)
		}
		if h.Size > 0 {
			if _, err := io.WriteString(w, name); err != nil {
				panic(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return []byte(b.String())
}
