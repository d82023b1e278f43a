package erofs

import (
	"context"
	"errors"
	"os"
	"os/exec"
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

// tmpfs mounts a tmpfs and returns its directory.
func tmpfs(t *testing.T) string {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sys.Detach(dir) })
	return dir
}

// twoWindows makes a file with two images, at 2 MiB and further up, and returns a source for each.
func twoWindows(t *testing.T, dir, treeA, treeB string) (a, b mount.Source) {
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

func TestTwoWindowsOfOneFile(t *testing.T) {
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
		{"loop over tmpfs", Loop{}, tmpfs},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, b := twoWindows(t, tc.dir(t), treeA, treeB)
			if err := tc.driver.Probe(t.Context(), a.Region); errors.Is(err, mount.ErrUnsupported) {
				t.Skip(err)
			} else if err != nil {
				t.Fatal(err)
			}
			dirA, dirB := mountOn(t, tc.driver, a), mountOn(t, tc.driver, b)
			mounttest.Same(t, treeA, dirA)
			mounttest.Same(t, treeB, dirB)
			if err := tc.driver.Match(t.Context(), a, dirB); err == nil {
				t.Error("the mount of one window was taken for that of another")
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
	dir := tmpfs(t)
	path := filepath.Join(dir, "pool")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	err := (&File{}).Probe(t.Context(), region.Info{Kind: region.KindTmpfs, Path: path})
	if !errors.Is(err, mount.ErrUnsupported) {
		t.Fatalf("probe of a tmpfs: %v, expected ErrUnsupported", err)
	}
}

// loopsOf lists the loop devices over a file, as losetup(8) sees them.
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
	a, _ := twoWindows(t, t.TempDir(), tree, tree)
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
	// A window that is no image: the mount fails and the device is freed all the same.
	bad := a
	bad.Off, bad.Size = 0, 1<<20
	if err := (Loop{}).Mount(t.Context(), bad, dir); err == nil {
		t.Error("mounted a window without an image")
	}
	if left := loopsOf(t, a.Region.Path); left != "" {
		t.Errorf("loop devices left behind: %s", left)
	}
}

func TestTables(t *testing.T) {
	src := mount.Source{Off: 4 << 20, Size: 1 << 20, Region: region.Info{BlockDevice: "/dev/pmem0"}}
	if got, want := table(src), "0 2048 linear /dev/pmem0 8192"; got != want {
		t.Errorf("table %q, expected %q", got, want)
	}
	loop := "/dev/loop0" // any block device serves
	if _, err := os.Stat(loop); err != nil {
		t.Skip("no block device to name: ", err)
	}
	src.Region.BlockDevice = loop
	for got, ok := range map[string]bool{
		"0 2048 linear 7:0 8192":  true,
		"0 2048 linear 7:1 8192":  false,
		"0 2048 linear 7:0 8193":  false,
		"0 2049 linear 7:0 8192":  false,
		"0 2048 striped 7:0 8192": false,
		"":                        false,
	} {
		if err := sameTable(got, src); (err == nil) != ok {
			t.Errorf("table %q: %v", got, err)
		}
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

// A kernel that drops dax=always without a word must not pass for one that keeps it.
func TestDAXDroppedSilently(t *testing.T) {
	mounttest.Root(t)
	tree := mounttest.Tree(t)
	a, _ := twoWindows(t, t.TempDir(), tree, tree)
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

// fakeDmsetup stands for dmsetup on a kernel without device-mapper: its devices are links to a block device, and it keeps a log.
func fakeDmsetup(t *testing.T, dev string) (d DAX, logName string) {
	t.Helper()
	if err := os.MkdirAll("/dev/mapper", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", "/dev/mapper", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sys.Detach("/dev/mapper") })
	program, sysfs := filepath.Join(t.TempDir(), "dmsetup"), t.TempDir()
	logName = filepath.Join(t.TempDir(), "log")
	script := `#!/bin/sh
cd ` + sysfs + `
echo "$@" >>` + logName + `
case $1 in
create) mkdir -p dm-0/dm; echo 253:0 >dm-0/dev; echo $2 >dm-0/dm/name ;; # without a node, as it happens without udev
mknodes) ln -s ` + dev + ` /dev/mapper/$2 ;;
remove) rm -rf dm-0; rm /dev/mapper/$3 ;;
*) echo "unknown command $1" >&2; exit 1 ;;
esac
`
	if err := os.WriteFile(program, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return DAX{Dmsetup: program, sysfs: sysfs}, logName
}

// The device of a window is marked for removal whatever becomes of the mount, and one of an earlier process is taken away first.
func TestDAXWindowLeavesNoDevice(t *testing.T) {
	mounttest.Root(t)
	tree := mounttest.Tree(t)
	a, _ := twoWindows(t, t.TempDir(), tree, tree)
	dev, err := attach(t.Context(), a.Region.Path, a.Off, a.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	dir := t.TempDir()
	name := device(dir)
	d, logName := fakeDmsetup(t, dev.Name())
	src := mount.Source{Key: "k", Off: 2 << 20, Size: a.Size, Region: region.Info{Kind: "pmem", BlockDevice: dev.Name(), DAX: true}}
	if err := d.Probe(t.Context(), src.Region); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"create", name}, {"mknodes", name}} { // left by a crash
		if _, err := d.dmsetup(t.Context(), args...); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(logName); err != nil {
		t.Fatal(err)
	}
	// No kernel here has DAX on a loop device: the mount works and then is found to have none.
	if err := d.Mount(t.Context(), src, dir); !errors.Is(err, mount.ErrUnsupported) || !strings.Contains(err.Error(), "without DAX") {
		t.Errorf("mount: %v, expected ErrUnsupported", err)
	}
	log, err := os.ReadFile(logName)
	if err != nil {
		t.Fatal(err)
	}
	want := "remove --deferred " + name + "\n" +
		"create " + name + " --readonly --table " + table(src) + "\n" +
		"mknodes " + name + "\n" +
		"remove --deferred " + name + "\n"
	if string(log) != want {
		t.Errorf("dmsetup was asked for:\n%sexpected:\n%s", log, want)
	}
	if m, _, _ := sys.Top(dir); m != nil {
		t.Errorf("still mounted: %+v", m)
	}
	if err := d.Unmount(t.Context(), dir); err != nil {
		t.Errorf("unmount of nothing: %v", err)
	}
	if n := d.number(name); n != "" {
		t.Errorf("device %s is left", n)
	}
	failing := DAX{Dmsetup: "/bin/false"}
	if err := failing.Mount(t.Context(), src, dir); !errors.Is(err, mount.ErrUnsupported) || !strings.Contains(err.Error(), "dm_mod") {
		t.Errorf("no device-mapper: %v, expected ErrUnsupported that mentions dm_mod", err)
	}
	if err := (DAX{Dmsetup: "/nowhere/dmsetup"}).Probe(t.Context(), src.Region); !errors.Is(err, mount.ErrUnsupported) {
		t.Errorf("no dmsetup: %v, expected ErrUnsupported", err)
	}
}
