package converter_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
	. "github.com/daxfs/daxfs-snapshotter/internal/treetest"
)

// sparseTar is a layer with one file of zeros before end, as written by GNU tar in PAX format.
func sparseTar(t testing.TB, name string, size int64, end string) []byte {
	t.Helper()
	chunks := fmt.Sprintf("1\n%d\n%d\n", size-int64(len(end)), len(end))
	body := make([]byte, 512, 512+len(end))
	copy(body, chunks)
	body = append(body, end...)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	pax := PAXRecord("GNU.sparse.major", "1") + PAXRecord("GNU.sparse.minor", "0") +
		PAXRecord("GNU.sparse.name", name) +
		PAXRecord("GNU.sparse.realsize", fmt.Sprint(size))
	// Go's writer refuses these records, so write the extended header as a file.
	for _, e := range []struct {
		typ  byte
		name string
		body []byte
	}{{tar.TypeReg, "PaxHeaders", []byte(pax)}, {tar.TypeReg, "GNUSparseFile/" + name, body}} {
		if err := w.WriteHeader(&tar.Header{
			Typeflag: e.typ, Name: e.name, Size: int64(len(e.body)),
			Mode: 0o644,
		}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	raw := b.Bytes()
	raw[156] = tar.TypeXHeader
	SetChecksum(raw)
	return raw
}

// TestLargeFile: sizes of more than 31 and 32 bits, and files that share all contents but the last bytes.
func TestLargeFile(t *testing.T) {
	if testing.Short() {
		t.Skip("reads 7 GiB of zeros")
	}
	const two, four = 2<<30 + 5, 4<<30 + 4097
	l := newLayout(t,
		ocitest.Layer{Tar: sparseTar(t, "two", two, "end of two"), Compression: ocitest.Gzip},
		ocitest.Layer{Tar: sparseTar(t, "four", four, "end of four"), Compression: ocitest.Gzip})
	out, res, err := convert(t, "oci:"+l.Dir, converter.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if res.BytesOut < two+four {
		t.Errorf("the image has %d bytes", res.BytesOut)
	}
	f, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := daxfs.Open(f, res.BytesOut)
	if err != nil {
		t.Fatal(err)
	}
	for name, size := range map[string]int64{"two": two, "four": four} {
		in, err := img.Lookup(name, false)
		if err != nil || in.Size != size {
			t.Fatalf("%s: %d bytes (%v), expected %d", name, in.Size, err, size)
		}
		want := "\x00end of " + name
		got := make([]byte, len(want))
		if _, err := in.ReadAt(got, size-int64(len(want))); err != nil && err != io.EOF || string(got) != want {
			t.Errorf("%s ends with %q (%v), expected %q", name, got, err, want)
		}
	}
	if err := daxfs.Check(f, res.BytesOut, func(f daxfs.Finding) bool {
		t.Errorf("Check: %v", f)
		return true
	}); err != nil {
		t.Error(err)
	}
}
