// Package podman tests our reader of zstd:chunked with the writer of podman, buildah and skopeo. It is
// a module of its own, because the product does not depend on that library.
package podman

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/storage/pkg/chunked/compressor"

	"github.com/daxfs/daxfs-snapshotter/converter/chunked"
)

type blob struct {
	b       []byte
	fetched int64
}

func (b *blob) Part(_ context.Context, from, to int64) ([]byte, error) {
	b.fetched += to - from
	return bytes.Clone(b.b[from:to]), nil
}

type contents map[[32]byte][]byte

func (c contents) Find(sum [32]byte, size int64) (io.ReaderAt, bool) {
	b, ok := c[sum]
	return bytes.NewReader(b), ok && int64(len(b)) == size
}

// entry is an entry of the test's tar.
type entry struct {
	tar.Header
	body []byte
}

func entries() []entry {
	rng := rand.New(rand.NewPCG(1, 2))
	text := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.IntN(60))
		}
		return b
	}
	long := strings.Repeat("a-long-name-", 20) + "/"
	holes := append(append(text(10_000), make([]byte, 3<<20)...), text(10)...)
	all := []entry{
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755}},
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: "./dir/", Mode: 0o1777}},
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: long, Mode: 0o755}},
		{Header: tar.Header{Name: "empty", Mode: 0o644}},
		{Header: tar.Header{Name: "zeros", Mode: 0o644}, body: make([]byte, 5000)},
		{Header: tar.Header{Name: "holes", Mode: 0o644}, body: holes},
		{Header: tar.Header{Name: "large", Mode: 0o4755}, body: text(5 << 20)},
		{Header: tar.Header{Name: "ünïcode", Mode: 0o644}, body: text(10)},
		{Header: tar.Header{Name: "latin-\xfc", Mode: 0o644, Format: tar.FormatGNU}, body: text(10)},
		{Header: tar.Header{Name: long + "file", Mode: 0o644}, body: text(100)},
		{Header: tar.Header{
			Name: "xattr", Mode: 0o755, PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"},
			Format: tar.FormatPAX,
		}, body: text(1000)},
		{Header: tar.Header{Typeflag: tar.TypeLink, Name: "hard", Linkname: "large"}},
		{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: "soft", Linkname: "large"}},
		{Header: tar.Header{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3}},
		{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "fifo"}},
		{Header: tar.Header{Name: "dir/.wh.gone"}},
	}
	for i := range 300 {
		all = append(all,
			entry{tar.Header{Name: fmt.Sprintf("dir/file-%d", i), Mode: 0o644}, text(1 + rng.IntN(20_000))})
	}
	return append(all, entry{tar.Header{Name: "again", Mode: 0o644}, all[len(all)-1].body})
}

// Layers written by podman's library are restored byte by byte, whichever of their files exist already.
func TestRead(t *testing.T) {
	all := entries()
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	for _, e := range all {
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
	raw.Write(make([]byte, 10<<10)) // tar pads to records
	var stored bytes.Buffer
	annotations := map[string]string{}
	z, err := compressor.ZstdCompressor(&stored, annotations, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := z.Write(raw.Bytes()); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	d := ocispec.Descriptor{Size: int64(stored.Len()), Annotations: annotations}
	for _, nth := range []int{0, 1, 2, 7} {
		have := contents{}
		for i, e := range all {
			if nth > 0 && i%nth == 0 {
				have[sha256.Sum256(e.body)] = e.body
			}
		}
		layout, err := chunked.ParseLayout(d)
		if err != nil {
			t.Fatal(err)
		}
		src := &blob{b: stored.Bytes()}
		tables, err := chunked.ReadTables(t.Context(), src, layout)
		if err != nil {
			t.Fatal(err)
		}
		plan := chunked.NewPlan(tables, have)
		r, err := plan.Tar(t.Context(), src, chunked.Options{SpoolDir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, raw.Bytes()) {
			t.Errorf("1 of %d files there: %d bytes with digest %s, expected %d with %s", nth, len(got),
				digest.FromBytes(got), raw.Len(), digest.FromBytes(raw.Bytes()))
		}
		t.Logf("1 of %d files there: %d bytes of %d were fetched", nth, src.fetched, stored.Len())
		if nth == 1 && plan.Fetch != 0 {
			t.Errorf("%d bytes are fetched although all is there", plan.Fetch)
		}
	}
}
