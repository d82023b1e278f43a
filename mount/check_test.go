package mount_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/treetest"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// daxfsImage makes an image with this project's writer.
func daxfsImage(t *testing.T, o daxfs.Options) mount.Source {
	t.Helper()
	contents := &treetest.Store{}
	data, err := contents.Put(t.Context(), 4, strings.NewReader("ours"))
	if err != nil {
		t.Fatal(err)
	}
	root := &daxfs.Node{Mode: 0o040755, Entries: map[string]*daxfs.Node{"file": {Mode: 0o100644, Data: data}}}
	img, err := contents.Image(root, o)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, img, 0o600); err != nil {
		t.Fatal(err)
	}
	return mount.Source{Key: "k", Size: int64(len(img)), Region: region.Info{Kind: region.KindFile, Path: path, FD: -1}}
}

func TestCheckImage(t *testing.T) {
	src := daxfsImage(t, daxfs.Options{})
	if err := mount.CheckImage(t.Context(), src); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(src.Region.Path)
	if err != nil {
		t.Fatal(err)
	}
	// Changing a byte of the superblocks, or of the metadata behind the data, must not crash the check.
	bad := 0
	for off := 0; off < len(b); off += 7 {
		c := append([]byte(nil), b...)
		c[off] ^= 0xff
		if err := os.WriteFile(src.Region.Path, c, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := mount.CheckImage(t.Context(), src); err != nil {
			if !errors.Is(err, mount.ErrCheck) {
				t.Fatalf("offset %d: %v, expected ErrCheck", off, err)
			}
			bad++
		}
	}
	if bad == 0 {
		t.Error("no damage was found")
	}
	for name, change := range map[string]func(s *mount.Source){
		"longer than the file": func(s *mount.Source) { s.Size += 4096 },
		"no path":              func(s *mount.Source) { s.Region.Path = "" },
		"no file":              func(s *mount.Source) { s.Region.Path += ".missing" },
		"not an image":         func(s *mount.Source) { s.Region.Path = "/proc/self/exe" },
	} {
		s := src
		change(&s)
		if err := mount.CheckImage(t.Context(), s); !errors.Is(err, mount.ErrCheck) {
			t.Errorf("%s: %v, expected ErrCheck", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := os.WriteFile(src.Region.Path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := mount.CheckImage(ctx, src); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestProveImage proves one image by its root hash, and no other by it.
func TestProveImage(t *testing.T) {
	src := daxfsImage(t, daxfs.Options{Digests: true})
	b, err := os.ReadFile(src.Region.Path)
	if err != nil {
		t.Fatal(err)
	}
	root, err := daxfs.ReadRootHash(daxfs.Mem(b), src.Size)
	if err != nil {
		t.Fatal(err)
	}
	if err := mount.ProveImage(t.Context(), src, root); err != nil {
		t.Error(err)
	}
	if err := mount.ProveImage(t.Context(), src, daxfs.RootHash{1}); !errors.Is(err, mount.ErrCheck) {
		t.Errorf("another hash: %v, expected ErrCheck", err)
	}
	if err := mount.ProveImage(t.Context(), daxfsImage(t, daxfs.Options{}), root); !errors.Is(err, mount.ErrCheck) {
		t.Errorf("an image without digests: %v, expected ErrCheck", err)
	}
	for off := 0; off < len(b); off += 101 {
		b[off] ^= 0x20
		if err := os.WriteFile(src.Region.Path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		b[off] ^= 0x20
		if err := mount.ProveImage(t.Context(), src, root); !errors.Is(err, mount.ErrCheck) {
			t.Errorf("a flip at %d: %v, expected ErrCheck", off, err)
		}
	}
}
