package converter_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/converter"
	"github.com/daxfs/daxfs-snapshotter/internal/ocitest"
)

// TestSize: the image of this machine's /usr, gaps before large files included, has at most 1.02 times
// the pages of the distinct contents, plus 400 bytes for each entry.
func TestSize(t *testing.T) {
	if testing.Short() {
		t.Skip("slow: converts 220 MiB twice")
	}
	layers := [][]byte{
		ocitest.TarTree(t, 100<<20, "/usr/lib/x86_64-linux-gnu", "/usr/lib64"),
		ocitest.TarTree(t, 60<<20, "/usr/bin", "/usr/sbin"),
		ocitest.TarTree(t, 60<<20, "/usr/share", "/usr/include"),
	}
	var pages int64 // nothing in one layer hides anything in another
	seen := map[[sha256.Size]byte]bool{}
	for _, l := range layers {
		for r := tar.NewReader(bytes.NewReader(l)); ; {
			hdr, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			h := sha256.New()
			if _, err := io.Copy(h, r); err != nil {
				t.Fatal(err)
			}
			if sum := [sha256.Size]byte(h.Sum(nil)); !seen[sum] {
				seen[sum] = true
				pages += (hdr.Size + 4095) / 4096 * 4096
			}
		}
	}
	for _, noAlign := range []bool{false, true} {
		_, res := mustConvert(t, "oci:"+newLayout(t, packed(layers, ocitest.None)...).Dir,
			converter.Options{NoAlign: noAlign})
		bound := pages + pages/50 + 400*int64(res.Stats.Names)
		t.Logf("unaligned %v: %d entries, contents %d bytes in pages, "+
			"image %d bytes (%.3f x, %d for each entry), bound %d",
			noAlign, res.Stats.Names, pages, res.BytesOut, float64(res.BytesOut)/float64(pages),
			(res.BytesOut-pages)/int64(res.Stats.Names), bound)
		if res.BytesOut > bound {
			t.Errorf("the image has %d bytes, expected at most %d", res.BytesOut, bound)
		}
	}
}
