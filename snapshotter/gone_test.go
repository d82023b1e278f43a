package snapshotter_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/snapshotter"
)

// The lower of a snapshot that is removed while mounted stays until its overlay is dead, also when the
// mount is detached and only a process with an O_PATH descriptor or a working directory keeps it alive.
func TestRemovedWhileMounted(t *testing.T) {
	for name, make := range map[string]func(*env, string) []mount.Mount{
		"active": func(e *env, key string) []mount.Mount { return e.prepare(key, "default/1/a") },
		"view": func(e *env, key string) []mount.Mount {
			m, err := e.View(e.t.Context(), key, "default/1/a")
			e.must(err)
			return m
		},
		"committed": func(e *env, key string) []mount.Mount { return e.prepare(key, "default/1/a") },
		"volatile":  func(e *env, key string) []mount.Mount { return e.prepare(key, "default/1/a") },
	} {
		t.Run(name, func(t *testing.T) {
			var opts snapshotter.Options
			if name == "volatile" {
				opts.MountOptions = []string{"volatile"}
			}
			e := newEnv(t, opts)
			ctx := t.Context()
			e.layer("default/1/a", "", "a")
			mounts := make(e, "default/2/c")
			upper := filepath.Dir(option(mounts, "upperdir"))
			root := t.TempDir()
			e.must(mount.All(mounts, root))
			fd, err := unix.Open(root, unix.O_PATH|unix.O_CLOEXEC, 0)
			e.must(err)
			defer func() {
				if fd >= 0 {
					unix.Close(fd)
				}
			}()
			if name == "committed" {
				e.must(e.Commit(ctx, "default/3/mine", "default/2/c"))
				e.must(e.Flush(ctx))
				e.must(e.Remove(ctx, "default/3/mine"))
			} else {
				e.must(e.Remove(ctx, "default/2/c"))
			}
			e.must(e.Remove(ctx, "default/1/a"))
			stays := func(when string) {
				t.Helper()
				e.must(e.Flush(ctx))
				e.must(e.Cleanup(ctx))
				if _, err := os.Stat(upper); err != nil || len(e.fake.state().images) != 1 {
					t.Fatalf("%s: images %v, directory: %v", when, e.fake.state().images, err)
				}
			}
			stays("mounted")
			e.restart()
			stays("mounted, after a restart")
			e.must(unix.Unmount(root, unix.MNT_DETACH))
			stays("detached")
			if f, err := unix.Openat(fd, "a", unix.O_RDONLY, 0); err != nil {
				t.Errorf("a file below the descriptor: %v", err)
			} else {
				unix.Close(f)
			}
			e.must(unix.Close(fd))
			fd = -1
			e.eventually(func() string { // the kernel frees an overlay a moment after its last user is gone
				e.must(e.Cleanup(ctx))
				left, err := os.ReadDir(filepath.Join(e.root, "snapshots"))
				if e.must(err); len(left) > 0 || len(e.fake.state().images)+len(e.fake.state().layers) > 0 {
					return "directories, images or layers are left over"
				}
				return ""
			})
		})
	}
}

// Concurrent cleanups find the same overlays dead; none fails because another one removed their directories.
func TestCleanupsAtOnce(t *testing.T) {
	e := newEnv(t, snapshotter.Options{})
	e.layer("default/1/a", "", "a")
	for round := range 10 {
		for i := range 10 {
			e.prepare(fmt.Sprintf("default/%d/c", 100*round+i+2), "default/1/a")
		}
		for i := range 10 {
			e.must(e.Remove(t.Context(), fmt.Sprintf("default/%d/c", 100*round+i+2)))
		}
		var cleanups errgroup.Group
		for range 8 {
			cleanups.Go(func() error { return e.Cleanup(t.Context()) })
		}
		e.must(cleanups.Wait())
	}
}

// A disk that is full to the last byte and inode can be freed: removing needs no room.
func TestFullDiskGetsFree(t *testing.T) {
	needRoot(t)
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=8m,nr_inodes=200"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(disk, unix.MNT_DETACH)
	root := filepath.Join(disk, "root")
	s, err := snapshotter.New(t.Context(), root, newFakeLowers(t.TempDir()), snapshotter.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	e := &env{Snapshotter: s, t: t, root: root}
	m := e.prepare("default/1/hog", "")
	hog := m[0].Source
	e.must(os.WriteFile(filepath.Join(hog, "fill"), nil, 0o600))
	f, err := os.OpenFile(filepath.Join(hog, "fill"), os.O_WRONLY, 0)
	e.must(err)
	for block := make([]byte, 4096); err == nil; {
		_, err = f.Write(block)
	}
	f.Close()
	for i := 0; ; i++ {
		if err := os.Mkdir(filepath.Join(hog, strings.Repeat("d", i+1)), 0o700); err != nil {
			break
		}
	}
	e.must(s.Remove(t.Context(), "default/1/hog"))
	e.must(s.Cleanup(t.Context()))
	var st unix.Statfs_t
	e.must(unix.Statfs(disk, &st))
	if left, err := os.ReadDir(filepath.Join(root, "snapshots")); err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v; %d blocks and %d inodes are free", left, err, st.Bfree, st.Ffree)
	}
	e.prepare("default/2/next", "")
}
