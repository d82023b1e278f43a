package mount_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/erofs"
	"github.com/daxfs/daxfs-snapshotter/mount/fusefs"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func TestMain(m *testing.M) {
	mounttest.Main(m, map[string]func([]string) error{"serve": fusefs.ServeArgs})
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

// image makes an image file of one small file and returns it as a source.
func image(t *testing.T, key, contents string) mount.Source {
	t.Helper()
	tree, path := t.TempDir(), filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(filepath.Join(tree, "file"), []byte(contents), 0o644); err != nil {
		t.Fatal(err)
	}
	mounttest.Mkfs(t, tree, path)
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return mount.Source{
		Key: key, Size: st.Size(), Region: region.Info{Kind: region.KindFile, Path: path, FD: -1},
		Checked: "made by mkfs.erofs just now",
	}
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

func open(t *testing.T, root string, opts mount.Options, drivers ...mount.Driver) *mount.Table {
	t.Helper()
	if len(drivers) == 0 {
		drivers = []mount.Driver{erofs.Loop{}}
	}
	tab, err := mount.Open(t.Context(), root, drivers, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, m := range tab.List() {
			sys.Detach(m.Dir)
		}
	})
	return tab
}

func read(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestTableMountsOnce(t *testing.T) {
	mounttest.Root(t)
	drv := &counting{Driver: erofs.Loop{}}
	tab := open(t, t.TempDir(), mount.Options{}, drv)
	src := image(t, "sha256:aa/bb", "one")
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			if _, err := tab.Mount(t.Context(), src, fmt.Sprint("holder-", i%8)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if drv.mounts != 1 {
		t.Errorf("mounted %d times, expected once", drv.mounts)
	}
	m, ok := tab.Get(src.Key)
	if !ok || len(m.Holders) != 8 || m.Driver != "erofs-loop" || m.Dir != tab.Dir(src.Key) {
		t.Fatalf("got %+v", m)
	}
	if got := read(t, m.Dir); got != "one" {
		t.Errorf("read %q", got)
	}
	if err := tab.Unmount(t.Context(), src.Key); !errors.Is(err, mount.ErrBusy) {
		t.Errorf("unmount of a held image: %v, expected ErrBusy", err)
	}
	for i := range 8 {
		if left := tab.Release(src.Key, fmt.Sprint("holder-", i)); left != 7-i {
			t.Errorf("%d holders left, expected %d", left, 7-i)
		}
	}
	if got := read(t, m.Dir); got != "one" { // Release unmounts nothing
		t.Errorf("read %q", got)
	}
	if err := tab.Prune(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Dir(m.Dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the image directory is still there: %v", err)
	}
	if err := tab.Unmount(t.Context(), src.Key); !errors.Is(err, mount.ErrNotFound) {
		t.Errorf("second unmount: %v, expected ErrNotFound", err)
	}
	st, err := os.Stat(filepath.Dir(filepath.Dir(m.Dir)))
	if err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("images directory: %v, %v; expected mode 0700", st.Mode(), err)
	}
}

func TestTableAdoptsAfterRestart(t *testing.T) {
	mounttest.Root(t)
	root := t.TempDir()
	drv := &counting{Driver: erofs.Loop{}}
	first := open(t, root, mount.Options{}, drv)
	src, other := image(t, "a", "one"), image(t, "b", "two")
	m, err := first.Mount(t.Context(), src, "h")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := first.Mount(t.Context(), other, "h"); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	var w warnings
	second := open(t, root, mount.Options{Warn: w.add}, drv)
	if got := second.List(); len(got) != 2 || got[0].Key != "a" || got[0].Dir != m.Dir || len(got[0].Holders) != 0 {
		t.Fatalf("adopted %+v", got)
	}
	if _, err := second.Mount(t.Context(), src, "h"); err != nil {
		t.Fatal(err)
	}
	if drv.mounts != 2 || len(w.text) != 0 {
		t.Errorf("%d mounts, expected 2; warnings %q", drv.mounts, w.text)
	}
	if err := second.Prune(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := second.List(); len(got) != 1 || got[0].Key != "a" {
		t.Errorf("after prune: %+v", got)
	}
}

// What lies on the mount points after a restart is not what the records say: nothing of it is used.
func TestTableAdoptsNothingElse(t *testing.T) {
	mounttest.Root(t)
	for name, spoil := range map[string]func(t *testing.T, m mount.Mounted){
		"unmounted": func(t *testing.T, m mount.Mounted) { sys.Detach(m.Dir) },
		"tmpfs on top": func(t *testing.T, m mount.Mounted) {
			if err := unix.Mount("tmpfs", m.Dir, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
		},
		"another image": func(t *testing.T, m mount.Mounted) {
			sys.Detach(m.Dir)
			if err := (erofs.Loop{}).Mount(t.Context(), image(t, "x", "evil"), m.Dir); err != nil {
				t.Fatal(err)
			}
		},
		"another file at the path": func(t *testing.T, m mount.Mounted) {
			b, err := os.ReadFile(m.Source.Region.Path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(m.Source.Region.Path+".new", b, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(m.Source.Region.Path+".new", m.Source.Region.Path); err != nil {
				t.Fatal(err)
			}
		},
		"record of a crash": func(t *testing.T, m mount.Mounted) {
			rec := filepath.Join(filepath.Dir(m.Dir), "image.json")
			b, err := os.ReadFile(rec)
			if err != nil {
				t.Fatal(err)
			}
			b = []byte(string(b[:len(`{"version":1,"driver":"`)]) + string(b[len(`{"version":1,"driver":"erofs-loop`):]))
			if err := os.WriteFile(rec, b, 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			first := open(t, root, mount.Options{})
			src := image(t, "a", "one")
			m, err := first.Mount(t.Context(), src, "h")
			if err != nil {
				t.Fatal(err)
			}
			spoil(t, m)
			second := open(t, root, mount.Options{})
			if got := second.List(); len(got) != 0 {
				t.Errorf("adopted %+v", got)
			}
			if m, _, err := sys.Top(m.Dir); m != nil || err != nil {
				t.Errorf("still mounted: %+v, %v", m, err)
			}
			m, err = second.Mount(t.Context(), src, "h")
			if err != nil {
				t.Fatal(err)
			}
			if got := read(t, m.Dir); got != "one" {
				t.Errorf("read %q", got)
			}
		})
	}
}

// Directories below images/ that the table did not make stay as they are.
func TestTableLeavesForeignDirectories(t *testing.T) {
	mounttest.Root(t)
	root := t.TempDir()
	foreign := filepath.Join(root, "images", "foreign", "mnt")
	if err := os.MkdirAll(foreign, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", foreign, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer sys.Detach(foreign)
	var w warnings
	open(t, root, mount.Options{Warn: w.add})
	if m, _, err := sys.Top(foreign); m == nil || err != nil {
		t.Errorf("the foreign mount is gone: %v", err)
	}
	if len(w.text) != 1 {
		t.Errorf("warnings %q, expected one", w.text)
	}
}

func TestTableOtherWindow(t *testing.T) {
	mounttest.Root(t)
	tab := open(t, t.TempDir(), mount.Options{})
	src, moved := image(t, "a", "one"), image(t, "a", "moved")
	if _, err := tab.Mount(t.Context(), src, "h"); err != nil {
		t.Fatal(err)
	}
	if _, err := tab.Mount(t.Context(), moved, "h2"); !errors.Is(err, mount.ErrBusy) {
		t.Fatalf("mount from elsewhere of a held image: %v, expected ErrBusy", err)
	}
	tab.Release("a", "h")
	m, err := tab.Mount(t.Context(), moved, "h2")
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, m.Dir); got != "moved" {
		t.Errorf("read %q", got)
	}
}

// The same key in the same window, but not the same image: after a restart the old mount must not pass for the new one.
func TestTableOtherVersion(t *testing.T) {
	mounttest.Root(t)
	root := t.TempDir()
	drv := &counting{Driver: erofs.Loop{}}
	tab := open(t, root, mount.Options{}, drv)
	src := image(t, "a", "one")
	src.Version = "1"
	if _, err := tab.Mount(t.Context(), src, "h"); err != nil {
		t.Fatal(err)
	}
	for i, version := range []string{"1", "2"} {
		src.Version = version
		tab = open(t, root, mount.Options{}, drv)
		if _, err := tab.Mount(t.Context(), src, "h"); err != nil {
			t.Fatal(err)
		}
		if drv.mounts != i+1 {
			t.Errorf("version %s: mounted %d times, expected %d", version, drv.mounts, i+1)
		}
	}
}

func TestTableRepairsLostMount(t *testing.T) {
	mounttest.Root(t)
	var w warnings
	tab := open(t, t.TempDir(), mount.Options{Warn: w.add})
	src := image(t, "a", "one")
	m, err := tab.Mount(t.Context(), src, "h")
	if err != nil {
		t.Fatal(err)
	}
	if err := sys.Detach(m.Dir); err != nil {
		t.Fatal(err)
	}
	if m, err = tab.Mount(t.Context(), src, "h2"); err != nil {
		t.Fatal(err)
	}
	if got := read(t, m.Dir); got != "one" || len(m.Holders) != 2 || len(w.text) != 1 {
		t.Errorf("read %q, holders %q, warnings %q", got, m.Holders, w.text)
	}
}

// Holders of an image that is lost and cannot be mounted at the moment are its holders again when it can.
func TestTableKeepsHoldersOfLostImage(t *testing.T) {
	mounttest.Root(t)
	tab := open(t, t.TempDir(), mount.Options{})
	src := image(t, "a", "one")
	m, err := tab.Mount(t.Context(), src, "h")
	if err != nil {
		t.Fatal(err)
	}
	away := src.Region.Path + ".away"
	if err := errors.Join(sys.Detach(m.Dir), os.Rename(src.Region.Path, away)); err != nil {
		t.Fatal(err)
	}
	if _, err := tab.Mount(t.Context(), src, "h2"); err == nil {
		t.Fatal("mounted a file that is not there")
	}
	if _, ok := tab.Get("a"); ok {
		t.Error("the image counts as mounted")
	}
	if err := os.Rename(away, src.Region.Path); err != nil {
		t.Fatal(err)
	}
	if m, err = tab.Mount(t.Context(), src, "h2"); err != nil || fmt.Sprint(m.Holders) != "[h h2]" {
		t.Errorf("holders %q, %v; expected h and h2", m.Holders, err)
	}
}

// A mount of a driver that the configuration no longer names is kept as long as it is used.
func TestTableAdoptsFromOtherDrivers(t *testing.T) {
	mounttest.Root(t)
	root := t.TempDir()
	src := image(t, "a", "one")
	if _, err := open(t, root, mount.Options{}).Mount(t.Context(), src, "h"); err != nil {
		t.Fatal(err)
	}
	var none []string
	other := fake{"other", nil, errors.New("must not be asked to mount"), &none}
	tab := open(t, root, mount.Options{Adopt: []mount.Driver{erofs.Loop{}}}, other)
	if m, err := tab.Mount(t.Context(), src, "h"); err != nil || m.Driver != "erofs-loop" {
		t.Fatalf("got %+v, %v", m, err)
	}
	tab.Release("a", "h")
	if err := tab.Prune(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := tab.Mount(t.Context(), src, "h"); err == nil || len(none) != 1 {
		t.Errorf("a new mount was made with a driver for adoption only: %v, %q", err, none)
	}
}

func TestTableRefuses(t *testing.T) {
	mounttest.Root(t)
	refuse := errors.New("rule 7 is broken")
	tab := open(t, t.TempDir(), mount.Options{Check: func(context.Context, mount.Source) error { return refuse }})
	src := image(t, "a", "one")
	src.Checked = ""
	if _, err := tab.Mount(t.Context(), src, "h"); !errors.Is(err, refuse) {
		t.Errorf("image whose check fails: %v", err)
	}
	src.Checked = "test"
	for name, change := range map[string]func(s *mount.Source){
		"no key":       func(s *mount.Source) { s.Key = "" },
		"odd offset":   func(s *mount.Source) { s.Off = 100 },
		"no size":      func(s *mount.Source) { s.Size = 0 },
		"overflow":     func(s *mount.Source) { s.Off, s.Size = 1<<62, 1<<62 },
		"missing file": func(s *mount.Source) { s.Region.Path += ".missing" },
		"no image":     func(s *mount.Source) { s.Region.Path = "/proc/self/exe" },
	} {
		bad := src
		change(&bad)
		if _, err := tab.Mount(t.Context(), bad, "h"); err == nil {
			t.Errorf("%s: mounted", name)
		}
	}
	if _, err := tab.Mount(t.Context(), src, ""); err == nil {
		t.Error("mounted without a holder")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := tab.Mount(ctx, src, "h"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if got := tab.List(); len(got) != 0 {
		t.Errorf("mounted: %+v", got)
	}
	left, err := os.ReadDir(filepath.Join(filepath.Dir(filepath.Dir(filepath.Dir(tab.Dir("a")))), "images"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// fake is a driver for what needs no kernel.
type fake struct {
	name         string
	probe, mount error
	mounted      *[]string
}

func (f fake) Name() string                                      { return f.name }
func (f fake) Sharing() string                                   { return "shares " + f.name }
func (f fake) Probe(context.Context, region.Info) error          { return f.probe }
func (f fake) Match(context.Context, mount.Source, string) error { return nil }
func (f fake) Unmount(context.Context, string) error             { return nil }
func (f fake) Mount(_ context.Context, _ mount.Source, _ string) error {
	*f.mounted = append(*f.mounted, f.name)
	return f.mount
}

func TestAutoPicks(t *testing.T) {
	var tried []string
	no := fmt.Errorf("no such thing here: %w", mount.ErrUnsupported)
	drivers := []mount.Driver{
		fake{"erofs-dax", no, nil, &tried},
		fake{"erofs-file", nil, no, &tried},
		fake{"erofs-loop", nil, nil, &tried},
		fake{"fuse", nil, nil, &tried},
	}
	src := mount.Source{Key: "k", Size: 4096}
	var w warnings
	d, err := mount.Auto(t.Context(), drivers, src, "/nowhere", w.add)
	if err != nil || d.Name() != "erofs-loop" || fmt.Sprint(tried) != "[erofs-file erofs-loop]" || len(w.text) != 1 {
		t.Errorf("picked %v, %v; tried %v; warnings %q", d, err, tried, w.text)
	}
	if _, err := mount.Auto(t.Context(), drivers[:2], src, "/nowhere", nil); !errors.Is(err, mount.ErrUnsupported) {
		t.Errorf("nothing works: %v, expected ErrUnsupported", err)
	}
	// A failure that is not about support is not papered over by another driver.
	broken := errors.New("the image is broken")
	drivers[1] = fake{"erofs-file", nil, broken, &tried}
	if _, err := mount.Auto(t.Context(), drivers, src, "/nowhere", nil); !errors.Is(err, broken) {
		t.Errorf("broken image: %v", err)
	}
	for name, want := range map[string]int{"": 4, "auto": 4, "erofs": 3, "erofs-loop": 1, "fuse": 1, "fu": 0, "ext4": 0} {
		got, err := mount.Select(drivers, name)
		if len(got) != want || (err == nil) != (want > 0) {
			t.Errorf("select %q: %d drivers, %v; expected %d", name, len(got), err, want)
		}
	}
	ex := mount.Explain(t.Context(), drivers, region.Info{})
	if len(ex) != 4 || ex[0].Usable || ex[0].Why != "no such thing here" || !ex[1].Picked || ex[2].Picked || !ex[2].Usable {
		t.Errorf("explanations %+v", ex)
	}
}
