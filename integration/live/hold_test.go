package live

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// grasp is one way to hold an image.
type grasp struct {
	// Namespace means in a mount namespace of its own, a copy of ours.
	Namespace bool
	// Mount is the path to the image: "own" is the mount of the table, "overlay" has an upper directory
	// and "lowers" has none; "bind" and "idmapped" are copies of the mount.
	Mount string
	// Lazy unmounts it lazily, so that no mount table shows it.
	Lazy bool
	// Thing is the held object: "fd", "map", "cwd", "dirfd", "path" (an O_PATH descriptor) or "nothing".
	Thing string
}

// holders are a worker's holdings.
type holders struct {
	mu   sync.Mutex
	list map[int]*holding
}

// holding belongs to a thread with its own working directory, and perhaps its own mount namespace.
type holding struct {
	how    grasp
	checks chan *answer
	found  chan error
	things []thing
	mnt    string // the mount point
}

// thing is one held file.
type thing struct {
	e    entry
	fd   int // -1 if there is none
	mem  []byte
	name string // relative to fd, or to the working directory
}

var errNoHold = errors.New("nothing of that name is held")

func (h *holders) add(id int, o *order, want map[string]entry, rnd *rand.Rand) error {
	g := &holding{how: o.How, checks: make(chan *answer), found: make(chan error)}
	ready := make(chan error)
	go g.run(o, want, rnd, ready)
	if err := <-ready; err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.list[id] = g
	return nil
}

func (h *holders) check(id int, a *answer) error {
	h.mu.Lock()
	g := h.list[id]
	defer h.mu.Unlock() // a holding does not end during its check
	if g == nil {
		return nil
	}
	g.checks <- a
	return <-g.found
}

func (h *holders) end(id int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.list[id]
	if g == nil {
		return errNoHold
	}
	delete(h.list, id)
	close(g.checks)
	return <-g.found
}

// run holds until checks is closed.
func (g *holding) run(o *order, want map[string]entry, rnd *rand.Rand, ready chan error) {
	runtime.LockOSThread() // for ever: the thread ends with this goroutine
	if err := g.take(o, want, rnd); err != nil {
		ready <- errors.Join(fmt.Errorf("%+v: %w", o.How, err), g.leave())
		return
	}
	ready <- nil
	for a := range g.checks {
		g.found <- g.look(a)
	}
	g.found <- g.leave()
}

func (g *holding) take(o *order, want map[string]entry, rnd *rand.Rand) error {
	flags := unix.CLONE_FS
	if g.how.Namespace {
		flags = unix.CLONE_NEWNS
	}
	if err := unix.Unshare(flags); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	dir, err := g.mount(o)
	if err != nil {
		return err
	}
	if err := g.keep(dir, want, rnd); err != nil {
		return err
	}
	if g.how.Lazy && g.mnt != "" {
		mnt := g.mnt
		g.mnt = ""
		return unix.Unmount(mnt, unix.MNT_DETACH)
	}
	return nil
}

// mount returns the directory through which the image is reached.
func (g *holding) mount(o *order) (dir string, err error) {
	switch g.how.Mount {
	case "own":
		return o.Dir, nil
	case "overlay", "lowers":
		dir, err = overlay(o.Dir, o.Over, g.how.Mount == "overlay")
	case "bind", "idmapped":
		dir = filepath.Join(o.Over, "m")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", err
		}
		if g.how.Mount == "bind" {
			err = unix.Mount(o.Dir, dir, "", unix.MS_BIND, "")
		} else {
			err = idmapped(o.Dir, dir)
		}
	}
	if err == nil {
		g.mnt = dir
	}
	return dir, err
}

// keep holds some files of a directory, or of the whole image unless a directory is held.
func (g *holding) keep(dir string, want map[string]entry, rnd *rand.Rand) error {
	if g.how.Thing == "nothing" {
		return nil
	}
	var names []string
	for name, e := range want {
		if e.regular() && e.size > 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	rnd.Shuffle(len(names), func(i, k int) { names[i], names[k] = names[k], names[i] })
	base := -1
	switch g.how.Thing {
	case "cwd", "dirfd":
		in := path.Dir(names[0])
		names = slices.DeleteFunc(names, func(name string) bool { return path.Dir(name) != in })
		at := filepath.Join(dir, in)
		if g.how.Thing == "cwd" {
			base = unix.AT_FDCWD
			if err := unix.Chdir(at); err != nil {
				return fmt.Errorf("chdir: %w", err)
			}
			break
		}
		fd, err := unix.Open(at, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		base = fd
	default:
		names = names[:min(len(names), 4)]
	}
	for _, name := range names {
		th := thing{e: want[name], fd: base, name: path.Base(name)}
		if err := g.keepOne(&th, filepath.Join(dir, name), rnd); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		g.things = append(g.things, th)
	}
	return nil
}

func (g *holding) keepOne(th *thing, at string, rnd *rand.Rand) (err error) {
	switch g.how.Thing {
	case "fd":
		th.fd, err = unix.Open(at, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	case "path":
		th.fd, err = unix.Open(at, unix.O_PATH|unix.O_CLOEXEC, 0)
	case "map":
		fd, err := unix.Open(at, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		th.fd = -1
		flags := []int{unix.MAP_SHARED, unix.MAP_PRIVATE}[rnd.IntN(2)]
		th.mem, err = unix.Mmap(fd, 0, pages(th.e.size), unix.PROT_READ, flags)
		return errors.Join(err, unix.Close(fd))
	default: // the kernel knows some names, and has pages of some of their inodes; others were never looked up
		switch rnd.IntN(3) {
		case 0:
			return th.open(nil)
		case 1:
			var st unix.Stat_t
			return unix.Fstatat(th.fd, th.name, &st, 0)
		}
	}
	return err
}

// look reads everything that is held. For a held directory it opens names in it.
func (g *holding) look(a *answer) error {
	var errs []error
	for i := range g.things {
		th := &g.things[i]
		var err error
		switch g.how.Thing {
		case "fd":
			err = th.read(th.fd)
		case "map":
			if err = unix.Madvise(th.mem, unix.MADV_DONTNEED); err == nil {
				err = compareMapped(th.mem, th.e)
			}
		case "path":
			err = th.reopen(a)
		default:
			err = th.open(a)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%+v: %q: %w", g.how, th.name, err))
		}
		a.Objects++
	}
	return errors.Join(errs...)
}

// read compares the contents with those in the pool now.
func (th *thing) read(fd int) error {
	if err := unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	b := make([]byte, th.e.size)
	for n := 0; n < len(b); {
		k, err := unix.Pread(fd, b[n:], int64(n))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		if k == 0 {
			return fmt.Errorf("%w: %d bytes, expected %d", errForeign, n, len(b))
		}
		n += k
	}
	return compare(b, th.e.id, th.e.size, 0)
}

// open opens a name. If a is nil it must exist; otherwise missing names are counted.
func (th *thing) open(a *answer) error {
	fd, err := unix.Openat(th.fd, th.name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	return th.opened(fd, err, a)
}

func (th *thing) reopen(a *answer) error {
	fd, err := unix.Open(fmt.Sprintf("/proc/thread-self/fd/%d", th.fd), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	return th.opened(fd, err, a)
}

func (th *thing) opened(fd int, err error, a *answer) error {
	if err == nil {
		defer unix.Close(fd)
		err = th.read(fd)
	}
	if err != nil && a != nil && !errors.Is(err, errForeign) {
		a.Lost++
		return nil
	}
	return err
}

func (g *holding) leave() error {
	closed := map[int]bool{}
	var errs []error
	for _, th := range g.things {
		if th.mem != nil {
			errs = append(errs, unix.Munmap(th.mem))
		}
		if th.fd >= 0 && !closed[th.fd] {
			closed[th.fd] = true
			errs = append(errs, unix.Close(th.fd))
		}
	}
	errs = append(errs, unix.Chdir("/"))
	if g.mnt != "" {
		errs = append(errs, unix.Unmount(g.mnt, unix.MNT_DETACH))
	}
	return errors.Join(errs...)
}

// userNS returns a user namespace for mapping owners, or the error.
var userNS = sync.OnceValues(func() (*os.File, error) {
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: 100000, Size: 65536}},
		GidMappings: []syscall.SysProcIDMap{{HostID: 100000, Size: 65536}},
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	return os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
})

// idmapped attaches a copy of the mount on dir to at, with mapped owners as in a user namespace.
func idmapped(dir, at string) error {
	ns, err := userNS()
	if err != nil {
		return err
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("map owners: %w", err)
	}
	return unix.MoveMount(fd, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH)
}
