package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/internal/testns"
)

// cniState is where CNI plugins record allocated addresses, whatever their configuration.
const cniState = "/var/lib/cni"

// unavailable is the reason why no stack can run here; empty if one can.
var unavailable string

// Main builds the programs, enters its own namespaces and runs the tests there. It returns the exit
// status of the process. Benchmarks and short runs use it as well: New decides what to skip.
func Main(m interface{ Run() int }, more ...Build) int {
	if testns.Outside() {
		switch {
		case os.Getuid() != 0:
			unavailable = "needs root: it mounts filesystems and runs containers"
			return m.Run()
		case shortRun():
			unavailable = "-short"
			return m.Run()
		}
		release, err := prepareHost(more)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer release()
	}
	return testns.Run(m.Run, unix.CLONE_NEWNET|unix.CLONE_NEWIPC|unix.CLONE_NEWUTS, prepareNamespaces)
}

// Isolated runs f like the tests, for other programs. The outer processes return after f has ended.
func Isolated(f func() int) int { return Main(runFunc(f)) }

// Show runs a demonstration like Isolated, with a context that a signal cancels, and returns the exit
// status of the program. It prints errors to standard error after the program's name.
func Show(name string, f func(context.Context) error) int {
	return Isolated(func() int {
		// A second ^C has no effect, because the started programs must be stopped. A terminal sends ^C to all
		// processes, and the outer ones forward it as well.
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
		defer stop()
		err := f(ctx)
		switch {
		case ctx.Err() != nil:
			fmt.Fprintln(os.Stderr, name+": interrupted, everything was cleaned up")
			return 130
		case err != nil:
			fmt.Fprintln(os.Stderr, name+":", err)
			return 1
		}
		return 0
	})
}

type runFunc func() int

func (f runFunc) Run() int { return f() }

// prepareHost prepares everything that needs the host's network or directories, until release.
func prepareHost(more []Build) (release func(), err error) {
	if _, err := buildTools(more...); err != nil {
		return nil, fmt.Errorf("build the programs under test: %w", err)
	}
	unclaim, err := claimRunDir()
	if err != nil {
		return nil, fmt.Errorf("prepare the directory of running tests: %w", err)
	}
	// A mount point must exist before it can be hidden. On a machine without CNI, remove it again.
	if err := os.Mkdir(cniState, 0o755); err != nil {
		return unclaim, nil
	}
	return func() {
		os.Remove(cniState)
		unclaim()
	}, nil
}

// claimRunDir marks the directory of running tests as in use until release. If no other run uses it,
// claimRunDir removes the leftovers of killed runs.
func claimRunDir() (release func(), err error) {
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(cache, "run.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		err = os.RemoveAll(filepath.Join(cache, "run"))
	}
	if err := errors.Join(err, unix.Flock(int(f.Fd()), unix.LOCK_SH)); err != nil {
		f.Close()
		return nil, err
	}
	return func() {
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			removeCgroups()
		}
		f.Close()
	}, nil
}

// removeCgroups removes the control groups of the containers' namespaces, which runc creates and never
// removes, and those of interrupted container creations. Groups in use stay.
func removeCgroups() {
	for _, namespace := range []string{Namespace, "k8s.io"} {
		for _, pattern := range []string{"/sys/fs/cgroup/" + namespace, "/sys/fs/cgroup/*/" + namespace} {
			for _, glob := range []string{pattern + "/*", pattern} {
				dirs, _ := filepath.Glob(glob) // the pattern is valid
				for _, dir := range dirs {
					unix.Rmdir(dir) // fails for files, and for groups in use
				}
			}
		}
	}
}

// shortRun looks for -test.short before the flags are parsed.
func shortRun() bool {
	for _, a := range os.Args[1:] {
		if a == "-test.short" || a == "-test.short=true" {
			return true
		}
	}
	return false
}

// prepareNamespaces gives the tests empty state directories and a loopback link.
func prepareNamespaces() error {
	// /run holds /run/containerd, /run/nerdctl, /run/netns, /run/xtables.lock. An empty /run also hides
	// systemd, so that cgroups are made directly.
	for _, dir := range []string{"/run", cniState} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"); err != nil {
			return fmt.Errorf("mount a private %q: %w", dir, err)
		}
	}
	return loopbackUp()
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

// EndLostShims ends shims that containerd has forgotten: if containerd dies after starting a shim, and
// before it records it, the shim runs forever. Call EndLostShims when no container is left.
func (s *Stack) EndLostShims() error {
	all, err := ownProcesses()
	if err != nil {
		return err
	}
	for _, p := range all {
		pid, command, _ := strings.Cut(p, " ")
		program, _, _ := strings.Cut(command, " ")
		if filepath.Base(program) != "containerd-shim-runc-v2" {
			continue
		}
		n, err := strconv.Atoi(pid)
		if err != nil {
			return err
		}
		if err := syscall.Kill(n, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("kill %s: %w", p, err)
		}
	}
	return nil
}

// ownProcesses lists the other processes of this PID namespace, without PID 1, as "pid command line".
func ownProcesses() ([]string, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var list []string
	for _, e := range entries {
		pid := e.Name()
		if strings.Trim(pid, "0123456789") != "" || pid == "1" || pid == fmt.Sprint(os.Getpid()) {
			continue
		}
		cmdline, err := os.ReadFile("/proc/" + pid + "/cmdline")
		if err != nil || len(cmdline) == 0 { // gone, or a zombie
			continue
		}
		list = append(list, pid+" "+strings.ReplaceAll(strings.TrimRight(string(cmdline), "\x00"), "\x00", " "))
	}
	return list, nil
}
