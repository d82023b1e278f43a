package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/daxfs"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

func TestMain(m *testing.M) {
	mounttest.Main(m, map[string]func([]string) error{
		"serve": ServeArgs, "overlay": overlay, "getxattr": getxattr,
		"idmapped": idmapped,
	})
}

// driver starts this test binary as its server.
func driver() Driver {
	cmd := mounttest.Command("serve")
	return Driver{Command: []string{cmd.Path}, Env: cmd.Env}
}

func source(t testing.TB, tree string) mount.Source {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	mounttest.Mkfs(t, tree, path)
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return mount.Source{Key: tree, Size: st.Size(), Region: region.Info{Kind: region.KindFile, Path: path, FD: -1}}
}

func needFuse(t testing.TB) {
	t.Helper()
	mounttest.Root(t)
	if err := driver().Probe(context.Background(), region.Info{Kind: region.KindFile, Path: "/"}); err != nil {
		t.Skip(err)
	}
}

// eventually waits for an effect in another process.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s: not within 30 seconds", what)
}

func TestServes(t *testing.T) {
	needFuse(t)
	tree := mounttest.Tree(t)
	src := source(t, tree)
	d, dir := driver(), t.TempDir()
	if err := d.Mount(t.Context(), src, dir); err != nil {
		t.Fatal(err)
	}
	defer sys.Detach(dir)
	mounttest.Same(t, tree, dir)
	if err := d.Match(t.Context(), src, dir); err != nil {
		t.Error(err)
	}
	other := src
	other.Off = 4096
	if err := d.Match(t.Context(), other, dir); err == nil {
		t.Error("the mount of one window was taken for that of another")
	}
	if err := d.Mount(t.Context(), src, dir); err == nil {
		t.Error("mounted on top of another mount")
	}
	pid := mounttest.Server(t, dir)
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("the server is in session %d, %v; expected one of its own, %d", sid, err, pid)
	}
	// A signal that would end other programs does not take the file system away from its users.
	hold := exec.Command("sleep", "60")
	hold.Dir = dir
	if err := hold.Start(); err != nil {
		t.Fatal(err)
	}
	if err := d.Unmount(t.Context(), dir); !errors.Is(err, mount.ErrBusy) {
		t.Errorf("unmount in use: %v, expected ErrBusy", err)
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	time.Sleep(600 * time.Millisecond) // longer than the server tries
	mounttest.Same(t, tree, dir)
	hold.Process.Kill()
	hold.Wait()
	if err := d.Unmount(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server ends", func() bool { return unix.Kill(pid, 0) != nil })
	if err := d.Unmount(t.Context(), dir); err != nil {
		t.Errorf("second unmount: %v", err)
	}
}

// start serves in this process; only other processes may look at the mount.
func start(t testing.TB, src mount.Source) (*Server, string) {
	t.Helper()
	dir := t.TempDir()
	s, err := Start(Config{Path: src.Region.Path, Off: src.Off, Size: src.Size, Dir: dir, Log: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Unmount(context.Background()); err != nil {
			t.Error(err)
			sys.Detach(dir)
		}
		<-s.Done()
	})
	return s, dir
}

func readAll(t testing.TB, dirs ...string) {
	t.Helper()
	if out, err := mounttest.Command("readall", dirs...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// The kernel must not ask again for anything that it can keep: names (missing ones, too), attributes,
// listings, link targets, contents. Only statfs has no cache. The kernel may drop its caches at any
// time, and other tests make it do so, hence the second pass has a few tries: a kernel that keeps
// nothing asks in each.
func TestSecondPassStaysInKernel(t *testing.T) {
	needFuse(t)
	s, dir := start(t, source(t, mounttest.Tree(t)))
	readAll(t, dir)
	before := s.Counters().Snapshot()
	if before["readdir"] == 0 || before["readlink"] == 0 || before["read_bytes"] < 5<<20 {
		t.Fatalf("the first pass asked for less than it needs: %v", before)
	}
	for try := 1; ; try++ {
		readAll(t, dir)
		after := s.Counters().Snapshot()
		if maps.Equal(before, after) {
			break
		}
		if try == 5 {
			t.Fatalf("%d passes after the first left the kernel, the last one with:\n%v\n%v", try, before, after)
		}
		before = after
	}
	if s.Counters().Open.Load() > 1 || s.Counters().OpenDir.Load() > 1 {
		t.Errorf("the kernel went on to ask for open or opendir: %v", s.Counters())
	}
}

// getxattr is a helper that looks for a capability, as exec does.
func getxattr(args []string) error {
	_, err := unix.Lgetxattr(args[0], "security.capability", make([]byte, 64))
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return fmt.Errorf("getxattr: %w", err)
}

// An image without attributes stops the kernel from asking for them.
func TestNoXattrsIsLearnt(t *testing.T) {
	needFuse(t)
	tree := t.TempDir()
	if err := os.WriteFile(filepath.Join(tree, "f"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	s, dir := start(t, source(t, tree))
	eventually(t, "the server learns that there are no xattrs", s.fs.noXattrs.Load)
	mounttest.Same(t, tree, dir)
	for range 3 {
		if out, err := mounttest.Command("getxattr", filepath.Join(dir, "f")).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	if c := s.Counters(); c.GetXattr.Load() > 1 {
		t.Errorf("asked again: %v", c)
	}
}

// mountOverlay mounts an overlay over lower, with its other directories below base.
func mountOverlay(lower, base, options string) (merged string, err error) {
	for _, d := range []string{"upper", "work", "merged"} {
		if err := os.MkdirAll(filepath.Join(base, d), 0o755); err != nil {
			return "", err
		}
	}
	merged = filepath.Join(base, "merged")
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work%s", lower, base, base, options)
	return merged, unix.Mount("overlay", merged, "overlay", 0, opts)
}

// overlay is a helper that changes files through an overlay over a lower directory.
func overlay(args []string) error {
	lower := args[0]
	merged, err := mountOverlay(lower, args[1], "")
	if err != nil {
		return err
	}
	defer unix.Unmount(merged, unix.MNT_DETACH)
	f, err := os.OpenFile(filepath.Join(merged, "hello"), os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString("more"); err != nil {
		return err
	}
	plain := filepath.Join(merged, "plain")
	if err := os.Rename(filepath.Join(merged, "name with spaces\n and ü"), plain); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(merged, "usr/bin/big")); err != nil {
		return err
	}
	got, err := os.ReadFile(filepath.Join(merged, "hello"))
	if err != nil {
		return err
	}
	if string(got) != "hello, world\nmore" {
		return fmt.Errorf("read %q", got)
	}
	if _, err := os.Stat(filepath.Join(merged, "usr/bin/big")); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removed file: %w", err)
	}
	if _, err := os.Stat(filepath.Join(lower, "usr/bin/big")); err != nil {
		return err
	}
	return nil
}

func TestOverlay(t *testing.T) {
	needFuse(t)
	_, dir := start(t, source(t, mounttest.Tree(t)))
	if out, err := mounttest.Command("overlay", dir, t.TempDir()).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// A file that a container changed is still there after the kernel, short of memory, dropped the names
// of the files below. The overlay then looks for the origin of its copy by a file handle.
func TestOverlayAfterNamesAreForgotten(t *testing.T) {
	needFuse(t)
	_, dir := start(t, source(t, mounttest.Tree(t)))
	base := t.TempDir()
	for round := range 2 {
		if err := sys.ShrinkDentries(dir); err != nil {
			t.Fatal(err)
		}
		merged, err := mountOverlay(dir, base, ",xino=on")
		if err != nil {
			t.Fatal(err)
		}
		changed := filepath.Join(merged, "usr/bin/big")
		for range 3 {
			if _, err := os.Lstat(changed); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
		if round == 0 {
			if err := os.Chmod(changed, 0o600); err != nil {
				t.Error(err)
			}
		}
		if err := unix.Unmount(merged, 0); err != nil {
			t.Fatal(err)
		}
	}
}

func TestBadInput(t *testing.T) {
	needFuse(t)
	good := source(t, mounttest.Tree(t))
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		change func(s *mount.Source)
		want   string
	}{
		"no image":     {func(s *mount.Source) { s.Off = 8192; s.Size -= 8192 }, "magic"},
		"missing file": {func(s *mount.Source) { s.Region.Path = "/nowhere/image" }, "no such file"},
		"short file":   {func(s *mount.Source) { s.Size += 4096 }, "bytes only"},
		"no offset":    {func(s *mount.Source) { s.Off = 5 }, "multiple of 4096"},
	} {
		src := good
		tc.change(&src)
		if err := driver().Mount(t.Context(), src, dir); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, expected %q", name, err, tc.want)
		}
		if m, _, _ := sys.Top(dir); m != nil {
			t.Fatalf("%s: mounted all the same", name)
		}
	}
	dead := Driver{Command: []string{"/bin/true"}}
	if err := dead.Mount(t.Context(), good, dir); err == nil || !strings.Contains(err.Error(), "ended before") {
		t.Errorf("a server that ends at once: %v", err)
	}
	hangs := Driver{Command: []string{"/bin/sh", "-c", "exec sleep 60"}}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := hangs.Mount(ctx, good, dir); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a server that never gets ready: %v", err)
	}
	for _, kind := range []string{region.KindPhys, region.KindDMABuf} {
		if err := driver().Probe(t.Context(), region.Info{Kind: kind, FD: -1}); !errors.Is(err, mount.ErrUnsupported) {
			t.Errorf("probe of %s: %v, expected ErrUnsupported", kind, err)
		}
	}
	t.Setenv("PATH", "/nowhere")
	if err := (Driver{}).Probe(t.Context(), good.Region); !errors.Is(err, mount.ErrUnsupported) ||
		!strings.Contains(err.Error(), "install it") {
		t.Errorf("no daxfs program: %v", err)
	}
	if err := explain(&os.PathError{Op: "open", Path: "/dev/fuse", Err: syscall.ENOENT}); !errors.Is(err,
		mount.ErrUnsupported) ||
		!strings.Contains(err.Error(), "modprobe fuse") {
		t.Errorf("no /dev/fuse: %v", err)
	}
}

// An image whose file shrinks under the server causes errors, not a crash.
func TestTruncatedUnderServer(t *testing.T) {
	needFuse(t)
	src := source(t, mounttest.Tree(t))
	_, dir := start(t, src)
	if err := os.Truncate(src.Region.Path, daxfs.BlockSize); err != nil {
		t.Fatal(err)
	}
	out, err := mounttest.Command("readall", dir).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "input/output error") {
		t.Errorf("reading what is gone: %v\n%s", err, out)
	}
	if err := sys.Alive(t.Context(), dir); err != nil {
		t.Errorf("the server died: %v", err)
	}
}
