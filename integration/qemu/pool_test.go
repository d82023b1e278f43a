package qemu

import (
	"bytes"
	"context"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/converter/tree"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// need skips a test where virtual machines cannot run, and returns the kernels to test.
func need(t *testing.T) []Kernel {
	t.Helper()
	if testing.Short() {
		t.Skip("-short")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root: the trees have owners and devices")
	}
	if _, err := exec.LookPath(Program); err != nil {
		t.Skip(err)
	}
	list, err := FindKernels()
	if err != nil {
		t.Skip(err)
	}
	return list
}

// onEach runs a test on all kernels in parallel: a guest boots on one processor.
func onEach(t *testing.T, test func(t *testing.T, k Kernel)) {
	t.Helper()
	for _, k := range need(t) {
		t.Run(k.Release, func(t *testing.T) {
			t.Parallel()
			test(t, k)
		})
	}
}

// boot runs a machine with a time limit for hung ones.
func boot(t *testing.T, m Machine) *Running {
	t.Helper()
	limit := 10*time.Minute + time.Duration(m.Task.Rounds)*5*time.Second
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	r, err := Start(ctx, m, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		<-r.done // the emulator ends before its files are removed
	})
	return r
}

// testPool is a pool of the host, in a file that guests map.
type testPool struct {
	*pool.Pool
	path string
}

// newPool makes a pool for a guest's persistent memory: kernels mount it with DAX, or a window of it by address.
func newPool(t *testing.T, size int64) *testPool {
	t.Helper()
	dir := t.TempDir()
	config := region.Config{Kind: region.KindFile, Path: filepath.Join(dir, "pool"), Size: size, Create: true}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Type == unix.TMPFS_MAGIC {
		config.Kind = region.KindTmpfs
	}
	r, err := region.Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	p, err := pool.Create(r, filepath.Join(dir, "index"), pool.Options{DAX: pool.Yes, Windows: pool.Yes})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return &testPool{p, config.Path}
}

// poolOf makes a pool with one image per key.
func poolOf(t *testing.T, size int64, images map[string][][]testimage.Entry) *testPool {
	t.Helper()
	p := newPool(t, size)
	for _, key := range slices.Sorted(maps.Keys(images)) {
		p.add(t, key, images[key])
	}
	return p
}

// add adds an image. Guests that map the pool may be running.
func (p *testPool) add(t *testing.T, key string, layers [][]testimage.Entry) {
	t.Helper()
	b := p.Begin()
	defer b.Discard()
	if _, err := p.AddImage(context.Background(), key, merge(t, b, layers), daxfs.Options{}); err != nil {
		t.Fatal(err)
	}
}

// merge makes one tree of layers whose contents go into a store.
func merge(t *testing.T, s layer.Store, layers [][]testimage.Entry) *daxfs.Node {
	t.Helper()
	var parsed []*layer.Layer
	for _, entries := range layers {
		var raw bytes.Buffer
		if err := testimage.Tar(&raw, entries); err != nil {
			t.Fatal(err)
		}
		l, err := layer.FromTar(context.Background(), &raw, s, layer.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		parsed = append(parsed, l)
	}
	root, err := tree.Merge(parsed)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// unpacked lists tar(1)'s tree of a layer, which every kernel has to show.
func unpacked(t *testing.T, o listing.Options, entries []testimage.Entry) []string {
	t.Helper()
	dir := t.TempDir()
	var raw bytes.Buffer
	if err := testimage.Tar(&raw, entries); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("tar", "--extract", "--preserve-permissions", "--same-owner", "--numeric-owner",
		"--xattrs", "--xattrs-include=*", "--no-overwrite-dir", "--delay-directory-restore", "--directory", dir)
	cmd.Stdin = &raw
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	lines, err := listing.Tree(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// special is one layer with all kinds of entries, without those that a second layer changes. It has no
// times before 1970: containerd, and so this project, clamps them, and tar does not.
func special(t *testing.T) []testimage.Entry {
	t.Helper()
	base, err := testimage.Busybox()
	if err != nil {
		t.Skip(err)
	}
	for _, e := range testimage.SpecialLayers()[0] {
		if e.ModTime.IsZero() || e.ModTime.Unix() >= 0 {
			base = append(base, e)
		}
	}
	return base
}
