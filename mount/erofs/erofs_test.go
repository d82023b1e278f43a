package erofs

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func TestMain(m *testing.M) { mounttest.Main(m, nil) }

// twoImages makes a file with images at 2 MiB and behind that, and returns a source for each.
func twoImages(t *testing.T, dir, treeA, treeB string) (a, b mount.Source) {
	t.Helper()
	pool := filepath.Join(dir, "pool")
	f, err := os.Create(pool)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	off := int64(2 << 20)
	info := region.Info{Kind: region.KindFile, Path: pool, FD: -1}
	var out []mount.Source
	for _, tree := range []string{treeA, treeB} {
		img := filepath.Join(t.TempDir(), "image")
		mounttest.Mkfs(t, tree, img)
		b, err := os.ReadFile(img)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
		out = append(out, mount.Source{Key: tree, Region: info, Off: off, Size: int64(len(b))})
		off += (int64(len(b)) + 2<<20 - 1) &^ (2<<20 - 1)
	}
	return out[0], out[1]
}

func mountOn(t *testing.T, d mount.Driver, src mount.Source) string {
	t.Helper()
	ctx := context.Background()
	dir := t.TempDir()
	if err := d.Mount(ctx, src, dir); err != nil {
		t.Fatalf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := d.Unmount(ctx, dir); err != nil {
			t.Errorf("unmount: %v", err)
			sys.Detach(dir)
		}
	})
	if err := d.Match(ctx, src, dir); err != nil {
		t.Errorf("what Mount made does not match: %v", err)
	}
	return dir
}

func TestTwoImagesOfOneFile(t *testing.T) {
	mounttest.Root(t)
	treeA := mounttest.Tree(t)
	treeB := t.TempDir()
	if err := os.WriteFile(filepath.Join(treeB, "b"), []byte("the other one"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		driver mount.Driver
		dir    func(*testing.T) string
	}{
		{"file", &File{}, func(t *testing.T) string { return t.TempDir() }},
		{"loop", Loop{}, func(t *testing.T) string { return t.TempDir() }},
		{"loop over tmpfs", Loop{}, func(t *testing.T) string { return mounttest.Tmpfs(t, "") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, b := twoImages(t, tc.dir(t), treeA, treeB)
			if err := tc.driver.Probe(t.Context(), a.Region); errors.Is(err, mount.ErrUnsupported) {
				t.Skip(err)
			} else if err != nil {
				t.Fatal(err)
			}
			dirA, dirB := mountOn(t, tc.driver, a), mountOn(t, tc.driver, b)
			mounttest.Same(t, treeA, dirA)
			mounttest.Same(t, treeB, dirB)
			if err := tc.driver.Match(t.Context(), a, dirB); err == nil {
				t.Error("the mount of one image was taken for that of another")
			}
			restricted := a
			restricted.Restrict = true
			if err := tc.driver.Match(t.Context(), restricted, dirA); err == nil {
				t.Error("a mount without nosuid was taken for one with it")
			}
			mountOn(t, tc.driver, restricted)
			if err := tc.driver.Mount(t.Context(), b, dirA); err == nil {
				t.Error("mounted on top of another mount")
			}
		})
	}
}

func TestFileRefusesTmpfs(t *testing.T) {
	mounttest.Root(t)
	dir := mounttest.Tmpfs(t, "")
	path := filepath.Join(dir, "pool")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	err := (&File{}).Probe(t.Context(), region.Info{Kind: region.KindTmpfs, Path: path})
	if !errors.Is(err, mount.ErrUnsupported) {
		t.Fatalf("probe of a tmpfs: %v, expected ErrUnsupported", err)
	}
}

// loopsOf lists the loop devices over a file, according to losetup(8).
func loopsOf(t *testing.T, path string) string {
	t.Helper()
	out, err := exec.Command("losetup", "-j", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestLoopIsFreed(t *testing.T) {
	mounttest.Root(t)
	tree := mounttest.Tree(t)
	a, _ := twoImages(t, t.TempDir(), tree, tree)
	dir := t.TempDir()
	if err := (Loop{}).Mount(t.Context(), a, dir); err != nil {
		t.Fatal(err)
	}
	if loopsOf(t, a.Region.Path) == "" {
		t.Error("losetup shows no loop device over the mounted file")
	}
	f, err := os.Open(filepath.Join(dir, "hello"))
	if err != nil {
		t.Fatal(err)
	}
	if err := (Loop{}).Unmount(t.Context(), dir); !errors.Is(err, mount.ErrBusy) {
		t.Errorf("unmount with an open file: %v, expected ErrBusy", err)
	}
	f.Close()
	if err := (Loop{}).Unmount(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := (Loop{}).Unmount(t.Context(), dir); err != nil {
		t.Errorf("second unmount: %v", err)
	}
	// Without an image the mount fails, and the device is still freed.
	bad := a
	bad.Off, bad.Size = 0, 1<<20
	if err := (Loop{}).Mount(t.Context(), bad, dir); err == nil {
		t.Error("mounted what is no image")
	}
	if left := loopsOf(t, a.Region.Path); left != "" {
		t.Errorf("loop devices left behind: %s", left)
	}
}

func TestDAXProbeSaysWhatToDo(t *testing.T) {
	for _, tc := range []struct {
		info region.Info
		want string
	}{
		{region.Info{Kind: "file", Path: "/x"}, "virtio-pmem"},
		{region.Info{Kind: "pmem", BlockDevice: "/dev/loop0"}, "fsdax"},
	} {
		err := (DAX{}).Probe(t.Context(), tc.info)
		if !errors.Is(err, mount.ErrUnsupported) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %v, expected ErrUnsupported that mentions %s", tc.info, err, tc.want)
		}
	}
}

// A kernel that silently drops dax=always must not pass for one that keeps it.
func TestDAXDroppedSilently(t *testing.T) {
	mounttest.Root(t)
	tree := mounttest.Tree(t)
	a, _ := twoImages(t, t.TempDir(), tree, tree)
	dev, err := attach(t.Context(), a.Region.Path, a.Off, a.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	src := mount.Source{Key: "k", Size: a.Size, Region: region.Info{Kind: "pmem", BlockDevice: dev.Name(), DAX: true}}
	dir := t.TempDir()
	err = (DAX{}).Mount(t.Context(), src, dir)
	if !errors.Is(err, mount.ErrUnsupported) {
		t.Errorf("mount of a device without DAX: %v, expected ErrUnsupported", err)
	}
	if m, _, _ := sys.Top(dir); m != nil {
		t.Errorf("still mounted: %+v", m)
	}
}

// A block device is mounted without a loop device.
func TestBlockDeviceItself(t *testing.T) {
	mounttest.Root(t)
	tree := mounttest.Tree(t)
	a, _ := twoImages(t, t.TempDir(), tree, tree)
	dev, err := attach(t.Context(), a.Region.Path, a.Off, a.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	src := mount.Source{
		Key: "k", Size: a.Size,
		Region: region.Info{Kind: "pmem", Path: dev.Name(), BlockDevice: dev.Name()},
	}
	if err := (Loop{}).Probe(t.Context(), src.Region); err != nil {
		t.Fatal(err)
	}
	dir := mountOn(t, Loop{}, src)
	mounttest.Same(t, tree, dir)
	if m, _, err := sys.Top(dir); err != nil || m.Source != dev.Name() {
		t.Errorf("mounted from %+v, %v; expected %s", m, err, dev.Name())
	}
	if err := (&File{}).Probe(t.Context(), src.Region); !errors.Is(err, mount.ErrUnsupported) {
		t.Errorf("file-backed mount of a device: %v, expected ErrUnsupported", err)
	}
	src.Off = 4096
	if err := (DAX{}).Mount(t.Context(), src, t.TempDir()); !errors.Is(err, mount.ErrUnsupported) {
		t.Errorf("part of a device with DAX: %v, expected ErrUnsupported", err)
	}
}

// A kernel with the bug gets no file-backed mount, although one would work.
func TestFileProbeNamesBug(t *testing.T) {
	mounttest.Root(t)
	path := filepath.Join(t.TempDir(), "pool")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d := &File{bug: func() string { return "Linux 6.18.10 has " + CVE }}
	err := d.Probe(t.Context(), region.Info{Kind: region.KindFile, Path: path})
	if !errors.Is(err, mount.ErrUnsupported) || !strings.Contains(err.Error(), CVE) {
		t.Errorf("probe: %v, expected ErrUnsupported that names %s", err, CVE)
	}
}

func TestBug(t *testing.T) {
	for _, tc := range []struct {
		release, version, signature string
		bad                         bool
	}{
		{"6.1.0-40-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.153-1 (2025-09-20)", "", false},
		{"6.11.11", "#1 SMP", "", false},
		{"6.12.71", "#1 SMP", "", true},
		{"6.12.72", "#1 SMP", "", false},
		{"6.12.48+deb13-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.12.48-1 (2025-09-20)", "", true},
		{"6.12.0-55.el10.x86_64", "#1 SMP", "", true},
		{"6.14.0-33-generic", "#33-Ubuntu SMP", "Ubuntu 6.14.0-33.33-generic 6.14.11\n", true},
		{"6.18.0-9-generic", "#9-Ubuntu SMP", "Ubuntu 6.18.0-9.9-generic 6.18.12\n", false},
		{"6.18.10", "#1 SMP", "", true},
		{"6.18.44-fc-v595", "#1 SMP PREEMPT_DYNAMIC @0", "", false},
		{"6.19.0", "#1 SMP", "", true},
		{"6.19.0-rc8", "#1 SMP", "", true},
		{"6.19.1-arch1-1", "#1 SMP", "", false},
		{"7.2.13+deb14-amd64", "#1 SMP Debian 7.2.13-1", "", false},
		{"unknown", "", "", false},
	} {
		if got := bug(tc.release, tc.version, tc.signature); (got != "") != tc.bad {
			t.Errorf("%s: %q, expected the bug: %t", tc.release, got, tc.bad)
		}
	}
}
