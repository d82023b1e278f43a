package mount_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/fusefs"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func TestMain(m *testing.M) {
	mounttest.Main(m, helpers)
}

var helpers = map[string]func([]string) error{
	"serve": fusefs.ServeArgs,
	"serve and end late": func(args []string) error {
		err := fusefs.ServeArgs(args)
		time.Sleep(300 * time.Millisecond)
		return err
	},
}

// counting is a driver that counts its mounts.
type counting struct {
	mount.Driver
	mu     sync.Mutex
	mounts int
}

func (c *counting) Mount(ctx context.Context, src mount.Source, dir string) error {
	c.mu.Lock()
	c.mounts++
	c.mu.Unlock()
	return c.Driver.Mount(ctx, src, dir)
}

// warnings collects warnings.
type warnings struct {
	mu   sync.Mutex
	text []string
}

func (w *warnings) add(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text = append(w.text, fmt.Sprintf(format, args...))
}

// bed is a pool and the root of a table for it.
type bed struct {
	*mounttest.LivePool
	root string
	kind string
}

// daxDevice names a block device with DAX of at least 512 MiB, which tests overwrite.
const daxDevice = "DAXFS_TEST_DAX_DEVICE"

// eachDriver runs f with every way to mount a pool, each with its own pool.
func eachDriver(t *testing.T, f func(t *testing.T, b *bed, d mount.Driver)) {
	mounttest.Root(t)
	for _, tc := range []struct {
		name   string
		driver mount.Driver
		tmpfs  bool
	}{
		{"file", &erofs.File{}, false},
		{"loop", erofs.Loop{}, false},
		{"loop over tmpfs", erofs.Loop{}, true},
		{"fuse", fuseDriver(), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t, tc.tmpfs, tc.driver.Name() == "erofs-loop")
			if err := tc.driver.Probe(t.Context(), b.pool().Region); errors.Is(err, mount.ErrUnsupported) {
				t.Skip(err)
			} else if err != nil {
				t.Fatal(err)
			}
			f(t, b, tc.driver)
		})
	}
	if dev := os.Getenv(daxDevice); dev != "" {
		t.Run("dax", func(t *testing.T) {
			b := &bed{root: t.TempDir(), kind: region.KindPmem}
			b.LivePool = mounttest.NewLivePool(t, dev, true)
			f(t, b, erofs.DAX{})
		})
	}
}

func fuseDriver() mount.Driver { return fuseDriverWith("serve") }

func fuseDriverWith(helper string) mount.Driver {
	cmd := mounttest.Command(helper)
	return fusefs.Driver{Command: []string{cmd.Path}, Env: cmd.Env}
}

func newBed(t *testing.T, tmpfs, device bool) *bed {
	t.Helper()
	dir, kind := t.TempDir(), region.KindFile
	if tmpfs {
		dir, kind = mounttest.Tmpfs(t, ""), region.KindTmpfs
	}
	b := &bed{root: t.TempDir(), kind: kind}
	b.LivePool = mounttest.NewLivePool(t, filepath.Join(dir, "pool"), device)
	return b
}

// fileBed is a pool on a disk, for tests that do not depend on the driver.
func fileBed(t *testing.T) *bed {
	mounttest.Root(t)
	return newBed(t, false, true)
}

func (b *bed) pool() mount.Pool {
	p := mount.Pool{Region: region.Info{Kind: b.kind, Path: b.Path, FD: int(b.File.Fd())}, Size: b.Size, UUID: b.G.UUID}
	if b.kind == region.KindPmem {
		p.Region.BlockDevice, p.Region.DAX = b.Path, true
	}
	return p
}

// add publishes an image of the file "file".
func (b *bed) add(t *testing.T, key, contents string) mount.Image {
	t.Helper()
	return image(key, b.Publish(t, map[string]string{"file": contents}))
}

func image(key string, s mounttest.Slot) mount.Image {
	return mount.Image{
		Key: key, Name: s.Name, Nid: s.Nid, Tree: []mount.Range{{Off: s.Tree[0], End: s.Tree[1]}},
		UUID: [16]byte{byte(s.N)}, Created: time.Unix(int64(s.N), 0),
	}
}

func (b *bed) open(t *testing.T, opts mount.Options, drivers ...mount.Driver) *mount.Table {
	t.Helper()
	if len(drivers) == 0 {
		drivers = []mount.Driver{erofs.Loop{}}
	}
	tab, err := mount.Open(t.Context(), b.root, drivers, b.pool(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { detachAll(b.root) })
	return tab
}

// detachAll removes all mounts below the root of a table.
func detachAll(root string) {
	dirs, _ := filepath.Glob(filepath.Join(root, "*", "*", "mnt"))
	for _, dir := range dirs {
		sys.Detach(dir)
	}
}

func mustMount(t *testing.T, tab *mount.Table, img mount.Image) mount.Mounted {
	t.Helper()
	m, err := tab.Mount(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func read(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func devOf(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Dev
}

// One superblock serves all images, even later ones, and equal files share an inode.
func TestOnePoolManyImages(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		drv := &counting{Driver: d}
		tab := b.open(t, mount.Options{}, drv)
		var dirs []string
		for i := range 20 {
			s := b.Publish(t, map[string]string{"file": fmt.Sprint("own ", i), "sub/common": "common"})
			m := mustMount(t, tab, image(fmt.Sprint("image/", i), s))
			if got := read(t, m.Dir); got != fmt.Sprint("own ", i) || m.Driver != d.Name() || m.Dir != tab.Dir(m.Key) {
				t.Fatalf("image %d: read %q from %+v", i, got, m)
			}
			dirs = append(dirs, m.Dir)
		}
		var first, st unix.Stat_t
		if err := unix.Stat(filepath.Join(dirs[0], "sub/common"), &first); err != nil {
			t.Fatal(err)
		}
		for _, dir := range dirs {
			err := unix.Stat(filepath.Join(dir, "sub/common"), &st)
			if err != nil || st.Ino != first.Ino || st.Dev != first.Dev {
				t.Errorf("%s: inode %d of device %#x, expected %d of %#x; %v", dir, st.Ino, st.Dev,
					first.Ino, first.Dev, err)
			}
		}
		if drv.mounts != 1 {
			t.Errorf("mounted %d times, expected once", drv.mounts)
		}
		if err := tab.UnmountPool(t.Context()); !errors.Is(err, mount.ErrBusy) {
			t.Errorf("unmount of a pool with images: %v, expected ErrBusy", err)
		}
		if alive, err := tab.Alive(t.Context()); err != nil || !alive {
			t.Errorf("alive: %t, %v", alive, err)
		}
		if err := tab.Healthy(t.Context()); err != nil {
			t.Error(err)
		}
		for i := range 20 {
			if err := tab.Unmount(t.Context(), fmt.Sprint("image/", i)); err != nil {
				t.Fatal(err)
			}
		}
		if err := tab.UnmountPool(t.Context()); err != nil {
			t.Fatal(err)
		}
		gone(t, tab)
		for _, dir := range []string{"images", "live"} {
			if left, err := os.ReadDir(filepath.Join(b.root, dir)); err != nil || len(left) > 0 {
				t.Errorf("left in %s: %v, %v", dir, left, err)
			}
		}
	})
}

// gone waits until nothing of the pool lives: a server takes a moment to end.
func gone(t *testing.T, tab *mount.Table) {
	t.Helper()
	for range 500 {
		alive, err := tab.Alive(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !alive {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("the pool is still alive")
}

func TestConcurrentMounts(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		drv := &counting{Driver: d}
		tab := b.open(t, mount.Options{}, drv)
		var images []mount.Image
		for i := range 8 {
			images = append(images, b.add(t, fmt.Sprint(i), fmt.Sprint(i)))
		}
		var wg sync.WaitGroup
		for i := range 32 {
			wg.Go(func() {
				m, err := tab.Mount(t.Context(), images[i%8])
				if err != nil {
					t.Error(err)
					return
				}
				if b, err := os.ReadFile(filepath.Join(m.Dir, "file")); err != nil || string(b) != fmt.Sprint(i%8) {
					t.Errorf("image %d: %q, %v", i%8, b, err)
				}
			})
		}
		wg.Wait()
		if drv.mounts != 1 || len(tab.List()) != 8 {
			t.Errorf("%d mounts, %d images", drv.mounts, len(tab.List()))
		}
	})
}

// A bind has its own directory around it, and shares no peer group with others.
func TestBindsAreApart(t *testing.T) {
	b := fileBed(t)
	if err := unix.Mount(b.root, b.root, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer sys.Detach(b.root)
	if err := unix.Mount("", b.root, "", unix.MS_SHARED, ""); err != nil { // as under systemd
		t.Fatal(err)
	}
	tab := b.open(t, mount.Options{})
	groups := map[string]bool{}
	for i := range 3 {
		m := mustMount(t, tab, b.add(t, fmt.Sprint(i), "x"))
		info, n, err := sys.Top(m.Dir)
		if err != nil || n != 1 {
			t.Fatalf("%d mounts, %v", n, err)
		}
		if !strings.Contains(info.Optional, "shared:") || groups[info.Optional] {
			t.Errorf("%s: %q, expected a peer group of its own", m.Dir, info.Optional)
		}
		groups[info.Optional] = true
		if des, err := os.ReadDir(filepath.Dir(m.Dir)); err != nil || len(des) != 2 { // mnt and its record
			t.Errorf("beside the bind: %v, %v", des, err)
		}
	}
	for _, dir := range []string{"images", "live"} {
		if st, err := os.Stat(filepath.Join(b.root, dir)); err != nil || st.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v; expected mode 0700", dir, st.Mode(), err)
		}
	}
}

func TestBindForUser(t *testing.T) {
	b := fileBed(t)
	tab := b.open(t, mount.Options{})
	img := b.add(t, "a", "one")
	if err := tab.Bind(t.Context(), "a", t.TempDir(), true); !errors.Is(err, mount.ErrNotFound) {
		t.Errorf("bind of what is not mounted: %v", err)
	}
	mustMount(t, tab, img)
	dir := t.TempDir()
	if err := tab.Bind(t.Context(), "a", dir, true); err != nil {
		t.Fatal(err)
	}
	defer sys.Detach(dir)
	if got := read(t, dir); got != "one" {
		t.Errorf("read %q", got)
	}
	if _, err := sys.MatchTop(dir, "erofs", true); err != nil {
		t.Error(err)
	}
	if used, err := tab.UsedBy(t.Context(), "a"); err != nil || !strings.Contains(used, dir) {
		t.Errorf("used by %q, %v; expected the bind on %q", used, err, dir)
	}
}

func TestTableRefuses(t *testing.T) {
	b := fileBed(t)
	refuse := errors.New("rule 7 is broken")
	tab := b.open(t, mount.Options{Check: func(_ context.Context, src mount.Source) error {
		if src.Off != 0 || src.Size != b.Size || src.Key != "" {
			t.Errorf("checked %+v, expected the pool", src)
		}
		return refuse
	}})
	img := b.add(t, "a", "one")
	if _, err := tab.Mount(t.Context(), img); !errors.Is(err, refuse) {
		t.Errorf("pool whose check fails: %v", err)
	}
	tab = b.open(t, mount.Options{})
	for name, change := range map[string]func(img *mount.Image){
		"no key":          func(img *mount.Image) { img.Key = "" },
		"no slot":         func(img *mount.Image) { img.Name = "" },
		"path for a slot": func(img *mount.Image) { img.Name = "../x" },
		"unknown slot":    func(img *mount.Image) { img.Name = "99999" },
		"wrong inode":     func(img *mount.Image) { img.Nid++ },
		"no inode":        func(img *mount.Image) { img.Nid = 0 },
	} {
		bad := img
		change(&bad)
		if _, err := tab.Mount(t.Context(), bad); err == nil {
			t.Errorf("%s: mounted", name)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := tab.Mount(ctx, img); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if got := tab.List(); len(got) != 0 {
		t.Errorf("mounted: %+v", got)
	}
	if left, err := os.ReadDir(filepath.Join(b.root, "images")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if err := tab.Unmount(t.Context(), "a"); !errors.Is(err, mount.ErrNotFound) {
		t.Errorf("unmount: %v, expected ErrNotFound", err)
	}
	if _, err := tab.Unused(t.Context(), nil, nil); err != nil {
		t.Errorf("the pool is mounted, for the images that were refused: %v", err)
	}
	if err := tab.UnmountPool(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := tab.Unused(t.Context(), nil, nil); !errors.Is(err, mount.ErrNotFound) {
		t.Errorf("unused without a mounted pool: %v, expected ErrNotFound", err)
	}
}

// An image that took over the key of another one is mounted once the other can be unmounted.
func TestOtherImageOfOneKey(t *testing.T) {
	b := fileBed(t)
	tab := b.open(t, mount.Options{})
	m := mustMount(t, tab, b.add(t, "a", "one"))
	second := b.add(t, "a", "two")
	f, err := os.Open(filepath.Join(m.Dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tab.Mount(t.Context(), second); !errors.Is(err, mount.ErrBusy) {
		t.Errorf("mount over an image in use: %v, expected ErrBusy", err)
	}
	f.Close()
	if got := read(t, mustMount(t, tab, second).Dir); got != "two" {
		t.Errorf("read %q", got)
	}
}

func TestUnmountBusy(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		tab := b.open(t, mount.Options{}, d)
		m := mustMount(t, tab, b.add(t, "a", "one"))
		fd, err := unix.Open(filepath.Join(m.Dir, "file"), unix.O_PATH, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := tab.Unmount(t.Context(), "a"); !errors.Is(err, mount.ErrBusy) {
			t.Errorf("unmount with a descriptor: %v, expected ErrBusy", err)
		}
		unix.Close(fd)
		if err := tab.Unmount(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Dir(m.Dir)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the image directory is still there: %v", err)
		}
	})
}
