package sys

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Namespace is a mount namespace.
type Namespace struct {
	id string // "mnt:[4026531841]"
	// who names a process in it, or the mount that keeps it alive.
	who string
	own bool
	// tasks are files below /proc that lead to it; several, because processes end.
	tasks []string
	// pin is a mount point, in the namespace via, that keeps this one alive without a process.
	pin string
	via *Namespace
	// table is a mount table below /proc of a process with an unreadable, possibly known namespace.
	table string
}

// String describes the namespace for messages.
func (n *Namespace) String() string {
	if n.own {
		return "this mount namespace"
	}
	return "the mount namespace of " + n.who
}

// Own tells whether this is the namespace of this process.
func (n *Namespace) Own() bool { return n.own }

// NamespaceMount is a mount in some namespace.
type NamespaceMount struct {
	*mountinfo.Info
	Namespace *Namespace
}

// maxTasks limits the remembered threads of one namespace.
const maxTasks = 8

// AllMounts returns the mounts of all mount namespaces that this process can find: those of all
// threads of all processes below /proc, and those kept by a bind mount of their nsfs file. It reads
// each namespace from its own root, because /proc/PID/mountinfo omits mounts outside the root
// directory of the process. For a process that a security module protects there is only that file.
func AllMounts(ctx context.Context) ([]NamespaceMount, error) { return readMounts(ctx, true) }

// OtherMounts is AllMounts without our own namespace.
func OtherMounts(ctx context.Context) ([]NamespaceMount, error) { return readMounts(ctx, false) }

func readMounts(ctx context.Context, own bool) ([]NamespaceMount, error) {
	found, err := namespaces(ctx)
	if err != nil {
		return nil, err
	}
	var out []NamespaceMount
	seen := map[int]bool{} // by identifier, which is unique on the machine
	err = elsewhere(func(proc *os.File) error {
		for i := 0; i < len(found.list); i++ { // the list grows during the loop
			if err := ctx.Err(); err != nil {
				return err
			}
			n := found.list[i]
			if n.own && !own && !found.tables {
				continue
			}
			mounts, err := n.mounts(proc)
			if err != nil {
				return err
			}
			for _, m := range mounts {
				if !seen[m.ID] && (own || !n.own) {
					out = append(out, NamespaceMount{m, n})
				}
				seen[m.ID] = true
				if m.FSType == "nsfs" && strings.HasPrefix(m.Root, "mnt:[") {
					found.pinned(m.Root, m.Mountpoint, n)
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the mounts of all namespaces: %w", err)
	}
	return out, nil
}

// UnmountIn removes the top mount on dir in another namespace. It fails with ErrBusy if the mount is
// in use there or may not be unmounted.
func UnmountIn(n *Namespace, dir string) error {
	return elsewhere(func(proc *os.File) error {
		if ok, err := n.enter(proc); err != nil || !ok {
			return err
		}
		err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist):
			return nil
		// EINVAL: locked by a user namespace, or gone by now
		case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EINVAL):
			return fmt.Errorf("%q in %v: %w", dir, n, ErrBusy)
		}
		return fmt.Errorf("unmount %q in %v: %w", dir, n, err)
	})
}

// elsewhere runs f on a thread that may change its mount namespace, then ends. proc is our /proc.
func elsewhere(f func(proc *os.File) error) error {
	done := make(chan error)
	go onThread(done, f)
	return <-done
}

func onThread(done chan<- error, f func(proc *os.File) error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The first thread never ends, and its namespace counts as that of the process. While this goroutine
		// occupies it, run f on another thread.
		defer runtime.UnlockOSThread()
		next := make(chan error)
		go onThread(next, f)
		done <- <-next
		return
	}
	// Do not unlock: the thread must end with the goroutine.
	done <- func() error {
		proc, err := os.Open("/proc")
		if err != nil {
			return err
		}
		defer proc.Close()
		own, err := os.Open("/proc/thread-self/ns/mnt")
		if err != nil {
			return err
		}
		defer own.Close()
		// A thread that shares its working directory with others cannot change its mount namespace.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		err = f(proc)
		// The kernel ends the thread some time after the caller has the answer. Until then the thread would
		// keep a namespace alive whose processes have ended, with its mounts.
		if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNS); back != nil {
			err = errors.Join(err, fmt.Errorf("return to our mount namespace: %w", back))
		}
		return err
	}()
}

// set holds the known namespaces.
type set struct {
	list []*Namespace
	byID map[string]*Namespace
	// tables is true if only the mount table of some namespaces can be read.
	tables bool
}

func (s *set) add(n *Namespace) *Namespace {
	if old := s.byID[n.id]; old != nil {
		return old
	}
	s.byID[n.id] = n
	s.list = append(s.list, n)
	return n
}

// pinned adds a namespace that a bind mount keeps. Namespaces with processes are known already.
func (s *set) pinned(id, dir string, via *Namespace) {
	s.add(&Namespace{id: id, who: fmt.Sprintf("the bind mount %q", dir), pin: dir, via: via})
}

// namespaces finds the namespaces of all threads, ours first.
func namespaces(ctx context.Context) (*set, error) {
	s := &set{byID: map[string]*Namespace{}}
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil, err
	}
	self := s.add(&Namespace{id: own, own: true, tasks: []string{"self/ns/mnt"}})
	threads, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, dir := range threads {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		path := dir + "/ns/mnt"
		id, err := os.Readlink(path)
		switch {
		case err == nil:
			n := s.add(&Namespace{id: id, who: "process " + strings.Split(dir, "/")[2]})
			if n != self && len(n.tasks) < maxTasks {
				n.tasks = append(n.tasks, strings.TrimPrefix(path, "/proc/"))
			}
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH): // it has ended
		case errors.Is(err, fs.ErrPermission): // a security module protects it
			pid := strings.Split(dir, "/")[2]
			s.add(&Namespace{id: pid, who: "process " + pid, table: pid + "/mountinfo"})
			s.tables = true
		default:
			return nil, err
		}
	}
	return s, nil
}

// enter moves this thread into the namespace. It returns false if the namespace has ended. It needs
// proc because "/proc" is another directory after the move.
func (n *Namespace) enter(proc *os.File) (bool, error) {
	if n.table != "" {
		return false, fmt.Errorf("%v may not be entered: %w", n, ErrBusy)
	}
	if n.pin != "" {
		if ok, err := n.via.enter(proc); err != nil || !ok {
			return ok, err
		}
		return n.set(unix.Open(n.pin, unix.O_RDONLY|unix.O_CLOEXEC, 0))
	}
	for _, path := range n.tasks {
		fd, err := unix.Openat(int(proc.Fd()), path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if ok, err := n.set(fd, err); err != nil || ok {
			return ok, err
		}
	}
	return false, nil
}

// set enters the namespace that was opened as fd.
func (n *Namespace) set(fd int, err error) (bool, error) {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open %v: %w", n, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNS); err != nil {
		return false, fmt.Errorf("enter %v: %w", n, err)
	}
	return true, nil
}

// mounts reads the mount table of n. It is empty if all processes of the namespace have ended.
func (n *Namespace) mounts(proc *os.File) ([]*mountinfo.Info, error) {
	table := n.table
	if table == "" {
		table = "thread-self/mountinfo"
		if ok, err := n.enter(proc); err != nil || !ok {
			return nil, err
		}
	}
	fd, err := unix.Openat(int(proc.Fd()), table, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if n.table != "" && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)) {
		return nil, nil // the process has ended
	}
	if err != nil {
		return nil, fmt.Errorf("mountinfo of %v: %w", n, err)
	}
	f := os.NewFile(uintptr(fd), "mountinfo")
	defer f.Close()
	return mountinfo.GetMountsFromReader(f, nil)
}
