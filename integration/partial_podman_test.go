package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// podmanCompress writes layers with containers/storage, the library of podman, buildah and skopeo.
func podmanCompress(t *testing.T) func(w io.Writer, raw io.Reader) (map[string]string, error) {
	program, err := stack.Program("podman-compress")
	if err != nil {
		t.Fatal(err)
	}
	return func(w io.Writer, raw io.Reader) (annotations map[string]string, err error) {
		name := filepath.Join(t.TempDir(), "blob")
		cmd := exec.Command(program, name)
		cmd.Stdin = raw
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", program, err)
		}
		if err := json.Unmarshal(out, &annotations); err != nil {
			return nil, err
		}
		blob, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		_, err = w.Write(blob)
		return annotations, err
	}
}

// The daemon, with a real containerd, pulls layers written by podman's library by their files, in each
// way of telling containerd: it fetches none of their blobs, and sees the tree of a full pull.
func TestPartialPullOfPodman(t *testing.T) {
	stack.Require(t)
	first, second := versions(t, 400, 5)
	// podman cuts one file into chunks, half of which are holes.
	large := append(testimage.Noise(1, 200<<10), make([]byte, 1<<20)...)
	second[1] = append(second[1], testimage.File("large", 0o644, append(large, testimage.Noise(2, 100<<10)...)))
	old, err := testimage.Chunked(first...)
	if err != nil {
		t.Fatal(err)
	}
	img, err := testimage.ChunkedBy(podmanCompress(t), second...)
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for name, parallel := range map[string]int{"exists": 1, "staged": 3} {
		t.Run(name, func(t *testing.T) {
			s := stack.New(t, stack.Options{Mode: stack.Streaming, ParallelUnpacks: parallel})
			s.Pull(s.Push("podman-v1", old), "daxfs")
			ref := s.Push("podman-v2", img)
			before := s.Registry.Sent()
			s.Pull(ref, "daxfs")
			sent, blobs := s.Registry.Sent()-before, layersSize(t, img)
			t.Logf("%d bytes were sent of layers with %d", sent, blobs)
			if sent > blobs/2 {
				t.Errorf("%d bytes were sent of layers with %d", sent, blobs)
			}
			// The first layer, busybox, is that of v1 in another encoding: containerd already has its chain ID.
			if got := pulledByFiles(t, s); got != len(m.Layers)-1 {
				t.Errorf("%d layers were pulled by their files, expected %d", got, len(m.Layers)-1)
			}
			has := s.Ctr("content", "ls", "-q")
			for _, l := range m.Layers[1:] {
				if l.Annotations[chunked.AnnotationTarSplitPosition] == "" {
					t.Fatalf("annotations %v: podman writes no tar-split", l.Annotations)
				}
				if strings.Contains(has, l.Digest.String()) {
					t.Errorf("containerd has blob %s", l.Digest)
				}
			}
			s.Run(ref, "daxfs", "c", "/bin/true")
			s.Pull(ref, "overlayfs")
			s.Compare(ref)
		})
	}
}
