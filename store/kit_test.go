package store

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/internal/testns"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/drivers"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(testns.Main(m))
}

// kit is a store that can be closed and opened again.
type kit struct {
	*Store
	t   *testing.T
	cfg Config
}

func newKit(t *testing.T, change func(*Config)) *kit {
	t.Helper()
	needRoot(t)
	k := &kit{t: t, cfg: Config{Root: t.TempDir(), Pool: Pool{Kind: region.KindFile, Size: 256 << 20}}}
	some, err := mount.Select(drivers.All(), "erofs")
	k.must(err)
	k.cfg.Drivers = some
	if change != nil {
		change(&k.cfg)
	}
	k.open()
	t.Cleanup(func() {
		ctx := context.Background()
		errs := []error{k.check()}
		for _, m := range k.Mounted() {
			errs = append(errs, k.table.Unmount(ctx, m.Key))
		}
		errs = append(errs, k.table.UnmountPool(ctx), k.Close())
		if err := errors.Join(slices.DeleteFunc(errs,
			func(err error) bool { return errors.Is(err, mount.ErrNotFound) })...); err != nil {
			t.Error(err)
		}
	})
	return k
}

func (k *kit) open() {
	k.t.Helper()
	s, err := Open(context.Background(), k.cfg)
	k.must(err)
	k.Store = s
}

// restart closes the store, calls change, and opens the store again.
func (k *kit) restart(change func()) {
	k.t.Helper()
	k.must(k.Close())
	if change != nil {
		change()
	}
	k.open()
}

func (k *kit) must(err error) {
	k.t.Helper()
	if err != nil {
		k.t.Fatal(err)
	}
}

// sweep sweeps like the command line.
func (k *kit) sweep() {
	k.t.Helper()
	k.must(k.Sweep(k.t.Context(), nil, false))
}

// check returns an error unless the pool and its mounts agree.
func (k *kit) check() error {
	var errs []error
	err := k.Check(context.Background(), nothing{}, nil, func(msg string) { errs = append(errs, errors.New(msg)) })
	return errors.Join(append(errs, err)...)
}

// nothing is the Uses of a containerd that keeps everything.
type nothing struct{}

func (nothing) Image(string) Use           { return Kept }
func (nothing) Layer(string) Use           { return Kept }
func (nothing) Plain(string) bool          { return true }
func (nothing) Namespaces(string) []string { return nil }

// wants is the Uses of a containerd that needs some images with their layers.
type wants map[string]Use

func (w wants) Image(key string) Use  { return w[key] }
func (w wants) Layer(key string) Use  { return w[key] }
func (w wants) Plain(key string) bool { return w["plain "+key] > Unused }
func (w wants) Namespaces(key string) []string {
	if w[key] == Unused {
		return nil
	}
	return []string{"default"}
}

// file is one file of a layer.
type file struct {
	name string
	body []byte
}

func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	r.Read(b)
	return b
}

func makeTar(files ...file) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		err := w.WriteHeader(&tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.body)), Typeflag: tar.TypeReg})
		if err == nil {
			_, err = w.Write(f.body)
		}
		if err != nil {
			panic(err)
		}
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// blobOf describes a tar as a blob that its caller has.
func blobOf(raw []byte) Blob {
	id := digest.FromBytes(raw)
	return Blob{
		Digest: id, MediaType: ocispec.MediaTypeImageLayer, DiffID: id, Size: int64(len(raw)),
		Open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil },
		Pin:  func(string) {}, Holder: ContainerdHolder("default"),
	}
}

// stream stores a layer and returns it as part of a chain.
func (k *kit) stream(files ...file) Layer {
	k.t.Helper()
	st, err := k.AddBlob(k.t.Context(), blobOf(makeTar(files...)))
	k.must(err)
	return Layer{Key: st.Key}
}

// image describes the image made of layers.
func image(layers ...Layer) Image {
	img := Image{Layers: layers, Holder: ContainerdHolder("default")}
	img.Key = ImageKey(img.layerKeys())
	return img
}

// sourceOf is an OCI image with one layer.
func sourceOf(files ...file) *source.Image {
	b := blobOf(makeTar(files...))
	desc := ocispec.Descriptor{MediaType: b.MediaType, Digest: b.Digest, Size: b.Size}
	return &source.Image{Layers: []source.Layer{{Desc: desc, DiffID: b.DiffID, Open: b.Open}}}
}

// expect fails the test unless a directory holds exactly files.
func (k *kit) expect(root string, files ...file) {
	k.t.Helper()
	want := map[string][]byte{}
	for _, f := range files {
		want[f.name] = f.body
	}
	err := fs.WalkDir(os.DirFS(root), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		got, err := os.ReadFile(filepath.Join(root, p))
		if err == nil && !bytes.Equal(got, want[p]) {
			err = fmt.Errorf("file %q: %d bytes that differ from the expected %d", p, len(got), len(want[p]))
		}
		delete(want, p)
		return err
	})
	if err != nil || len(want) > 0 {
		k.t.Errorf("%s: %v; %d files are missing", root, err, len(want))
	}
}

// uncache makes the kernel read a file again.
func (k *kit) uncache(path string) {
	k.t.Helper()
	f, err := os.Open(path)
	k.must(err)
	defer f.Close()
	k.must(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

// needRoot skips a test that mounts unless it runs as root.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts file systems, which needs root")
	}
}
