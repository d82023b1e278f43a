package converter_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/converter/source"
	"github.com/daxfs/daxfs-snapshotter/converter/tree"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
)

// TestSameBytes: the image depends only on the layers.
func TestSameBytes(t *testing.T) {
	tars := exampleLayers()
	var want []byte
	same := func(what, src string, o converter.Options) *converter.Result {
		t.Helper()
		got, res := mustConvert(t, src, o)
		if want == nil {
			want = got
		} else if !bytes.Equal(got, want) {
			t.Errorf("%s: another image (%d bytes, expected %d)", what, len(got), len(want))
		}
		return res
	}
	gz := newLayout(t, packed(tars, ocitest.Gzip)...)
	for _, n := range []int{1, 2, 8} {
		for _, memory := range []int64{1, 256 << 20} {
			res := same(fmt.Sprint("concurrency ", n), "oci:"+gz.Dir, converter.Options{Concurrency: n, Memory: memory})
			if res.Deduplicated < 3<<20 || res.Layers != 3 || len(res.LeftOut) != 3 {
				t.Errorf("unexpected result %+v", res)
			}
		}
	}
	for _, c := range []ocitest.Compression{ocitest.None, ocitest.Zstd} {
		same(string(c)+" layers", "oci:"+newLayout(t, packed(tars, c)...).Dir, converter.Options{})
	}
	dir := t.TempDir()
	gz.Archive(filepath.Join(dir, "oci.tar"))
	same("oci archive", "oci-archive:"+filepath.Join(dir, "oci.tar"), converter.Options{})
	ocitest.DockerArchive(t, filepath.Join(dir, "docker.tar"), "example:1", packed(tars, ocitest.None)...)
	same("docker archive", "docker-archive:"+filepath.Join(dir, "docker.tar"), converter.Options{})
	same("docker archive by name", "docker-archive:"+filepath.Join(dir, "docker.tar:docker.io/library/example:1"),
		converter.Options{})
	for _, name := range []string{"docker", "oci"} {
		for _, c := range []ocitest.Compression{ocitest.Gzip, ocitest.Zstd} {
			packed := filepath.Join(dir, name+"."+string(c))
			compress(t, filepath.Join(dir, name+".tar"), packed, c)
			same(string(c)+" "+name+" archive", name+"-archive:"+packed, converter.Options{})
		}
	}
	same("registry", "docker://"+push(t, gz.Dir), converter.Options{})
}

// TestFromImageFile: a converted image is a source of the same tree.
func TestFromImageFile(t *testing.T) {
	first, res := mustConvert(t, "oci:"+newLayout(t, packed(exampleLayers(), ocitest.Gzip)...).Dir, converter.Options{})
	file := filepath.Join(t.TempDir(), "image.daxfs")
	write := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(first)
	second, again := mustConvert(t, "daxfs:"+file, converter.Options{})
	if again.UUID != res.UUID || again.Stats != res.Stats || again.Layers != 0 || again.Digest != "" {
		t.Errorf("converted again: %+v, expected the tree of %+v", again, res)
	}
	write(second)
	if third, _ := mustConvert(t, "daxfs:"+file, converter.Options{}); !bytes.Equal(third, second) {
		t.Error("an image of the same tree, whose contents lie in the same order, is another one")
	}

	for name, c := range map[string]struct {
		change func(b []byte) []byte
		holds  []string
	}{
		"damaged": {func(b []byte) []byte {
			b[bytes.Index(b, []byte("welcome\n"))+100] ^= 1
			return b
		}, []string{"is damaged", "daxfs verify " + file}},
		"cut off":  {func(b []byte) []byte { return b[:len(b)-4096] }, []string{"daxfs:" + file}},
		"empty":    {func(b []byte) []byte { return nil }, []string{"not an image of daxfs convert"}},
		"no image": {func([]byte) []byte { return make([]byte, 1<<20) }, []string{"not an image of daxfs convert"}},
	} {
		write(c.change(bytes.Clone(first)))
		out, _, err := convert(t, "daxfs:"+file, converter.Options{})
		for _, part := range c.holds {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%s: error %v, expected %q in it", name, err, part)
			}
		}
		if got, _ := os.ReadFile(out); string(got) != before {
			t.Errorf("%s: the output was changed", name)
		}
	}
	for name, want := range map[string]string{
		"daxfs:" + t.TempDir(): "not a regular file",
		"daxfs:/nowhere":       "no such file",
	} {
		if _, _, err := convert(t, name, converter.Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, expected %q in it", name, err, want)
		}
	}
}

// push serves the image of a layout from a registry in this process and returns its reference.
func push(t testing.TB, dir string) string {
	t.Helper()
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	idx, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(strings.TrimPrefix(srv.URL, "http://") + "/some/image:tag")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, idx); err != nil {
		t.Fatal(err)
	}
	return ref.Name()
}

func compress(t *testing.T, from, to string, c ocitest.Compression) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, ocitest.Pack(t, b, c), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestRootfs: a directory and a layer of the same content give the same image.
func TestRootfs(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "root")
	if err := os.MkdirAll(filepath.Join(dir, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, body := range map[string]string{"a": "a", "etc/b": noise(1, 100_000), "etc/c": noise(2, 3<<20)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "etc/a")); err != nil {
		t.Fatal(err)
	}
	first, res := mustConvert(t, "rootfs:"+dir, converter.Options{})
	if res.Stats.Files != 3 || res.Stats.Names != 5 {
		t.Errorf("%d files with %d names, expected 3 and 5", res.Stats.Files, res.Stats.Names)
	}
	if again, _ := mustConvert(t, "rootfs:"+dir, converter.Options{}); !bytes.Equal(first, again) {
		t.Error("the second image differs from the first")
	}
}

func TestImageWithoutLayers(t *testing.T) {
	_, res := mustConvert(t, "oci:"+newLayout(t).Dir, converter.Options{})
	if res.Stats.Inodes != 1 {
		t.Errorf("%d inodes, expected the root alone", res.Stats.Inodes)
	}
}

// TestOutputIsReplaced: by a file with default permissions, and nothing else is left beside it.
func TestOutputIsReplaced(t *testing.T) {
	l := newLayout(t, packed(exampleLayers(), ocitest.Gzip)...)
	out, _, err := convert(t, "oci:"+l.Dir, converter.Options{Sync: true})
	if err != nil {
		t.Fatal(err)
	}
	checkOnly(t, filepath.Dir(out), "image")
	fi, err := os.Stat(out)
	if err != nil {
		t.Fatal(err)
	}
	mask := unix.Umask(0)
	unix.Umask(mask)
	if want := os.FileMode(0o666 &^ mask); fi.Mode() != want {
		t.Errorf("mode %v, expected %v", fi.Mode(), want)
	}
}

// TestLongName: the temporary name fits any file system that accepts the output's name.
func TestLongName(t *testing.T) {
	dir := t.TempDir()
	name := strings.Repeat("n", 255)
	src, err := source.Parse("oci:"+newLayout(t, packed(exampleLayers(), ocitest.Gzip)...).Dir, source.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := converter.Convert(context.Background(), src, filepath.Join(dir, name),
		converter.Options{}); err != nil {
		t.Fatal(err)
	}
	checkOnly(t, dir, name)
}

// checkOnly fails unless a directory holds exactly these names.
func checkOnly(t *testing.T, dir string, want ...string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range list {
		got = append(got, e.Name())
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("the directory holds %q, expected %q", got, want)
	}
}

// TestNoXattrs: the image equals that of layers without xattrs, and the result lists the lost ones.
func TestNoXattrs(t *testing.T) {
	with := exampleLayers()
	got, res := mustConvert(t, "oci:"+newLayout(t, packed(with, ocitest.None)...).Dir,
		converter.Options{NoXattrs: true})
	want := []tree.LostXattr{
		{Name: "security.capability", Inodes: 1, Path: "opt/ping"},
		{Name: "user.note", Inodes: 1, Path: "opt/user"},
	}
	if !slices.Equal(res.LostXattrs, want) {
		t.Errorf("lost %+v, expected %+v", res.LostXattrs, want)
	}
	without := exampleLayers()
	for i, l := range without {
		without[i] = tarWithoutXattrs(t, l)
	}
	expected, res := mustConvert(t, "oci:"+newLayout(t, packed(without, ocitest.None)...).Dir, converter.Options{})
	if !bytes.Equal(got, expected) || len(res.LostXattrs) > 0 {
		t.Errorf("the image is not that of layers without attributes, or of those something was lost: %+v",
			res.LostXattrs)
	}
}

// tarWithoutXattrs repacks a tar without extended attributes.
func tarWithoutXattrs(t *testing.T, old []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	r, w := tar.NewReader(bytes.NewReader(old)), tar.NewWriter(&out)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err == nil {
			err = w.WriteHeader(&tar.Header{
				Typeflag: h.Typeflag, Name: h.Name, Linkname: h.Linkname, Size: h.Size, Mode: h.Mode,
				Uid: h.Uid, Gid: h.Gid,
				ModTime: h.ModTime, Devmajor: h.Devmajor, Devminor: h.Devminor, Format: tar.FormatPAX,
			})
		}
		if err == nil {
			_, err = io.Copy(w, r)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
