package kernel

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func TestMain(m *testing.M) { mounttest.Main(m, nil) }

// What the driver refuses leaves the directory as it was.
func TestMountRefuses(t *testing.T) {
	mounttest.Root(t)
	if _, err := os.Stat("/sys/module/daxfs"); err == nil {
		t.Skip("with the module loaded, the kernel would read the memory at the addresses of this test")
	}
	src := mount.Source{
		Key: "k", Size: 4096, Region: region.Info{Kind: region.KindPhys, Phys: 4 << 30, HasPhys: true, FD: -1},
	}
	dir, taken := t.TempDir(), mounttest.Tmpfs(t, "")
	misaligned := src
	misaligned.Off = 4096
	for name, tc := range map[string]struct {
		src         mount.Source
		dir, want   string
		unsupported bool
	}{
		"no module":     {src, dir, `no file system "daxfs"`, true},
		"misaligned":    {misaligned, dir, "multiple of 2 MiB", true},
		"a mount point": {src, taken, taken + `" is a mount point already`, false},
	} {
		err := (Driver{}).Mount(t.Context(), tc.src, tc.dir)
		if err == nil || !strings.Contains(err.Error(), tc.want) ||
			errors.Is(err, mount.ErrUnsupported) != tc.unsupported {
			t.Errorf("%s: %v, expected %q, unsupported: %t", name, err, tc.want, tc.unsupported)
		}
	}
	if m, _, err := sys.Top(dir); m != nil || err != nil {
		t.Errorf("mounted: %+v, %v", m, err)
	}
	if m, n, err := sys.Top(taken); err != nil || n != 1 || m.FSType != "tmpfs" {
		t.Errorf("%d mounts, the top one %+v, %v", n, m, err)
	}
	for at, want := range map[string]string{
		dir: "nothing is mounted on", taken: `is a mount of type "tmpfs", expected "daxfs"`,
	} {
		if err := (Driver{}).Match(t.Context(), src, at); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("match of %s: %v, expected %q", at, err, want)
		}
	}
}

// Unmount does not take a file system away from those who use it.
func TestUnmount(t *testing.T) {
	mounttest.Root(t)
	dir := t.TempDir()
	if err := (Driver{}).Unmount(t.Context(), dir); err != nil {
		t.Errorf("nothing is mounted: %v", err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer sys.Detach(dir)
	f, err := os.Create(filepath.Join(dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	if err := (Driver{}).Unmount(t.Context(), dir); !errors.Is(err, mount.ErrBusy) {
		t.Errorf("with an open file: %v, expected ErrBusy", err)
	}
	f.Close()
	if err := (Driver{}).Unmount(t.Context(), dir); err != nil {
		t.Error(err)
	}
	if m, _, err := sys.Top(dir); m != nil || err != nil {
		t.Errorf("still mounted: %+v, %v", m, err)
	}
}
