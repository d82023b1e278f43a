package mount_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func TestOpenRefuses(t *testing.T) {
	var tried []string
	drivers := []mount.Driver{fake{"fuse", nil, nil, &tried}}
	p := mount.Pool{UUID: [16]byte{1}, Region: region.Info{Kind: region.KindFile, Path: "/nowhere", FD: -1}}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	crowded := t.TempDir()
	if err := os.MkdirAll(filepath.Join(crowded, "images", "a"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		ctx     context.Context
		root    string
		drivers []mount.Driver
		p       mount.Pool
		want    string
	}{
		"no drivers": {t.Context(), t.TempDir(), nil, p, "no drivers"},
		"no UUID":    {t.Context(), t.TempDir(), drivers, mount.Pool{Region: p.Region}, "no UUID"},
		"a file":     {t.Context(), file, drivers, p, file},
		"cancelled":  {cancelled, crowded, drivers, p, context.Canceled.Error()},
	} {
		_, err := mount.Open(tc.ctx, tc.root, tc.drivers, tc.p, mount.Options{})
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, expected %q", name, err, tc.want)
		}
	}
}

// A crash before the record of an image was written leaves a directory that the next process removes.
func TestOpenRemovesHalfMadeDirectories(t *testing.T) {
	b := fileBed(t)
	dir := filepath.Join(b.root, "images", "half")
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "mnt"), 0o700),
		os.WriteFile(filepath.Join(dir, ".image.json123"), []byte("{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	var w warnings
	b.open(t, mount.Options{Warn: w.add})
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) || len(w.text) != 0 {
		t.Errorf("the directory is still there: %v, warnings %q", err, w.text)
	}
}

// The mount of a pool is not adopted by a record that is damaged or of another version or pool. Open says
// so, and the next image works.
func TestPoolRecordsThatDoNotFit(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil func(record string, b *bed) string
		want  string
	}{
		"cut": {func(s string, _ *bed) string { return s[:20] }, "pool.json"},
		"of a later version": {
			func(s string, _ *bed) string { return strings.Replace(s, `"version":2`, `"version":3`, 1) },
			"of version 3",
		},
		"of another pool": {
			func(s string, b *bed) string {
				return strings.Replace(s, fmt.Sprintf("%x", b.G.UUID), strings.Repeat("ab", 16), 1)
			}, strings.Repeat("ab", 16),
		},
		"of an unknown driver": {
			func(s string, _ *bed) string { return strings.Replace(s, "erofs-loop", "other", 1) }, `driver "other"`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := fileBed(t)
			img := b.add(t, "a", "one")
			mustMount(t, b.open(t, mount.Options{}), img)
			record := filepath.Join(filepath.Dir(liveDir(t, b)), "pool.json")
			text, err := os.ReadFile(record)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(record, []byte(tc.spoil(string(text), b)), 0o600); err != nil {
				t.Fatal(err)
			}
			var w warnings
			tab := b.open(t, mount.Options{Warn: w.add})
			if !strings.Contains(strings.Join(w.text, "\n"), tc.want) {
				t.Errorf("warnings %q, expected %q", w.text, tc.want)
			}
			if got := tab.List(); len(got) != 0 {
				t.Errorf("adopted %+v", got)
			}
			if got := read(t, mustMount(t, tab, img).Dir); got != "one" {
				t.Errorf("read %q", got)
			}
			if _, n, err := sys.Top(liveDir(t, b)); n != 1 || err != nil {
				t.Errorf("%d mounts of the pool, %v", n, err)
			}
		})
	}
}

// A driver that cannot is passed over; one that fails otherwise stops the mount. Nothing is left behind.
func TestWindowsFail(t *testing.T) {
	b := fileBed(t)
	img := b.add(t, "a", "one")
	img.Window, img.WindowSize = 2<<20, 8192
	broken := errors.New("broken")
	no := fmt.Errorf("no memory: %w", mount.ErrUnsupported)
	refuse := mount.Options{Check: func(context.Context, mount.Source) error { return broken }}
	for name, tc := range map[string]struct {
		opts mount.Options
		d    mount.Driver
		want error
	}{
		"probe fails": {mount.Options{}, windows{broken}, broken},
		"unsupported": {mount.Options{}, windows{no}, mount.ErrUnsupported},
		"check fails": {refuse, windows{}, broken},
		"mount fails": {mount.Options{}, fake{"fake", nil, broken, new([]string)}, broken},
		"pool cannot": {mount.Options{}, fake{"fake", no, nil, new([]string)}, mount.ErrUnsupported},
	} {
		tab := b.open(t, tc.opts, tc.d)
		_, err := tab.Mount(t.Context(), img)
		if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), `image "a"`) {
			t.Errorf("%s: %v, expected %v that names the image", name, err, tc.want)
		}
		if tc.want == mount.ErrUnsupported && !strings.Contains(err.Error(), tc.d.Name()+": no memory") {
			t.Errorf("%s: %v, expected the driver and its reason", name, err)
		}
		for _, dir := range []string{"images", "live"} {
			if left, err := os.ReadDir(filepath.Join(b.root, dir)); err != nil || len(left) != 0 {
				t.Errorf("%s: left in %s: %v, %v", name, dir, left, err)
			}
		}
	}
	if m := mustMount(t, b.open(t, mount.Options{}, windows{no}, erofs.Loop{}), img); m.Driver != "erofs-loop" {
		t.Errorf("mounted with %s", m.Driver)
	}
}

// A window that is mounted is adopted, and not mounted again.
func TestAdoptsWindow(t *testing.T) {
	b := fileBed(t)
	img := b.add(t, "a", "one")
	img.Window, img.WindowSize = 2<<20, 8192
	m := mustMount(t, b.open(t, mount.Options{}, windows{}), img)
	dev := devOf(t, m.Dir)
	tab := b.open(t, mount.Options{}, windows{})
	if got := tab.List(); len(got) != 1 || got[0].Driver != "windows" {
		t.Errorf("adopted %+v", got)
	}
	if m := mustMount(t, tab, img); devOf(t, m.Dir) != dev {
		t.Error("an adopted window was mounted again")
	}
}

// An image that is written but not published is not mounted; the wait for it can be cancelled.
func TestMountBeforePublication(t *testing.T) {
	b := fileBed(t)
	tab := b.open(t, mount.Options{})
	next := b.Prepare(t, map[string]string{"file": "next"})
	img := image("a", next.Slot)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := tab.Mount(ctx, img); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, expected DeadlineExceeded", err)
	}
	b.Show(t, next)
	if got := read(t, mustMount(t, tab, img).Dir); got != "next" {
		t.Errorf("read %q", got)
	}
}

// waiting is a driver whose Mount waits.
type waiting struct {
	mount.Driver
	entered, leave chan struct{}
}

func (s waiting) Mount(ctx context.Context, src mount.Source, dir string) error {
	close(s.entered)
	<-s.leave
	return s.Driver.Mount(ctx, src, dir)
}

// Whoever waits for the mount of an image or of the pool by another caller can give up.
func TestWaitingIsCancelled(t *testing.T) {
	b := fileBed(t)
	one, two := b.add(t, "a", "one"), b.add(t, "b", "two")
	d := waiting{erofs.Loop{}, make(chan struct{}), make(chan struct{})}
	tab := b.open(t, mount.Options{}, d)
	done := make(chan error, 1)
	go func() {
		_, err := tab.Mount(t.Context(), one)
		done <- err
	}()
	<-d.entered
	if m, ok := tab.Get("a"); ok {
		t.Errorf("mounted before Mount returns: %+v", m)
	}
	for _, img := range []mount.Image{one, two} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		if _, err := tab.Mount(ctx, img); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("image %q: %v, expected DeadlineExceeded", img.Key, err)
		}
		cancel()
	}
	close(d.leave)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if m, ok := tab.Get("a"); !ok || m.Dir != tab.Dir("a") {
		t.Errorf("after Mount: %+v, %t", m, ok)
	}
	if got := read(t, mustMount(t, tab, two).Dir); got != "two" {
		t.Errorf("read %q", got)
	}
}

// An error of erase, and a caller that gave up, free nothing.
func TestUnusedFails(t *testing.T) {
	b := fileBed(t)
	tab := b.open(t, mount.Options{})
	mustMount(t, tab, b.add(t, "a", "one"))
	broken := errors.New("broken")
	extents := []mount.Extent{{Nids: []uint64{1}}}
	got, err := tab.Unused(t.Context(), extents, func() error { return broken })
	if got != nil || !errors.Is(err, broken) {
		t.Errorf("erase fails: %v, %v", got, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	got, err = tab.Unused(ctx, extents, func() error { cancel(); return nil })
	if got != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled during erase: %v, %v", got, err)
	}
	_, err = tab.Unused(ctx, extents, func() error { t.Error("erased"); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// An image of another pool with an open file, which no mount table shows, stays until the file is closed.
func TestStaleWithOpenFile(t *testing.T) {
	b := fileBed(t)
	m := mustMount(t, b.open(t, mount.Options{}), b.add(t, "a", "one"))
	f, err := os.Open(filepath.Join(m.Dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fresh := newBed(t, false, true)
	fresh.root = b.root
	tab := fresh.open(t, mount.Options{})
	none := func(string) bool { return false }
	left, err := tab.RemoveStale(t.Context(), none)
	if err != nil || len(left) != 2 || left[0].Dir != m.Dir || !strings.Contains(left[0].UsedBy, m.Dir) {
		t.Errorf("left %+v, %v; expected the image in use and its pool", left, err)
	}
	f.Close()
	if left, err := tab.RemoveStale(t.Context(), none); err != nil || len(left) != 0 {
		t.Errorf("left %+v, %v", left, err)
	}
	if _, err := os.Stat(m.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is still there: %v", err)
	}
}

// A pool with an open file stays mounted.
func TestUnmountPoolBusy(t *testing.T) {
	b := fileBed(t)
	tab := b.open(t, mount.Options{})
	mustMount(t, tab, b.add(t, "a", "one"))
	f, err := os.Open(liveDir(t, b))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := tab.Unmount(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := tab.UnmountPool(t.Context()); !errors.Is(err, mount.ErrBusy) {
		t.Errorf("with an open directory: %v, expected ErrBusy", err)
	}
	if err := tab.Healthy(t.Context()); err != nil {
		t.Errorf("the pool that is still mounted: %v", err)
	}
	f.Close()
	if err := tab.UnmountPool(t.Context()); err != nil {
		t.Error(err)
	}
	gone(t, tab)
}

// Alive finds a user of every kind of region that it can ask about.
func TestAliveByKind(t *testing.T) {
	b := fileBed(t)
	src := mount.Source{Region: b.pool().Region, Size: b.Size}
	dir := t.TempDir()
	if err := (erofs.Loop{}).Mount(t.Context(), src, dir); err != nil {
		t.Fatal(err)
	}
	defer sys.Detach(dir)
	m, _, err := sys.Top(dir)
	if err != nil {
		t.Fatal(err)
	}
	free := filepath.Join(t.TempDir(), "free")
	if err := os.WriteFile(free, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, moduleErr := os.Stat("/sys/module/daxfs")
	for name, tc := range map[string]struct {
		r     region.Info
		alive bool
		err   error
	}{
		"file that is mounted": {region.Info{Kind: region.KindFile, Path: b.Path, FD: -1}, true, nil},
		"free file":            {region.Info{Kind: region.KindFile, Path: free, FD: -1}, false, nil},
		"missing file": {
			region.Info{Kind: region.KindFile, Path: free + ".missing", FD: -1}, false, os.ErrNotExist,
		},
		"closed file": {region.Info{Kind: region.KindFile, Path: free, FD: 1 << 20}, false, unix.EBADF},
		"device that is mounted": {
			region.Info{Kind: region.KindPmem, Path: m.Source, BlockDevice: m.Source, FD: -1}, true, nil,
		},
		"missing device": {
			region.Info{Kind: region.KindPmem, BlockDevice: "/dev/nowhere", FD: -1}, false, os.ErrNotExist,
		},
		"physical range": {
			region.Info{Kind: region.KindPhys, Phys: 4 << 30, HasPhys: true, FD: -1}, false, nil,
		},
	} {
		if name == "physical range" && moduleErr == nil {
			continue // another file system of the module may be mounted
		}
		p := b.pool()
		p.Region = tc.r
		tab, err := mount.Open(t.Context(), t.TempDir(), []mount.Driver{erofs.Loop{}}, p, mount.Options{})
		if err != nil {
			t.Fatal(err)
		}
		alive, err := tab.Alive(t.Context())
		if !errors.Is(err, tc.err) || err == nil && alive != tc.alive {
			t.Errorf("%s: %t, %v; expected %t, %v", name, alive, err, tc.alive, tc.err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.open(t, mount.Options{}).Alive(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestLowers(t *testing.T) {
	for options, want := range map[string][]string{
		"rw,relatime": nil,

		"rw,lowerdir=/a:/b/,upperdir=/u":                     {"/a", "/b"},
		`lowerdir=/a\:b:/c\\d`:                               {"/a:b", `/c\d`},
		"lowerdir+=/a:b,lowerdir+=/c,datadir+=/d,workdir=/w": {"/a:b", "/c", "/d"},
	} {
		if got := mount.Lowers(options); !slices.Equal(got, want) {
			t.Errorf("%q: %q, expected %q", options, got, want)
		}
	}
}

// Messages name the memory by what an operator can look for.
func TestSourceNames(t *testing.T) {
	for want, src := range map[string]mount.Source{
		`pool file "/pool"`:        {Region: region.Info{Kind: region.KindFile, Path: "/pool"}},
		`pool pmem "/dev/pmem0"`:   {Region: region.Info{Kind: region.KindPmem, BlockDevice: "/dev/pmem0"}},
		"pool phys at 0x100000000": {Region: region.Info{Kind: region.KindPhys, Phys: 4 << 30, HasPhys: true}},
		"pool dmabuf":              {Region: region.Info{Kind: region.KindDMABuf}},
		`"k" (range 4096+8192 of file "/pool")`: {
			Key: "k", Off: 4096, Size: 8192, Region: region.Info{Kind: region.KindFile, Path: "/pool"},
		},
	} {
		if got := src.String(); got != want {
			t.Errorf("%s, expected %s", got, want)
		}
	}
}

// A check of memory that cannot be read is an error, not a crash: here a tmpfs without space for the page.
func TestCheckOfBrokenMemory(t *testing.T) {
	mounttest.Root(t)
	dir := mounttest.Tmpfs(t, "size=64k")
	path := filepath.Join(dir, "image")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "full"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("%v, expected a full tmpfs", err)
	}
	src := mount.Source{Key: "k", Size: 1 << 20, Region: region.Info{Kind: region.KindTmpfs, Path: path, FD: -1}}
	if err := mount.CheckImage(t.Context(), src); !errors.Is(err, mount.ErrCheck) ||
		!strings.Contains(err.Error(), "faulted at 0x") || !strings.Contains(err.Error(), path) {
		t.Errorf("%v, expected ErrCheck that names the file and the fault", err)
	}
}
