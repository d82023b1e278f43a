package podman

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	"go.podman.io/storage"
	graphdriver "go.podman.io/storage/drivers"
	"go.podman.io/storage/pkg/archive"
	podchunked "go.podman.io/storage/pkg/chunked"
	"go.podman.io/storage/pkg/chunked/compressor"
	"go.podman.io/storage/pkg/reexec"

	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
)

func TestMain(m *testing.M) {
	if reexec.Init() { // the library unpacks in its own processes
		return
	}
	os.Exit(m.Run())
}

// rawTar is a tar of the entries, without the one whose name containers/storage cannot put into a table of contents.
func rawTar(t testing.TB, all []entry) []byte {
	t.Helper()
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	for _, e := range all {
		if e.Name == "latin-\xfc" {
			continue
		}
		e.Size = int64(len(e.body))
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	raw.Write(make([]byte, 10<<10))
	return raw.Bytes()
}

// seekable serves parts of a blob to containers/storage, like a registry, and counts them.
type seekable struct {
	b       []byte
	fetched int
}

func (s *seekable) GetBlobAt(chunks []podchunked.ImageSourceChunk) (chan io.ReadCloser, chan error, error) {
	streams, errs := make(chan io.ReadCloser), make(chan error)
	for _, c := range chunks {
		s.fetched += int(c.Length)
	}
	go func() {
		defer close(streams)
		defer close(errs)
		for _, c := range chunks {
			streams <- io.NopCloser(bytes.NewReader(s.b[c.Offset : c.Offset+c.Length]))
		}
	}()
	return streams, errs, nil
}

// newStorage makes a storage like podman's.
func newStorage(t testing.TB) storage.Store {
	t.Helper()
	dir := t.TempDir()
	s, err := storage.GetStore(storage.StoreOptions{
		GraphRoot: filepath.Join(dir, "root"), RunRoot: filepath.Join(dir, "run"), GraphDriverName: "overlay",
		PullOptions: map[string]string{"enable_partial_images": "true"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := s.Shutdown(true); err != nil {
			t.Error(err)
		}
	})
	return s
}

// tarOf returns the digest of the tar that a storage makes from one of its layers.
func tarOf(t testing.TB, s storage.Store, id string) digest.Digest {
	t.Helper()
	plain := archive.Uncompressed
	rc, err := s.Diff("", id, &storage.DiffOptions{Compression: &plain})
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	d, err := digest.FromReader(rc)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// partial pulls a layer like podman from a registry, and returns the number of fetched bytes.
func partial(t testing.TB, s storage.Store, id string, stored []byte, e *chunked.Encoded) int {
	t.Helper()
	src := &seekable{b: stored}
	differ, err := podchunked.NewDiffer(t.Context(), s, e.Digest, e.Size, e.Annotations, src)
	if err != nil {
		t.Fatal(err)
	}
	defer differ.Close()
	out, err := s.PrepareStagedLayer(nil, differ)
	if err != nil {
		t.Fatal(err)
	}
	if out.UncompressedDigest != e.DiffID {
		t.Errorf("%s: found diff ID %s, expected %s", id, out.UncompressedDigest, e.DiffID)
	}
	_, err = s.ApplyStagedLayer(storage.ApplyStagedLayerOptions{
		ID: id, DiffOutput: out, DiffOptions: &graphdriver.ApplyDiffWithDifferOpts{},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := tarOf(t, s, id); got != e.DiffID {
		t.Errorf("%s: makes a tar with digest %s of it, expected %s", id, got, e.DiffID)
	}
	return src.fetched
}

// containers/storage pulls our layers partially and in full. Of the second version of a layer it
// fetches the files that the first one lacks. (Where files can share blocks it also reuses chunks.)
func TestWrite(t *testing.T) {
	s := newStorage(t)
	first := entries()
	first = append(first, entry{tar.Header{Name: "huge", Mode: 0o644}, noise(9 << 20)})
	second := append([]entry{{tar.Header{Name: "new", Mode: 0o644}, noise(300_000)}}, first...)
	for n, all := range [][]entry{first, second} {
		raw := rawTar(t, all)
		var stored bytes.Buffer
		e, err := chunked.Encode(t.Context(), &stored, bytes.NewReader(raw), 0)
		if err != nil {
			t.Fatal(err)
		}
		fetched := partial(t, s, fmt.Sprint("partial", n), stored.Bytes(), e)
		t.Logf("version %d: %d bytes of %d were fetched", n+1, fetched, stored.Len())
		if n == 1 && fetched > 350_000 {
			t.Errorf("%d bytes of %d were fetched, expected those of the new file and the tables",
				fetched, stored.Len())
		}
		id := fmt.Sprint("full", n)
		l, _, err := s.PutLayer(id, "", nil, "", false, nil, bytes.NewReader(stored.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		if l.UncompressedDigest != e.DiffID || tarOf(t, s, id) != e.DiffID {
			t.Errorf("pulled in full: diff ID %s, makes %s of it, expected %s", l.UncompressedDigest,
				tarOf(t, s, id), e.DiffID)
		}
	}
}

// noise returns incompressible bytes, the same each time.
func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(b)
	return b
}

// BenchmarkEncode encodes a tar, DAXFS_LAYER or that of TestRead, with our encoder and containers/storage's.
func BenchmarkEncode(b *testing.B) {
	raw := rawTar(b, entries())
	if name := os.Getenv("DAXFS_LAYER"); name != "" {
		var err error
		if raw, err = os.ReadFile(name); err != nil {
			b.Fatal(err)
		}
	}
	run := func(name string, encode func(w io.Writer) error) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(raw)))
			var out bytes.Buffer
			for b.Loop() {
				out.Reset()
				if err := encode(&out); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(out.Len()), "blob-bytes")
		})
	}
	run("daxfs", func(w io.Writer) error {
		_, err := chunked.Encode(b.Context(), w, bytes.NewReader(raw), 0)
		return err
	})
	run("containers-storage", func(w io.Writer) error {
		z, err := compressor.ZstdCompressor(w, map[string]string{}, nil)
		if err != nil {
			return err
		}
		if _, err := z.Write(raw); err != nil {
			return err
		}
		return z.Close()
	})
}
