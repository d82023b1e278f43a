package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// stageEnv tells a process of a test run which of the three it is: unset for the one that "go test" started, "init" for
// PID 1 of the namespaces, "test" for the one that runs the tests.
const stageEnv = "DAXFS_TEST_STAGE"

// cniState is where CNI plugins keep addresses that they gave out, whatever they are told.
const cniState = "/var/lib/cni"

// unavailable is why no stack can be had here; empty when one can.
var unavailable string

// Main builds the programs, enters namespaces of its own and runs the tests there. It returns the exit status of the
// process. Benchmarks and short runs go the same way: New decides what to skip.
func Main(m interface{ Run() int }, more ...Build) int {
	switch os.Getenv(stageEnv) {
	case "":
		return outside(m, more)
	case "init":
		return inside()
	default:
		return m.Run()
	}
}

// Isolated runs f as the tests are run, for programs that are no test. It does not return in the outer processes
// before f has ended in the inner one.
func Isolated(f func() int) int { return Main(runFunc(f)) }

// Show runs a demonstration as Isolated does, with a context that a signal ends, and returns the exit status of the
// program. What goes wrong is told on standard error after the program's name.
func Show(name string, f func(context.Context) error) int {
	return Isolated(func() int {
		// Twice ^C changes nothing: what was started has to be ended. A terminal sends it to everyone, and the outer
		// processes pass it on as well.
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

// outside prepares what needs the host's network, then starts itself again in new namespaces.
func outside(m interface{ Run() int }, more []Build) int {
	if os.Getuid() != 0 {
		unavailable = "needs root: it mounts filesystems and runs containers"
		return m.Run()
	}
	if shortRun() {
		unavailable = "-short"
		return m.Run()
	}
	if _, err := buildTools(more...); err != nil {
		fmt.Fprintln(os.Stderr, "build the programs under test:", err)
		return 1
	}
	// A time limit of go test (SIGQUIT) and ^C are for the tests; they print where they stand, then all of it ends. From here on
	// there is something to remove.
	forward := make(chan os.Signal, 1)
	signal.Notify(forward, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT)
	release, err := claimRunDir()
	if err != nil {
		fmt.Fprintln(os.Stderr, "prepare the directory of running tests:", err)
		return 1
	}
	defer release()
	// A mount point must exist before it can be hidden. On a machine without CNI it is ours to remove again.
	if err := os.Mkdir(cniState, 0o755); err == nil {
		defer os.Remove(cniState)
	}
	// The death signal of the child is tied to this thread, so the thread must live as long as the process.
	runtime.LockOSThread()
	p, err := os.StartProcess("/proc/self/exe", os.Args, &os.ProcAttr{
		Env:   append(os.Environ(), stageEnv+"=init"),
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys: &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
			Pdeathsig:  unix.SIGKILL,
		},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "enter new namespaces:", err)
		return 1
	}
	go func() {
		for sig := range forward {
			p.Signal(sig)
		}
	}()
	state, err := p.Wait()
	if err != nil {
		fmt.Fprintln(os.Stderr, "wait for the tests:", err)
		return 1
	}
	return exitStatus(syscall.WaitStatus(state.Sys().(syscall.WaitStatus)))
}

// claimRunDir marks the directory of running tests as in use until release. If nobody else uses it, what runs that were
// killed left there is removed.
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

// removeCgroups removes the control groups of the containers' namespaces, which runc makes and nobody removes, and those
// of containers that were interrupted while they were made. One that is in use stays.
func removeCgroups() {
	for _, namespace := range []string{Namespace, "k8s.io"} {
		for _, pattern := range []string{"/sys/fs/cgroup/" + namespace, "/sys/fs/cgroup/*/" + namespace} {
			for _, glob := range []string{pattern + "/*", pattern} {
				dirs, _ := filepath.Glob(glob) // the pattern is right
				for _, dir := range dirs {
					unix.Rmdir(dir) // fails for files, and for what is in use
				}
			}
		}
	}
}

// shortRun finds -test.short before the flags are parsed.
func shortRun() bool {
	for _, a := range os.Args[1:] {
		if a == "-test.short" || a == "-test.short=true" {
			return true
		}
	}
	return false
}

// inside is PID 1 of the namespaces: it makes them usable, starts the tests, and reaps what the shims leave behind.
func inside() int {
	if err := prepareNamespaces(); err != nil {
		fmt.Fprintln(os.Stderr, "prepare the namespaces of the tests:", err)
		return 1
	}
	if err := os.Setenv(stageEnv, "test"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	p, err := os.StartProcess("/proc/self/exe", os.Args, &os.ProcAttr{
		Env:   os.Environ(),
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "start the tests:", err)
		return 1
	}
	forward := make(chan os.Signal, 1)
	signal.Notify(forward, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT)
	go func() {
		for sig := range forward {
			syscall.Kill(p.Pid, sig.(syscall.Signal))
		}
	}()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			fmt.Fprintln(os.Stderr, "wait for the tests:", err)
			return 1
		case pid == p.Pid:
			return exitStatus(status) // the kernel ends every other process of the namespace now
		}
	}
}

func exitStatus(status syscall.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

// prepareNamespaces gives the tests empty state directories, their own /proc and /sys, and a loopback link.
func prepareNamespaces() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	// /run holds /run/containerd, /run/nerdctl, /run/netns, /run/xtables.lock; an empty one also hides systemd, so that
	// cgroups are made directly.
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

// EndLostShims ends the shims that containerd forgot: one that dies after it started a shim, and before it has noted that,
// leaves it running for good. It is for when no container is left.
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

// ownProcesses lists the processes of this PID namespace but PID 1 and this one, as "pid command line". Threads that
// ended and wait for PID 1 to reap them are left out.
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
