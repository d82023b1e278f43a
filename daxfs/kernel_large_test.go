package daxfs_test

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"golang.org/x/sys/unix"
)

// TestKernelLarge has contents of more than 32 bits and block numbers with the highest bit set, in a
// sparse file: metadata high above the data, and a window the other way round.
func TestKernelLarge(t *testing.T) {
	const (
		tib  = 1 << 40
		size = 5<<30 + 123
	)
	mark := []byte("the end of a large file")
	big := &daxfs.Node{Mode: unix.S_IFREG | 0o644, Data: daxfs.Data{Off: 9 * tib, Size: size}}
	low := &daxfs.Node{Mode: unix.S_IFREG | 0o644, Data: daxfs.Data{Off: 64 << 20, Size: 5}}
	root := dir(map[string]*daxfs.Node{"big": big, "low": low, "link": symlink("big")})
	p, err := daxfs.NewPlan(root, daxfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, pl := range map[string]daxfs.Placement{
		"file":   {Image: 0, Meta: 10 * tib, End: 10*tib + p.MetaSize()},
		"window": {Image: 32 << 20, Meta: 32<<20 + daxfs.BlockSize, End: 9*tib + 6<<30},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "sparse")
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(pl.End); err != nil {
				t.Skipf("no file of %d bytes here: %v", pl.End, err)
			}
			writeAt(t, f, mark, big.Data.Off+size-int64(len(mark)))
			writeAt(t, f, []byte("small"), low.Data.Off)
			if err := p.Place(pl); err != nil {
				t.Fatal(err)
			}
			if err := p.WriteTo(io.NewOffsetWriter(f, pl.Image)); err != nil {
				t.Fatal(err)
			}
			for _, backing := range []string{"file", "loop"} {
				t.Run(backing, func(t *testing.T) {
					mountNamespace(t)
					mnt, _ := mountImage(t, backing, path, pl.Image, pl.End-pl.Image)
					got, err := os.ReadFile(filepath.Join(mnt, "low"))
					if err != nil || string(got) != "small" {
						t.Errorf("low: %q, %v", got, err)
					}
					b, err := os.Open(filepath.Join(mnt, "link"))
					if err != nil {
						t.Fatal(err)
					}
					defer b.Close()
					if info, err := b.Stat(); err != nil || info.Size() != size {
						t.Errorf("big: %v, %v", info, err)
					}
					end := make([]byte, len(mark))
					if _, err := b.ReadAt(end, size-int64(len(end))); err != nil || !bytes.Equal(end, mark) {
						t.Errorf("the end of big: %q, %v", end, err)
					}
				})
			}
		})
	}
}

func writeAt(t testing.TB, f *os.File, p []byte, off int64) {
	t.Helper()
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}
