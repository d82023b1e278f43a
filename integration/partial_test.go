package integration

import (
	"crypto/sha256"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/zstd"

	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// versions makes two versions of an image from a seed: every twentieth file of three layers differs.
func versions(t testing.TB, files int, seed uint64) (old, new [][]testimage.Entry) {
	t.Helper()
	base, err := testimage.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	old, new = [][]testimage.Entry{base}, [][]testimage.Entry{base}
	for i := range uint64(3) {
		layer := testimage.SmallFiles(files, seed+i)
		old, new = append(old, layer), append(new, testimage.Updated(layer, 20))
	}
	return old, new
}

// needed returns the least that a host with the files of old has to fetch for new: each missing file,
// compressed by itself, and the tables of the missing layers.
func needed(t *testing.T, old, new [][]testimage.Entry, img v1.Image) (n int64) {
	t.Helper()
	have := map[[32]byte]bool{}
	for _, layer := range old {
		for _, e := range layer {
			have[sha256.Sum256(e.Body)] = true
		}
	}
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, layer := range new {
		for _, e := range layer {
			if sum := sha256.Sum256(e.Body); len(e.Body) > 0 && !have[sum] {
				have[sum] = true
				n += int64(len(z.EncodeAll(e.Body, nil)))
			}
		}
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers[1:] { // the base is that of old
		for _, key := range []string{chunked.AnnotationTOCPosition, chunked.AnnotationTarSplitPosition} {
			var offset, length int64
			if _, err := fmt.Sscanf(l.Annotations[key], "%d:%d:", &offset, &length); err != nil {
				t.Fatal(err)
			}
			n += length
		}
	}
	return n
}

// layersSize returns the size of an image's layers in bytes.
func layersSize(t *testing.T, img v1.Image) (n int64) {
	t.Helper()
	all, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range all {
		size, err := l.Size()
		if err != nil {
			t.Fatal(err)
		}
		n += size
	}
	return n
}

// An update fetches only files that the pool lacks, in each way of telling containerd that it need not
// fetch a layer, and gives the tree of a full pull. Clients fetch missing blobs when they need them.
func TestPartialPull(t *testing.T) {
	stack.Require(t)
	first, second := versions(t, 400, 0)
	old, err := testimage.Chunked(first...)
	if err != nil {
		t.Fatal(err)
	}
	img, err := testimage.Chunked(second...)
	if err != nil {
		t.Fatal(err)
	}
	gzip, err := testimage.Image(second...)
	if err != nil {
		t.Fatal(err)
	}
	whole, least := layersSize(t, gzip), needed(t, first, second, img)
	modes(t, func(t *testing.T, mode stack.Mode) {
		for name, parallel := range map[string]int{"exists": 1, "staged": 3} {
			t.Run(name, func(t *testing.T) {
				s := stack.New(t, stack.Options{Mode: mode, ParallelUnpacks: parallel})
				s.Pull(s.Push("app-v1", old), "daxfs")
				ref := s.Push("app-v2", img)
				before := s.Registry.Sent()
				s.Pull(ref, "daxfs")
				sent := s.Registry.Sent() - before
				t.Logf("%d bytes were sent: %.2f of the layers with gzip, %.2f of what is missing and the tables",
					sent, float64(sent)/float64(whole), float64(sent)/float64(least))
				if sent > whole*30/100 || sent > least*115/100 {
					t.Errorf("%d bytes were sent; the layers have %d with gzip, and %d are needed", sent, whole, least)
				}
				s.Run(ref, "daxfs", "c", "/bin/true")

				if out := s.Ctr("image", "check", "--snapshotter", "daxfs",
					"name=="+ref); !strings.Contains(out, "incomplete") {
					t.Errorf("containerd has all blobs: %s", out)
				}
				export := []string{"image", "export", filepath.Join(s.Dir, "export.tar"), ref}
				if _, err := s.Try("ctr", export...); err == nil || !strings.Contains(err.Error(), "not found") {
					t.Errorf("export of what is not there: %v", err)
				}
				if mode == stack.Streaming {
					s.Nerdctl("save", "-o", filepath.Join(s.Dir, "save.tar"), ref) // fetches missing blobs
				} else {
					s.Ctr("content", "fetch", "--plain-http", ref)
				}
				s.Ctr(export...)
				s.Pull(ref, "overlayfs")
				s.Compare(ref)
			})
		}
	})
}

// packagesUpdated returns the entries of a layer with new contents in all files of every n-th
// directory, like a base rebuilt from partly new packages.
func packagesUpdated(entries []testimage.Entry, n int) []testimage.Entry {
	out := slices.Clone(entries)
	dirs, last := 0, ""
	for i, e := range out {
		if len(e.Body) == 0 {
			continue
		}
		if dir := path.Dir(e.Name); dir != last {
			dirs, last = dirs+1, dir
		}
		if dirs%n == 0 {
			out[i] = testimage.File(e.Name, e.Mode, testimage.Noise(uint64(i), len(e.Body)))
		}
	}
	return out
}

// BenchmarkPartialPull measures a pull until the image is complete, over a line of 100 Mbit/s, by
// files and as a whole: of an image with a few new files, of one in which a quarter is new, together
// or scattered, and of images of which the pool has nothing.
func BenchmarkPartialPull(b *testing.B) {
	first, second := versions(b, 4000, 0)
	other, _ := versions(b, 4000, 0)
	for i := range other {
		other[i] = testimage.Updated(other[i], 1)
	}
	rebuilt, scattered := [][]testimage.Entry{first[0]}, [][]testimage.Entry{first[0]}
	for _, l := range first[1:] {
		rebuilt, scattered = append(rebuilt, packagesUpdated(l, 4)), append(scattered, testimage.Updated(l, 4))
	}
	for _, c := range []struct {
		name       string
		old, pulls [][]testimage.Entry
	}{
		{"update", first, second},
		{"rebuilt", first, rebuilt},
		{"scattered", first, scattered},
		{"unrelated", other[1:], second},
		{"empty", nil, second},
	} {
		img, err := testimage.Chunked(c.pulls...)
		if err != nil {
			b.Fatal(err)
		}
		for _, enabled := range []bool{true, false} {
			b.Run(fmt.Sprintf("%s/files=%v", c.name, enabled), func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					s := stack.New(b, stack.Options{
						Mode: stack.Streaming, ParallelUnpacks: 3,
						Config: fmt.Sprintf("[partial]\nenabled = %v\n", enabled),
					})
					if c.old != nil {
						old, err := testimage.Chunked(c.old...)
						s.Must(err)
						s.Pull(s.Push("old", old), "daxfs")
					}
					ref := s.Push("new", img)
					s.Registry.Throttle(100e6 / 8)
					sent := s.Registry.Sent()
					b.StartTimer()
					s.Pull(ref, "daxfs")
					b.StopTimer()
					b.ReportMetric(float64(s.Registry.Sent()-sent)/1e6, "MB-sent")
					s.Must(s.Close()) // two concurrent stacks would end each other's processes
					b.StartTimer()
				}
			})
		}
	}
}
