package source

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/daxfs/daxfs-snapshotter/converter/layer"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// treeOf reads the one layer of a source that has no others. It returns what the layer does, path by path.
func treeOf(t *testing.T, name string, c Config, s *Store) map[string]layer.Change {
	t.Helper()
	img, err := mustParse(t, name, c).Image(t.Context(), Host())
	if err != nil {
		t.Fatal(err)
	}
	if img.Tree == nil || len(img.Layers) > 0 || img.Digest != "" || img.Manifest != nil {
		t.Fatalf("%s: found %+v, expected a tree and nothing else", name, img)
	}
	l, err := img.Tree(t.Context(), s, layer.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	changes := map[string]layer.Change{}
	for _, c := range Changes(l) {
		changes[c.Path] = c
	}
	return changes
}

// TestRootfs: a directory is one tree. As the upper directory of an overlay, its whiteouts remove names.
func TestRootfs(t *testing.T) {
	dir := t.TempDir()
	err := errors.Join(os.WriteFile(filepath.Join(dir, "file"), []byte("text"), 0o640),
		unix.Mknod(filepath.Join(dir, "gone"), unix.S_IFCHR, 0)) // Linux lets every user make this device
	if err != nil {
		t.Fatal(err)
	}
	for _, upper := range []bool{false, true} {
		changes := treeOf(t, "rootfs:"+dir, Config{OverlayUpper: upper}, new(Store))
		f := changes["file"]
		if f.Op != layer.OpAdd || f.Node.Mode != unix.S_IFREG|0o640 ||
			f.Node.Data.Sum != sha256.Sum256([]byte("text")) {
			t.Errorf("upper %t: the file is %+v", upper, f)
		}
		want := layer.OpAdd
		if upper {
			want = layer.OpRemove
		}
		if got := changes["gone"].Op; got != want {
			t.Errorf("upper %t: the whiteout is the operation %v, expected %v", upper, got, want)
		}
	}
	for name, says := range map[string]string{
		"rootfs:" + dir + "/file": `/file" is not a directory`,
		"rootfs:" + dir + "/none": "no such file or directory",
	} {
		_, err := mustParse(t, name, Config{}).Image(t.Context(), Host())
		if err == nil || !strings.HasPrefix(err.Error(), name+": ") || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: error %v, expected one that says %q", name, err, says)
		}
	}
}

// TestImageFile: an image is used only if it is sound; with a digest table, its contents must be proven, too.
func TestImageFile(t *testing.T) {
	st := new(Store)
	text := strings.Repeat("contents", 100)
	data, err := st.Put(t.Context(), int64(len(text)), strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	image := func(digests bool) []byte {
		root := &daxfs.Node{Mode: unix.S_IFDIR | 0o755, Entries: map[string]*daxfs.Node{
			"file": {Mode: unix.S_IFREG | 0o644, Data: data},
		}}
		b, err := st.Image(root, daxfs.Options{Digests: digests})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	file := filepath.Join(t.TempDir(), "image")
	name := "daxfs:" + file
	const super = 1024
	footer := func(b []byte) []byte { return b[bytes.LastIndex(b, []byte("DAXFSsum")):] }
	keep := func(b []byte) []byte { return b }
	other := func(b []byte) []byte { b[data.Off]++; return b }
	for what, c := range map[string]struct {
		digests bool
		spoil   func(b []byte) []byte
		is      error // nil: it is taken
		says    string
	}{
		"sound":              {false, keep, nil, ""},
		"sound with digests": {true, keep, nil, ""},
		"unproven contents":  {false, other, nil, ""},
		"other contents":     {true, other, daxfs.ErrCorrupt, "the image is damaged"},
		"no superblock": {
			false, func(b []byte) []byte { b[super]++; return b },
			daxfs.ErrCorrupt, "not an image of daxfs convert",
		},
		"too short": {
			false, func([]byte) []byte { return []byte("text") },
			daxfs.ErrCorrupt, "not an image of daxfs convert",
		},
		"other metadata": {
			false, func(b []byte) []byte { b[len(b)-1]++; return b },
			daxfs.ErrCorrupt, "the image is damaged",
		},
		"digests of another version": {true, func(b []byte) []byte {
			f := footer(b)
			f[8]++
			root := sha256.Sum256(f[:128])
			copy(f[128:], root[:])
			return b
		}, daxfs.ErrUnsupported, "its contents cannot be proven"},
	} {
		if err := os.WriteFile(file, c.spoil(image(c.digests)), 0o600); err != nil {
			t.Fatal(err)
		}
		if c.is == nil {
			into := new(Store)
			f := treeOf(t, name, Config{}, into)["file"]
			if f.Op != layer.OpAdd || f.Node.Mode != unix.S_IFREG|0o644 || f.Node.Data.Size != data.Size {
				t.Errorf("%s: the file is %+v", what, f)
			}
			continue
		}
		img, err := mustParse(t, name, Config{}).Image(t.Context(), Host())
		var fe *daxfs.FormatError
		if !errors.Is(err, c.is) || !errors.As(err, &fe) || !strings.Contains(err.Error(), c.says) ||
			!strings.HasPrefix(err.Error(), name+": ") {
			t.Errorf("%s: found %+v, error %v; expected %v that says %q", what, img, err, c.is, c.says)
		}
		if advice := "(daxfs verify " + file; !strings.Contains(c.says, "not an image") &&
			!strings.Contains(err.Error(), advice) {
			t.Errorf("%s: error %v, expected it to say %q", what, err, advice)
		}
	}
	for path, says := range map[string]string{
		file + "-none": "no such file", filepath.Dir(file): "not a regular file",
	} {
		if _, err := mustParse(t, "daxfs:"+path, Config{}).Image(t.Context(), Host()); err == nil ||
			!strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: error %v, expected one that says %q", path, err, says)
		}
	}
	boom := errors.New("boom")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(boom)
	for _, digests := range []bool{false, true} {
		if err := os.WriteFile(file, image(digests), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err = mustParse(t, name, Config{}).Image(ctx, Host())
		if !errors.Is(err, boom) || errors.Is(err, daxfs.ErrCorrupt) {
			t.Errorf("digests %t: error %v, expected %v and no word about the image", digests, err, boom)
		}
	}
}

// imagesServer is containerd's service of images with the same list in one namespace.
type imagesServer struct {
	imagesapi.UnimplementedImagesServer
	namespace string
	list      []*imagesapi.Image
}

func (s *imagesServer) List(
	ctx context.Context, _ *imagesapi.ListImagesRequest,
) (*imagesapi.ListImagesResponse, error) {
	if ns, _ := namespaces.Namespace(ctx); ns != s.namespace {
		return nil, fmt.Errorf("asked for namespace %q", ns)
	}
	return &imagesapi.ListImagesResponse{Images: s.list}, nil
}

// TestContainerdImages: an image with several names is listed once, from the namespace that was asked for.
func TestContainerdImages(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	is := &imagesServer{namespace: "some"}
	for _, name := range []string{"a:1", "a:2", "b:1"} {
		d := &types.Descriptor{Digest: digest.FromString(name[:1]).String()}
		is.list = append(is.list, &imagesapi.Image{Name: name, Target: d})
	}
	server := grpc.NewServer()
	imagesapi.RegisterImagesServer(server, is)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	for _, address := range []string{socket, "unix://" + socket} { // nerdctl writes the latter
		got, err := ContainerdImages(t.Context(), address, "some")
		if want := []string{"a:1", "b:1"}; err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: images %q (%v), expected %q", address, got, err, want)
		}
	}
	for _, c := range []struct{ address, namespace, says string }{
		{socket, "other", `images of namespace "other" in containerd at "` + socket + `"`},
		{socket + "-none", "some", "containerd does not answer"},
	} {
		got, err := ContainerdImages(t.Context(), c.address, c.namespace)
		if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), c.address) {
			t.Errorf("%s: images %q, error %v; expected one that says %q", c.address, got, err, c.says)
		}
	}
	// The client of a source is the same, and belongs to it.
	src := mustParse(t, "containerd:none", Config{Address: "unix://" + socket, Namespace: "some"})
	if _, err := src.Image(t.Context(), Host()); err == nil || !strings.HasPrefix(err.Error(), "containerd:none: ") {
		t.Errorf("error %v, expected one that names the source", err)
	}
}
