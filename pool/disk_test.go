package pool

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/internal/testns"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// smallTmpfs and smallExt4 mount a filesystem of size bytes on dir.
func smallTmpfs(t *testing.T, dir string, size int64) {
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprint("size=", size)); err != nil {
		t.Fatal(err)
	}
}

func smallExt4(t *testing.T, dir string, size int64) {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, size); err != nil {
		t.Fatal(err)
	}
	for _, argv := range [][]string{{"mkfs.ext4", "-q", "-F", "-m", "0", disk}, {"mount", "-o", "loop", disk, dir}} {
		out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		if errors.Is(err, exec.ErrNotFound) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatalf("%q: %v\n%s", argv, err, out)
		}
	}
}

func bytesFree(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bavail) * st.Bsize
}

// TestDiskFull has a sparse pool and its index on a much smaller filesystem. When that is full,
// nothing is half-added, existing data is untouched, and removing works and returns space to the
// filesystem.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 || !testns.Inside() {
		t.Skip("mounting needs root")
	}
	for kind, mount := range map[string]func(*testing.T, string, int64){
		region.KindTmpfs: smallTmpfs,
		region.KindFile:  smallExt4,
	} {
		t.Run(kind, func(t *testing.T) {
			dir := t.TempDir()
			mount(t, dir, 64<<20)
			t.Cleanup(func() {
				if err := unix.Unmount(dir, 0); err != nil {
					t.Error(err)
				}
			})
			r, err := region.Open(region.Config{
				Kind: kind, Path: filepath.Join(dir, "pool"),
				Size: 512 << 20, Create: true,
			})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			p, err := Create(r, filepath.Join(dir, "index"),
				Options{Warn: func(err error) { t.Error("warning:", err) }})
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			fillDisk(t, p, dir)
		})
	}
}

func fillDisk(t *testing.T, p *Pool, dir string) {
	kept := [][]byte{random(1, 100), random(2, 300_000), random(3, 5<<20)}
	addImage(t, p, "kept", kept...)
	free := bytesFree(t, dir)
	addImage(t, p, "goes", random(4, 8<<20), random(5, 1000))
	if n := free - bytesFree(t, dir); n < 8<<20 {
		t.Errorf("8 MiB took %d bytes of the filesystem", n)
	}
	before := p.Usage()
	b := p.Begin()
	_, err := b.Put(ctx, 100<<20, bytes.NewReader(random(6, 100<<20)))
	var full *FullError
	if !errors.Is(err, ErrFull) || !errors.Is(err, unix.ENOSPC) || !errors.As(err, &full) {
		t.Fatalf("put of what the disk has no room for: %v", err)
	}
	if after := p.Usage(); after != before {
		t.Errorf("usage %+v, before %+v", after, before)
	}
	// Fill the last page, then add an image of the contents: its metadata, or the index, has no room.
	var some []byte
	for n := 8 << 20; n >= 4096; {
		body := random(uint64(n)+uint64(bytesFree(t, dir)), n)
		if _, err := b.Put(ctx, int64(n), bytes.NewReader(body)); err == nil {
			some = body
			continue
		} else if !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
		n /= 2
	}
	before = p.Usage()
	if _, err := p.AddImage(ctx, "more", tree(put(t, b, some)), daxfs.Options{}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("image on a disk without a free page: %v, expected ENOSPC", err)
	}
	if after := p.Usage(); after != before {
		t.Errorf("usage after an image that failed %+v, before %+v", after, before)
	}
	if err := p.RemoveImage(ctx, "goes"); err != nil {
		t.Errorf("remove an image from a full disk: %v", err)
	}
	if err := p.RemoveLayer(ctx, "goes"); err != nil {
		t.Errorf("remove a layer from a full disk: %v", err)
	}
	if err := reap(p); err != nil {
		t.Errorf("free dead contents on a full disk: %v", err)
	}
	if n := bytesFree(t, dir); n < 8<<20 {
		t.Errorf("removing 8 MiB left %d bytes free on the disk", n)
	}
	b.Discard()
	m, err := p.Image("kept")
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range kept {
		if got := readImage(t, p.Region(), m)[treeName(i)]; !bytes.Equal(got, want) {
			t.Errorf("file %d of the image that was there has changed", i)
		}
	}
	addImage(t, p, "again", random(7, 20<<20))
	mustCheck(t, p)
}
