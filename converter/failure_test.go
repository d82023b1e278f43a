package converter_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/converter/blob"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// manifestOf reads the only manifest of a layout.
func manifestOf(t *testing.T, l *ocitest.Layout) (ocispec.Descriptor, ocispec.Manifest) {
	t.Helper()
	var index ocispec.Index
	readJSON(t, filepath.Join(l.Dir, "index.json"), &index)
	var m ocispec.Manifest
	readJSON(t, l.BlobPath(index.Manifests[0].Digest), &m)
	return index.Manifests[0], m
}

func readJSON(t *testing.T, file string, v any) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

// edit changes a blob silently.
func edit(t *testing.T, file string, f func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, f(b), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestBadInput: the error names the layer, the expected and the found value, and the output stays unchanged.
func TestBadInput(t *testing.T) {
	tars := exampleLayers()
	middle := func(b []byte) []byte { b[len(b)/2] ^= 0x55; return b }
	for _, c := range []struct {
		name  string
		make  func(t *testing.T) *ocitest.Layout
		opts  converter.Options
		is    error
		holds []string // parts of the message; "LAYER" is the digest of the last layer
	}{
		{
			name: "a damaged layer",
			make: func(t *testing.T) *ocitest.Layout {
				l := newLayout(t, packed(tars, ocitest.Gzip)...)
				_, m := manifestOf(t, l)
				edit(t, l.BlobPath(m.Layers[2].Digest), middle)
				return l
			},
			is: blob.ErrMismatch, holds: []string{"layer 2 (LAYER)", "digest mismatch: expected LAYER, found sha256:"},
		},
		{
			name: "a damaged uncompressed layer",
			make: func(t *testing.T) *ocitest.Layout {
				l := newLayout(t, packed(tars, ocitest.None)...)
				_, m := manifestOf(t, l)
				edit(t, l.BlobPath(m.Layers[2].Digest), func(b []byte) []byte { b[0] ^= 1; return b })
				return l
			},
			is: blob.ErrMismatch, holds: []string{"LAYER", "digest mismatch"},
		},
		{
			name: "a truncated layer",
			make: func(t *testing.T) *ocitest.Layout {
				l := newLayout(t, packed(tars, ocitest.Gzip)...)
				_, m := manifestOf(t, l)
				edit(t, l.BlobPath(m.Layers[2].Digest), func(b []byte) []byte { return b[:len(b)-100] })
				return l
			},
			is: blob.ErrMismatch, holds: []string{"LAYER", "size mismatch"},
		},
		{
			name: "a layer that is too long",
			make: func(t *testing.T) *ocitest.Layout {
				l := newLayout(t, packed(tars, ocitest.None)...)
				_, m := manifestOf(t, l)
				edit(t, l.BlobPath(m.Layers[2].Digest), func(b []byte) []byte { return append(b, 0) })
				return l
			},
			is: blob.ErrMismatch, holds: []string{"LAYER", "size mismatch"},
		},
		{
			name: "a missing layer",
			make: func(t *testing.T) *ocitest.Layout {
				l := newLayout(t, packed(tars, ocitest.Gzip)...)
				_, m := manifestOf(t, l)
				if err := os.Remove(l.BlobPath(m.Layers[2].Digest)); err != nil {
					t.Fatal(err)
				}
				return l
			},
			is: os.ErrNotExist, holds: []string{"LAYER"},
		},
		{
			name: "a wrong diff ID",
			make: func(t *testing.T) *ocitest.Layout {
				return newLayout(t,
					ocitest.Layer{Tar: tars[0], Compression: ocitest.Zstd, DiffID: digest.FromString("x")})
			},
			is:    blob.ErrMismatch,
			holds: []string{"LAYER", "diff ID mismatch: expected " + digest.FromString("x").String()},
		},
		{
			name: "a layer that is no tar",
			make: func(t *testing.T) *ocitest.Layout {
				return newLayout(t, ocitest.Layer{Tar: bytes.Repeat([]byte("no tar"), 1000), Compression: ocitest.Gzip})
			},
			is: tar.ErrHeader, holds: []string{"LAYER"},
		},
		{
			name: "a layer that ends in a file",
			make: func(t *testing.T) *ocitest.Layout {
				return newLayout(t, ocitest.Layer{Tar: tars[0][:len(tars[0])/2], Compression: ocitest.Gzip})
			},
			is: io.ErrUnexpectedEOF, holds: []string{"LAYER", `"lib/`},
		},
		{
			name: "an encrypted layer",
			make: func(t *testing.T) *ocitest.Layout {
				return newLayout(t,
					ocitest.Layer{Tar: tars[0], MediaType: ocispec.MediaTypeImageLayerGzip + "+encrypted"})
			},
			is: blob.ErrEncrypted, holds: []string{"LAYER", "decrypt"},
		},
		{
			name: "an unknown layer type",
			make: func(t *testing.T) *ocitest.Layout {
				return newLayout(t, ocitest.Layer{Tar: tars[0], MediaType: "application/vnd.erofs.layer.v1"})
			},
			is: blob.ErrMediaType, holds: []string{"LAYER", `"application/vnd.erofs.layer.v1"`, "expected"},
		},
		{
			name: "a decompression bomb",
			make: func(t *testing.T) *ocitest.Layout {
				return newLayout(t,
					ocitest.Layer{Tar: Tar(Reg("zeros", strings.Repeat("\x00", 64<<20))), Compression: ocitest.Gzip})
			},
			opts: converter.Options{MaxSize: 16 << 20}, is: converter.ErrTooLarge, holds: []string{"LAYER", "16777216"},
		},
		{
			name: "a bomb in parts",
			make: func(t *testing.T) *ocitest.Layout {
				var l []ocitest.Layer
				for range 5 {
					l = append(l,
						ocitest.Layer{Tar: Tar(Reg("zeros", strings.Repeat("\x00", 5<<20))), Compression: ocitest.Gzip})
				}
				return newLayout(t, l...)
			},
			opts: converter.Options{MaxSize: 16 << 20}, is: converter.ErrTooLarge, holds: []string{"16777216"},
		},
		{
			name: "too many entries in all layers",
			make: func(t *testing.T) *ocitest.Layout {
				var l []ocitest.Layer
				for range 5 {
					l = append(l, ocitest.Layer{Tar: Tar(Dir("a"), Dir("b"), Dir("c")), Compression: ocitest.Gzip})
				}
				return newLayout(t, l...)
			},
			opts: converter.Options{MaxEntries: 14}, is: converter.ErrTooLarge, holds: []string{"LAYER", "14 entries"},
		},
		{
			name: "too many xattrs in all layers",
			make: func(t *testing.T) *ocitest.Layout {
				f := Reg("a", "")
				for i := range 9 {
					f = f.X(fmt.Sprint("user.", i), "")
				}
				y := ocitest.Layer{Tar: Tar(f), Compression: ocitest.Gzip}
				return newLayout(t, y, y, y)
			},
			opts: converter.Options{MaxEntries: 14}, is: converter.ErrTooLarge, holds: []string{"LAYER", "14 entries"},
		},
		{
			name: "a sparse file beyond 32-bit block numbers",
			make: func(t *testing.T) *ocitest.Layout {
				return newLayout(t, ocitest.Layer{Tar: Tar(Reg("a", "a")), Compression: ocitest.Gzip},
					ocitest.Layer{Tar: sparseTar(t, "huge", 17<<40, "end"), Compression: ocitest.Gzip})
			},
			opts: converter.Options{MaxSize: 1 << 50}, is: converter.ErrTooLarge,
			holds: []string{"LAYER", "17592186044416", `"huge"`},
		},
		{
			name: "a damaged manifest",
			make: func(t *testing.T) *ocitest.Layout {
				l := newLayout(t, packed(tars, ocitest.Gzip)...)
				d, _ := manifestOf(t, l)
				edit(t, l.BlobPath(d.Digest),
					func(b []byte) []byte { return bytes.Replace(b, []byte("config"), []byte("comfig"), 1) })
				return l
			},
			is: blob.ErrMismatch, holds: []string{"manifest"},
		},
		{
			name: "a damaged configuration",
			make: func(t *testing.T) *ocitest.Layout {
				l := newLayout(t, packed(tars, ocitest.Gzip)...)
				_, m := manifestOf(t, l)
				edit(t, l.BlobPath(m.Config.Digest), func(b []byte) []byte { return append(b, ' ') })
				return l
			},
			is: blob.ErrMismatch, holds: []string{"config"},
		},
		{
			name: "no layout at all",
			make: func(t *testing.T) *ocitest.Layout { return &ocitest.Layout{Dir: t.TempDir()} },
			is:   os.ErrNotExist, holds: []string{"not an OCI layout"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := c.make(t)
			out, _, err := convert(t, "oci:"+l.Dir, c.opts)
			if err == nil {
				t.Fatal("it was converted")
			}
			if !errors.Is(err, c.is) {
				t.Errorf("error %q, expected one that wraps %q", err, c.is)
			}
			for _, h := range c.holds {
				if strings.Contains(h, "LAYER") {
					_, m := manifestOf(t, l)
					h = strings.ReplaceAll(h, "LAYER", m.Layers[len(m.Layers)-1].Digest.String())
				}
				if !strings.Contains(err.Error(), h) {
					t.Errorf("error %q, expected it to say %q", err, h)
				}
			}
			checkUntouched(t, out)
		})
	}
}

func checkUntouched(t *testing.T, out string) {
	t.Helper()
	checkOnly(t, filepath.Dir(out), "image")
	if b, err := os.ReadFile(out); err != nil || string(b) != before {
		t.Errorf("the output holds %d bytes (%v), expected %q", len(b), err, before)
	}
}

// TestFullDisk converts to a file system that is too small.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Skipf("needs a small file system: mount tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	src, err := source.Parse("oci:"+newLayout(t, packed(exampleLayers(), ocitest.Gzip)...).Dir, source.Config{})
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "image")
	if err := os.WriteFile(out, []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = converter.Convert(context.Background(), src, out, converter.Options{})
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), out) {
		t.Errorf("error %q, expected %q for %q", err, unix.ENOSPC, out)
	}
	checkUntouched(t, out)
}

// cancelling is a Progress that ends the conversion in the middle of a layer.
type cancelling struct {
	cancel context.CancelCauseFunc
	err    error
}

func (c cancelling) Start([]source.Layer) {}
func (c cancelling) Done(int)             {}
func (c cancelling) Read(layer, _ int) {
	if layer == 1 {
		c.cancel(c.err)
	}
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("somebody pressed ^C")
	src, err := source.Parse("oci:"+newLayout(t, packed(exampleLayers(), ocitest.Gzip)...).Dir, source.Config{})
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(out, []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = converter.Convert(ctx, src, out, converter.Options{Progress: cancelling{cancel, why}})
	if !errors.Is(err, why) {
		t.Errorf("error %v, expected %v", err, why)
	}
	checkUntouched(t, out)
}

// TestDamagedLayer: layers that wait for a damaged one end with it.
func TestDamagedLayer(t *testing.T) {
	var layers [][]byte
	// The next layer does not fit into the 32 MiB of waiting contents, nor do the last three together.
	for i, files := range []int{48, 40, 12, 12} {
		layers = append(layers, treeTar(uint64(i), files))
	}
	l := newLayout(t, packed(layers, ocitest.None)...)
	_, m := manifestOf(t, l)
	edit(t, l.BlobPath(m.Layers[0].Digest), func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
	out := filepath.Join(t.TempDir(), "image")
	for _, n := range []int{1, 2, 4} {
		src, err := source.Parse("oci:"+l.Dir, source.Config{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = converter.Convert(t.Context(), src, out, converter.Options{Concurrency: n})
		if !errors.Is(err, blob.ErrMismatch) || !strings.Contains(err.Error(), "layer 0 ") {
			t.Errorf("concurrency %d: error %v, expected that of layer 0", n, err)
		}
	}
	if left, err := os.ReadDir(filepath.Dir(out)); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestOutputMustBeAFile(t *testing.T) {
	src, err := source.Parse("oci:"+newLayout(t).Dir, source.Config{})
	if err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for out, want := range map[string]string{
		dir:         "is a directory, expected a regular file or nothing",
		"/dev/null": "is a device",
		fifo:        "is a pipe",
		filepath.Join(dir, "no", "image"): fmt.Sprintf("directory %q: no such file or directory",
			filepath.Join(dir, "no")),
		filepath.Join(dir, "no") + "/":               "no such file or directory",
		fifo + "/image":                              "not a directory",
		filepath.Join(dir, strings.Repeat("n", 256)): "file name too long",
	} {
		// The error comes before layers are read.
		unread := unread{t, src}
		if _, err := converter.Convert(context.Background(), unread, out, converter.Options{}); err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("output %q: error %v, expected it to say %q", out, err, want)
		}
	}
	checkOnly(t, dir)
}

// unread is a source whose image must not be requested.
type unread struct {
	t *testing.T
	source.Source
}

func (u unread) Image(ctx context.Context, p source.Platform) (*source.Image, error) {
	u.t.Error("the image was looked for before the output was found to be impossible")
	return u.Source.Image(ctx, p)
}

// TestFIFOForALayer: a blob that is a FIFO is an error and does not block.
func TestFIFOForALayer(t *testing.T) {
	l := newLayout(t, packed(exampleLayers(), ocitest.Gzip)...)
	_, m := manifestOf(t, l)
	blob := l.BlobPath(m.Layers[1].Digest)
	if err := os.Remove(blob); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(blob, 0o600); err != nil {
		t.Fatal(err)
	}
	out, _, err := convert(t, "oci:"+l.Dir, converter.Options{})
	if err == nil || !strings.Contains(err.Error(), "is not a regular file") {
		t.Errorf("error %v, expected that the blob is no file", err)
	}
	checkUntouched(t, out)
}

// TestOutputIsALink: the target of a link is replaced and the link stays. A link to anything but a
// file is refused before anything is created beside it.
func TestOutputIsALink(t *testing.T) {
	l := newLayout(t, packed(exampleLayers(), ocitest.Gzip)...)
	src, err := source.Parse("oci:"+l.Dir, source.Config{})
	if err != nil {
		t.Fatal(err)
	}
	dir, links := t.TempDir(), t.TempDir()
	for name, target := range map[string]string{
		"good": filepath.Join(dir, "image"), "dangling": filepath.Join(dir, "nothing"), "device": "/dev/null",
		"directory": dir,
	} {
		if err := os.Symlink(target, filepath.Join(links, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "image"), []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"dangling", "device", "directory"} {
		if _, err := converter.Convert(context.Background(), src, filepath.Join(links, name),
			converter.Options{}); err == nil {
			t.Errorf("converted to the link %q", name)
		}
	}
	checkUntouched(t, filepath.Join(dir, "image"))
	res, err := converter.Convert(context.Background(), src, filepath.Join(links, "good"), converter.Options{})
	if err != nil {
		t.Fatal(err)
	}
	checkOnly(t, dir, "image")
	checkOnly(t, links, "dangling", "device", "directory", "good")
	if fi, err := os.Lstat(filepath.Join(dir, "image")); err != nil || fi.Size() != res.BytesOut {
		t.Errorf("%v (%v), expected an image of %d bytes", fi, err, res.BytesOut)
	}
	if got, err := os.Readlink(filepath.Join(links, "good")); err != nil || got != filepath.Join(dir, "image") {
		t.Errorf("the link leads to %q (%v)", got, err)
	}
}
