package mount_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/mounttest"
	"github.com/daxfs/daxfs-snapshotter/mount/internal/sys"
)

func init() { helpers["hold"] = hold }

// hold is a helper process that uses a path, reports that, and goes on until its input ends.
func hold(args []string) error {
	runtime.LockOSThread() // a mount namespace belongs to the thread that left the old one
	f, ok := holds[args[0]]
	if !ok {
		return fmt.Errorf("no way %q to hold a path", args[0])
	}
	if err := f(args[1:]); err != nil {
		return err
	}
	fmt.Println("ready")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

var holds = map[string]func(args []string) error{
	"descriptor": func(a []string) error { return openFor(a[0], unix.O_RDONLY) },
	"O_PATH":     func(a []string) error { return openFor(a[0], unix.O_PATH) },
	"mapping": func(a []string) error {
		fd, err := unix.Open(a[0], unix.O_RDONLY, 0)
		if err != nil {
			return err
		}
		b, err := unix.Mmap(fd, 0, 1, unix.PROT_READ, unix.MAP_PRIVATE)
		if err != nil {
			return err
		}
		sink = b[0]
		return unix.Close(fd)
	},
	"working directory": func(a []string) error { return os.Chdir(filepath.Dir(a[0])) },
	"descriptor in another namespace": func(a []string) error {
		return errors.Join(unix.Unshare(unix.CLONE_NEWNS), openFor(a[0], unix.O_RDONLY))
	},
	// Nothing shows its overlay.
	"descriptor through a lazily unmounted overlay": func(a []string) error { return openLazily(a, unix.O_RDONLY) },
	"nothing":           func([]string) error { return nil },
	"private namespace": func([]string) error { return privateNamespace() },
	"private namespace, working directory": func(a []string) error {
		return errors.Join(privateNamespace(), os.Chdir(a[0]))
	},
	"bind of a directory in another namespace": func(a []string) error {
		return errors.Join(privateNamespace(), unix.Mount(a[0], a[1], "", unix.MS_BIND, ""))
	},
	"overlay in another namespace": func(a []string) error {
		opts := fmt.Sprintf("lowerdir=%s:%s", a[0], a[1])
		return errors.Join(privateNamespace(), unix.Mount("overlay", a[1], "overlay", 0, opts))
	},
	"bind below another root": func(a []string) error {
		bind := errors.Join(privateNamespace(), unix.Mount(a[0], a[1], "", unix.MS_BIND, ""))
		return errors.Join(bind, unix.Chroot("/usr"), os.Chdir("/"))
	},
}

func openFor(path string, flags int) error {
	_, err := unix.Open(path, flags, 0)
	return err
}

func privateNamespace() error {
	return errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
}

// openLazily opens a file through an overlay over args[0] on args[1], and detaches the overlay.
func openLazily(args []string, flags int) error {
	opts := fmt.Sprintf("lowerdir=%s:%s", args[0], args[1])
	return errors.Join(unix.Mount("overlay", args[1], "overlay", 0, opts),
		openFor(filepath.Join(args[1], "file"), flags),
		unix.Unmount(args[1], unix.MNT_DETACH))
}

// holder starts a helper and returns a function that ends it.
func holder(t *testing.T, args ...string) (end func()) {
	t.Helper()
	cmd := mounttest.Command("hold", args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("hold %q: %q, %v", args, line, err)
	}
	done := false
	end = func() {
		if !done {
			in.Close()
			cmd.Wait()
		}
		done = true
	}
	t.Cleanup(end)
	return end
}

func TestUsedBy(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		tab := b.open(t, mount.Options{}, d)
		m := mustMount(t, tab, image("a", b.Publish(t, map[string]string{"file": "x", "sub/file": "y"})))
		other := mustMount(t, tab, b.add(t, "b", "other"))
		at := t.TempDir()
		expect := func(what, want string) {
			t.Helper()
			used, err := tab.UsedByAll(t.Context())
			if err != nil || !strings.Contains(used["a"], want) || (want == "") != (used["a"] == "") {
				t.Errorf("%s: used by %q, %v; expected %q", what, used["a"], err, want)
			}
			if used["b"] != "" {
				t.Errorf("%s: the other image is used by %q", what, used["b"])
			}
		}
		expect("nothing", "")
		over := overlay(t, m.Dir)
		expect("overlay", "overlay on \""+over)
		if err := sys.Detach(over); err != nil {
			t.Fatal(err)
		}
		over = overlay(t, filepath.Join(m.Dir, "sub"))
		expect("overlay over a directory", over)
		if err := sys.Detach(over); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(filepath.Join(m.Dir, "sub"), at, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		expect("bind of a directory", "mount on \""+at)
		over = overlay(t, at)
		if err := sys.Detach(at); err != nil {
			t.Fatal(err)
		}
		// Nothing names the lower any more: the owner of the upper directory has to know.
		if err := sys.Detach(over); err != nil {
			t.Fatal(err)
		}
		for _, how := range []string{
			"bind of a directory in another namespace", "overlay in another namespace", "bind below another root",
		} {
			end := holder(t, how, m.Dir, at)
			expect(how, at+"\" in the mount namespace of process")
			end()
			expect("after "+how, "")
		}
		// A clone with mapped owners is a mount of the same directory.
		if d.Name() != "fuse" {
			idmapped(t, m.Dir, at)
			expect("clone with mapped owners", at)
			if err := sys.Detach(at); err != nil {
				t.Fatal(err)
			}
		}
		// A namespace's copy of the mount, made with the namespace, is no use: Unmount removes it.
		end := holder(t, "private namespace")
		expect("copy in a namespace", "")
		if err := tab.Unmount(t.Context(), "a"); err != nil {
			t.Error(err)
		}
		if left, err := sys.AllMounts(t.Context()); err != nil || strings.Contains(fmt.Sprint(points(left)), m.Dir) {
			t.Errorf("left: %v, %v", points(left), err)
		}
		end()
		_ = other
	})
}

// A thread that has read the mounts of another namespace does not keep it alive: when the caller has the
// answer, all threads are in their own namespace.
func TestThreadsReturn(t *testing.T) {
	mounttest.Root(t)
	holder(t, "private namespace")
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	for range 200 {
		if _, err := sys.AllMounts(t.Context()); err != nil {
			t.Fatal(err)
		}
		threads, err := filepath.Glob("/proc/self/task/*/ns/mnt")
		if err != nil {
			t.Fatal(err)
		}
		for _, thread := range threads {
			if ns, err := os.Readlink(thread); err == nil && ns != own {
				t.Fatalf("%s is %s, expected %s", thread, ns, own)
			}
		}
	}
}

func points(mounts []sys.NamespaceMount) []string {
	var out []string
	for _, m := range mounts {
		out = append(out, m.Mountpoint)
	}
	return out
}

// idmapped attaches a clone of dir with mapped owners to at, as containerd does.
func idmapped(t *testing.T, dir, at string) {
	t.Helper()
	user := mounttest.Command("hold", "nothing")
	in, err := user.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	user.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: 100000, Size: 65536}},
		GidMappings: []syscall.SysProcIDMap{{HostID: 100000, Size: 65536}},
	}
	if err := user.Start(); err != nil {
		t.Fatal(err)
	}
	defer user.Wait()
	defer in.Close()
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", user.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		t.Fatal(err)
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
}

// A used copy of the mount in another namespace keeps the image.
func TestUnmountBusyElsewhere(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		tab := b.open(t, mount.Options{}, d)
		img := b.add(t, "a", "one")
		m := mustMount(t, tab, img)
		end := holder(t, "private namespace, working directory", m.Dir)
		if err := tab.Unmount(t.Context(), "a"); !errors.Is(err, mount.ErrBusy) {
			t.Errorf("unmount: %v, expected ErrBusy", err)
		}
		if got := read(t, mustMount(t, tab, img).Dir); got != "one" { // the mount is usable again
			t.Errorf("read %q", got)
		}
		if err := tab.Unmount(t.Context(), "a"); !errors.Is(err, mount.ErrBusy) {
			t.Errorf("unmount: %v, expected ErrBusy", err)
		}
		end()
		if err := tab.Unmount(t.Context(), "a"); err != nil {
			t.Errorf("unmount after the holder ended: %v", err)
		}
	})
}

// An open file of a removed image keeps its contents, however it was opened.
func TestUnused(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		tab := b.open(t, mount.Options{}, d)
		mustMount(t, tab, b.add(t, "other", "x"))
		for _, tc := range []struct {
			how  string
			free bool // despite the holder, without eviction
		}{
			{"descriptor", false},
			{"mapping", false},
			{"descriptor in another namespace", false},
			{"descriptor through a lazily unmounted overlay", false},
			{"O_PATH", true},
		} {
			t.Run(tc.how, func(t *testing.T) {
				slot := b.Publish(t, map[string]string{
					"file": "held " + tc.how, "free": "free " + tc.how, "never": "never " + tc.how,
				})
				m := mustMount(t, tab, image("a", slot))
				// The holder opens through an overlay: opening through the mount itself would prevent the unmount.
				read(t, m.Dir)
				at := t.TempDir()
				var end func()
				if tc.how == "descriptor through a lazily unmounted overlay" {
					end = holder(t, tc.how, m.Dir, at)
				} else {
					over := overlay(t, m.Dir)
					end = holder(t, tc.how, filepath.Join(over, "file"))
					if err := unix.Unmount(over, unix.MNT_DETACH); err != nil {
						t.Fatal(err)
					}
				}
				if err := tab.Unmount(t.Context(), "a"); err != nil {
					t.Fatal(err)
				}
				held, free, never := slot.Nids["file"], slot.Nids["free"], slot.Nids["never"]
				b.Retract(t, slot)
				erased := 0
				ask := func(evicted bool, nids ...uint64) []bool {
					t.Helper()
					var all []mount.Extent
					for _, nid := range nids {
						all = append(all, mount.Extent{Nids: []uint64{nid}, Evicted: evicted})
					}
					got, err := tab.Unused(t.Context(), all, func() error { erased++; return b.Erase(nids...) })
					if err != nil {
						t.Fatal(err)
					}
					return got
				}
				exact := d.Name() == "fuse" || d.Name() == "erofs-dax"
				got := ask(false, held, free, never)
				if want := []bool{tc.free && !exact, true, true}; fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("unused: %v, expected %v", got, want)
				}
				if got := ask(true, held); got[0] {
					t.Error("an inode that is held counts as evicted")
				}
				if d.Name() == "erofs-dax" {
					return // a mapped inode stays in memory as long as the pool is mounted
				}
				end()
				for range 3000 { // the kernel closes the files of an ended process a little later
					if got = ask(false, held); got[0] {
						break
					}
					time.Sleep(10 * time.Millisecond)
				}
				if !got[0] {
					t.Error("the file is in use after its holder ended")
				}
				if got, err := tab.Unused(t.Context(), []mount.Extent{{Nids: []uint64{free, held}}}, nil); err != nil ||
					!got[0] {
					t.Errorf("an extent of two inodes: %v, %v", got, err)
				}
				if erased == 0 {
					t.Error("erase was not called")
				}
			})
		}
	})
}

// Unmount has removed our mount of an image, and a copy of it was busy; then the copy ended. Nothing holds
// the slot any more, and the table still lists the image.
func TestUnusedAfterBusyCopy(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		tab := b.open(t, mount.Options{}, d)
		mustMount(t, tab, b.add(t, "other", "x"))
		m := mustMount(t, tab, b.add(t, "a", "one"))
		end := holder(t, "private namespace, working directory", m.Dir)
		if err := tab.Unmount(t.Context(), "a"); !errors.Is(err, mount.ErrBusy) {
			t.Errorf("unmount: %v, expected ErrBusy", err)
		}
		end()
		for range 20 { // the kernel ends the namespace of an ended process a little later
			if _, err := tab.Unused(t.Context(), nil, nil); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		if err := tab.Unmount(t.Context(), "a"); err != nil {
			t.Error(err)
		}
	})
}

// A process whose working directory is in an invisible overlay cannot open an erased file unless the
// inode is in memory, and then the inode is not evicted.
func TestUnusedWorkingDirectory(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		tab := b.open(t, mount.Options{}, d)
		mustMount(t, tab, b.add(t, "other", "x"))
		slot := b.Publish(t, map[string]string{"file": "known", "never": "never looked up"})
		m := mustMount(t, tab, image("a", slot))
		over := overlay(t, m.Dir)
		dir, err := os.Open(over)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		if err := unix.Unmount(over, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
		if err := tab.Unmount(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		b.Retract(t, slot)
		got, err := tab.Unused(t.Context(), []mount.Extent{{Nids: []uint64{slot.Nids["never"]}, Evicted: true}},
			func() error { return b.Erase(slot.Nids["never"]) })
		if err != nil || !got[0] {
			t.Errorf("a file that was never opened: %v, %v", got, err)
		}
		fd, err := unix.Openat(int(dir.Fd()), "never", unix.O_RDONLY, 0)
		if err == nil {
			unix.Close(fd)
			t.Error("a name in a directory of a removed image still opens")
		}
	})
}

// The pool is mounted a second time by hand: nothing is known about the users of that mount.
func TestUnusedMountedTwice(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		tab := b.open(t, mount.Options{}, d)
		mustMount(t, tab, b.add(t, "a", "x"))
		dir := t.TempDir()
		if err := d.Mount(t.Context(), mount.Source{Region: b.pool().Region, Size: b.Size}, dir); err != nil {
			t.Fatal(err)
		}
		_, err := tab.Unused(t.Context(), nil, nil)
		if d.Name() == "erofs-dax" {
			if err != nil { // a device has one superblock, however often it is mounted
				t.Error(err)
			}
		} else if !errors.Is(err, mount.ErrBusy) || !strings.Contains(err.Error(), dir) {
			t.Errorf("unused: %v, expected ErrBusy that names %s", err, dir)
		}
		if err := sys.Unmount(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
		if _, err := tab.Unused(t.Context(), nil, nil); err != nil {
			t.Error(err)
		}
	})
}

// Alive finds file systems of a pool that no mount table shows.
func TestAlive(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *bed, d mount.Driver) {
		tab := b.open(t, mount.Options{}, d)
		gone(t, tab)
		m := mustMount(t, tab, b.add(t, "a", "one"))
		over := overlay(t, m.Dir)
		dir, err := os.Open(over)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		if err := unix.Unmount(over, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(tab.Unmount(t.Context(), "a"), tab.UnmountPool(t.Context())); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if alive, err := tab.Alive(t.Context()); err != nil || !alive {
				t.Errorf("alive: %t, %v; a lazily unmounted overlay uses the pool", alive, err)
			}
		}
		dir.Close()
		gone(t, tab)
		if left, err := os.ReadDir(filepath.Join(b.root, "live")); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	})
}
