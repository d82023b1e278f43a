package fusefs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
)

// Mount learns from the server's words whether it is ready and why not, and whether another driver may do.
func TestReadyReachesMount(t *testing.T) {
	for name, tc := range map[string]struct {
		say         func(w *os.File)
		want        string // part of the error; "" for none
		unsupported bool
	}{
		"ready":    {func(w *os.File) { Ready(w, nil) }, "", false},
		"an error": {func(w *os.File) { Ready(w, errors.New("rule 7\nis broken")) }, "rule 7; is broken", false},
		"unsupported": {
			func(w *os.File) { Ready(w, fmt.Errorf("no fuse: %w", mount.ErrUnsupported)) },
			"no fuse: not supported here", true,
		},
		"nothing": {func(w *os.File) { w.Close() }, `it ended before "/dir/mnt" was mounted`, false},
		"a panic": {
			func(w *os.File) { fmt.Fprintln(w, "panic: oops"); w.Close() }, `unexpected words "panic: oops"`, false,
		},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		tc.say(w)
		err = Driver{}.await(t.Context(), r, "/dir/mnt")
		r.Close()
		if (err == nil) != (tc.want == "") || err != nil && !strings.HasPrefix(err.Error(), tc.want) ||
			errors.Is(err, mount.ErrUnsupported) != tc.unsupported {
			t.Errorf("%s: %v, expected %q, unsupported: %t", name, err, tc.want, tc.unsupported)
		}
	}
}

// Without a configured command, the server is the program daxfs in PATH.
func TestCommandFromPath(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	daxfs := filepath.Join(dir, "daxfs")
	if err := os.WriteFile(daxfs, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	got, err := Driver{}.command()
	if want := []string{daxfs, "mount", "--driver", "fuse", "--foreground"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v; expected %q", got, err, want)
	}
}

func TestWhatIsServed(t *testing.T) {
	for _, tc := range []struct {
		r          region.Info
		path, want string // want is part of the error
		fd         int
	}{
		{r: region.Info{Kind: region.KindFile, Path: "/pool", FD: 7}, path: "/pool", fd: -1},
		{r: region.Info{Kind: region.KindPmem, BlockDevice: "/dev/pmem0", FD: 7}, path: "/dev/pmem0", fd: -1},
		{r: region.Info{Kind: region.KindDMABuf, Path: "/heap", FD: 7}, path: "/dev/fd/4", fd: 7},
		{r: region.Info{Kind: region.KindDMABuf, Path: "/heap", FD: -1}, want: `of "/heap" is not open`, fd: -1},
		{r: region.Info{Kind: region.KindPhys, FD: 7}, want: "served by the daxfs driver", fd: -1},
		{r: region.Info{Kind: region.KindTmpfs, FD: 7}, want: `kind "tmpfs" has no path`, fd: -1},
	} {
		path, fd, err := file(tc.r)
		if path != tc.path || fd != tc.fd || errors.Is(err, mount.ErrUnsupported) != (tc.want != "") ||
			err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %q, %d, %v; expected %q, %d, %q", tc.r, path, fd, err, tc.path, tc.fd, tc.want)
		}
	}
}

func TestServeArgsRefuses(t *testing.T) {
	for _, args := range []string{
		"", "--ready-fd 3 /file", "--ready-fd 2 /file /dir", "/file /dir", "--ready-fd 3 /file /dir more",
	} {
		if err := ServeArgs(strings.Fields(args)); err == nil ||
			!strings.Contains(err.Error(), "expected the arguments of fusefs.Driver") {
			t.Errorf("%q: %v", args, err)
		}
	}
}

// tableMountPoint makes a mount point as a mount.Table does, with a record beside it.
func tableMountPoint(t *testing.T, record string) (parent, mnt string) {
	t.Helper()
	parent = t.TempDir()
	mnt = filepath.Join(parent, "mnt")
	if err := errors.Join(os.Mkdir(mnt, 0o700),
		os.WriteFile(filepath.Join(parent, record), []byte("{}\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	return parent, mnt
}

// tryLock tells whether nobody holds the lock of a server.
func tryLock(t *testing.T, parent string) bool {
	t.Helper()
	f, err := os.Open(filepath.Join(parent, mount.ServerLock))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
		t.Fatal(err)
	}
	return err == nil
}

// In a table the server holds the lock as long as it lives, and its last words are in a log beside it.
func TestServerLockAndLog(t *testing.T) {
	needFuse(t)
	src := source(t, mounttest.Tree(t))
	for _, record := range []string{"pool.json", "image.json"} {
		parent, mnt := tableMountPoint(t, record)
		if err := driver().Mount(t.Context(), src, mnt); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { sys.Detach(mnt) })
		if tryLock(t, parent) {
			t.Errorf("%s: the lock of a server that lives is free", record)
		}
		pid := mounttest.Server(t, mnt)
		if err := unix.Kill(pid, unix.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		logFile := filepath.Join(parent, "fuse.log")
		eventually(t, "the counters are in the log", func() bool {
			b, err := os.ReadFile(logFile)
			return err == nil && bytes.Contains(b, []byte(`"lookup":`))
		})
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the lock is free", func() bool { return tryLock(t, parent) })
		if err := driver().Match(t.Context(), src, mnt); !errors.Is(err, unix.ENOTCONN) ||
			!strings.Contains(err.Error(), logFile) {
			t.Errorf("match of a dead server: %v, expected ENOTCONN and where its output is", err)
		}
		if err := driver().Unmount(t.Context(), mnt); err != nil {
			t.Errorf("unmount of a dead server: %v", err)
		}
		err := driver().Match(t.Context(), src, mnt)
		if err == nil || !strings.Contains(err.Error(), "nothing is mounted") {
			t.Errorf("match of nothing: %v", err)
		}
	}
}

// A user's mount point with the same name gets no files beside it.
func TestNoFilesBesideOtherMounts(t *testing.T) {
	needFuse(t)
	src := source(t, mounttest.Tree(t))
	parent := t.TempDir()
	mnt := filepath.Join(parent, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := driver().Mount(t.Context(), src, mnt); err != nil {
		t.Fatal(err)
	}
	defer sys.Detach(mnt)
	if des, err := os.ReadDir(parent); err != nil || len(des) != 1 {
		t.Errorf("beside the mount point: %v, %v", des, err)
	}
	if err := driver().Unmount(t.Context(), mnt); err != nil {
		t.Error(err)
	}
}

// A server that cannot be started leaves nothing mounted, and the error says what was in the way.
func TestServerDoesNotStart(t *testing.T) {
	needFuse(t)
	good := source(t, mounttest.Tree(t))
	for name, tc := range map[string]struct {
		spoil  func(t *testing.T, parent string, d *Driver, src *mount.Source)
		want   error
		saying string
	}{
		"no program": {func(_ *testing.T, _ string, d *Driver, _ *mount.Source) {
			d.Command = []string{"/nowhere/daxfs"}
		}, fs.ErrNotExist, "start the FUSE server"},
		"log is a directory": {func(t *testing.T, parent string, _ *Driver, _ *mount.Source) {
			if err := os.Mkdir(filepath.Join(parent, "fuse.log"), 0o700); err != nil {
				t.Fatal(err)
			}
		}, unix.EISDIR, "fuse.log"},
		"lock is a symbolic link": {func(t *testing.T, parent string, _ *Driver, _ *mount.Source) {
			if err := os.Symlink("elsewhere", filepath.Join(parent, mount.ServerLock)); err != nil {
				t.Fatal(err)
			}
		}, unix.ELOOP, mount.ServerLock},
		"lock is held": {func(t *testing.T, parent string, _ *Driver, _ *mount.Source) {
			f, err := os.Create(filepath.Join(parent, mount.ServerLock))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
				t.Fatal(err)
			}
		}, unix.EWOULDBLOCK, mount.ServerLock},
		"closed dma-buf": {func(_ *testing.T, _ string, _ *Driver, src *mount.Source) {
			src.Region = region.Info{Kind: region.KindDMABuf, Path: "/heap", FD: 1 << 20}
		}, unix.EBADF, "dma-buf"},
		"physical range": {func(_ *testing.T, _ string, _ *Driver, src *mount.Source) {
			src.Region = region.Info{Kind: region.KindPhys, FD: -1}
		}, mount.ErrUnsupported, "physical range"},
	} {
		t.Run(name, func(t *testing.T) {
			parent, mnt := tableMountPoint(t, "pool.json")
			d, src := driver(), good
			tc.spoil(t, parent, &d, &src)
			err := d.Mount(t.Context(), src, mnt)
			if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.saying) {
				t.Errorf("%v, expected %v that says %q", err, tc.want, tc.saying)
			}
			if m, _, err := sys.Top(mnt); m != nil || err != nil {
				t.Errorf("mounted all the same: %+v, %v", m, err)
			}
			if _, err := os.Stat(filepath.Join(parent, "elsewhere")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the link was followed: %v", err)
			}
		})
	}
}

// words collects what a server says.
type words struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (w *words) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

func (w *words) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

// Run ends with its file system, which neither the end of the context nor a signal takes from its users.
func TestRun(t *testing.T) {
	needFuse(t)
	const oom = "/proc/self/oom_score_adj"
	before, err := os.ReadFile(oom)
	if err != nil {
		t.Fatal(err)
	}
	defer os.WriteFile(oom, before, 0) // Run protects its process, which is this one
	src, dir := source(t, mounttest.Tree(t)), t.TempDir()
	var said words
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ready, ended := make(chan error, 1), make(chan error, 1)
	go func() {
		c := Config{Path: src.Region.Path, Size: src.Size, Dir: dir, Restrict: true, Log: &said}
		ended <- Run(ctx, c, func(err error) { ready <- err })
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	defer sys.Detach(dir)
	m, err := sys.MatchTop(dir, fsType, true)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("%s@0+%d", src.Region.Path, src.Size); m.Source != want {
		t.Errorf("mounted from %q, expected %q", m.Source, want)
	}
	readahead, err := os.ReadFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", m.Major, m.Minor))
	if err == nil && string(readahead) != "1024\n" { // set a moment after the mount appears, but before Run is ready
		t.Errorf("read-ahead of %q KiB", readahead)
	}
	// The shell enters the directory itself: a fork in this process must not wait for the server in it.
	hold := exec.Command("sh", "-c", `cd "$0" && echo ready && exec sleep 60`, dir)
	out, err := hold.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := hold.Start(); err != nil {
		t.Fatal(err)
	}
	defer hold.Process.Kill()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	cancel()
	eventually(t, "Run refuses", func() bool { return strings.Contains(said.String(), "still serving") })
	if err := unix.Kill(os.Getpid(), unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the counters are logged", func() bool { return strings.Contains(said.String(), "getattr") })
	line := said.String()
	line = line[strings.IndexByte(line, '{') : strings.LastIndexByte(line, '}')+1]
	var counts map[string]uint64
	if err := json.Unmarshal([]byte(line), &counts); err != nil || counts["getattr"] == 0 {
		t.Errorf("counters %q: %v", line, err)
	}
	select {
	case err := <-ended:
		t.Fatalf("Run ended while its file system was in use: %v", err)
	default:
	}
	hold.Process.Kill()
	hold.Wait()
	if err := sys.Unmount(context.Background(), dir); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("Run did not end with its file system")
	}
}

func TestRunRefuses(t *testing.T) {
	needFuse(t)
	src := source(t, mounttest.Tree(t))
	good := Config{Path: src.Region.Path, Size: src.Size, Dir: t.TempDir(), Log: t.Output()}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // a server that mounts all the same ends at once
	for name, tc := range map[string]struct {
		change func(c *Config)
		want   string
	}{
		"no image":           {func(c *Config) { c.Off, c.Size = 8192, c.Size-8192 }, good.Path + `" at 8192: `},
		"missing file":       {func(c *Config) { c.Path += ".missing" }, good.Path + ".missing"},
		"no mount point":     {func(c *Config) { c.Dir += "/missing" }, good.Dir + "/missing"},
		"a file to mount on": {func(c *Config) { c.Dir = c.Path }, good.Path + `": not a directory`},
	} {
		c := good
		tc.change(&c)
		var told error
		err := Run(ctx, c, func(err error) { told = err })
		if err == nil || !errors.Is(told, err) || !strings.Contains(err.Error(), tc.want) ||
			errors.Is(err, mount.ErrUnsupported) {
			t.Errorf("%s: %v, told %v; expected %q", name, err, told, tc.want)
		}
		if m, _, err := sys.Top(c.Dir); m != nil || err != nil {
			t.Errorf("%s: mounted all the same: %+v, %v", name, m, err)
		}
	}
	if err := setReadahead(good.Dir); err == nil || !strings.Contains(err.Error(), good.Dir) {
		t.Errorf("read-ahead of what is not mounted: %v", err)
	}
}

func TestExplain(t *testing.T) {
	for err, want := range map[error]string{
		unix.ENODEV: "modprobe fuse", unix.EPERM: "run as root", unix.EACCES: "install fuse3", unix.EIO: "",
	} {
		got := explain(err)
		if !errors.Is(got, err) || errors.Is(got, mount.ErrUnsupported) != (want != "") ||
			!strings.Contains(got.Error(), want) {
			t.Errorf("%v: %v, expected %q", err, got, want)
		}
	}
}
