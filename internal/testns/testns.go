// Package testns runs tests in mount and PID namespaces of their own, so that nothing of a test run
// outlives it, however it ends.
//
// No mount of a test can be left behind, and no mount is copied into namespaces that other programs on
// the machine make meanwhile, where it would stay in use as long as those programs run. When the test
// run ends or is killed, the kernel kills every process that the tests started.
package testns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// stageEnv tells a process of a test run its stage: unset for the process that "go test" started,
// "init" for PID 1 of the namespaces, "test" for the process that runs the tests, and its children.
const stageEnv = "DAXFS_TEST_STAGE"

// Main is the body of a TestMain and returns the exit status. As root it starts the test binary again
// in new namespaces; otherwise it runs the tests in place.
func Main(m interface{ Run() int }) int {
	if os.Geteuid() != 0 {
		return m.Run()
	}
	return Run(m.Run, 0, func() error { return nil })
}

// Inside tells whether this process is in the namespaces that Run made.
func Inside() bool { return os.Getenv(stageEnv) == "test" }

// Outside tells whether this process is the one that will make the namespaces.
func Outside() bool { return os.Getenv(stageEnv) == "" }

// Run runs f in new mount and PID namespaces, and in those that flags adds, after prepare has set them
// up, and returns the exit status. It runs this program three times: "go test" knows the first process,
// the second is PID 1, and the third calls f. PID 1 does nothing but reap orphans. It could not do that
// beside f, because it would take the exit status of a child from the os/exec that waits for it.
func Run(f func() int, flags uintptr, prepare func() error) int {
	switch os.Getenv(stageEnv) {
	case "":
		return outside(flags)
	case "init":
		return initProcess(prepare)
	default:
		return f()
	}
}

// outside starts PID 1 and waits for it. The kernel ends all processes of a PID namespace with PID 1.
func outside(flags uintptr) int {
	// The child's death signal is tied to this thread, so the thread must live as long as the process.
	runtime.LockOSThread()
	signals := catch()
	init, err := start("init", &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | flags,
		Pdeathsig:  unix.SIGKILL,
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "enter new namespaces:", err)
		return 1
	}
	go forward(signals, init.Process)
	if err := init.Wait(); init.ProcessState == nil {
		fmt.Fprintln(os.Stderr, "wait for the tests:", err)
		return 1
	}
	return exitStatus(init.ProcessState.Sys().(syscall.WaitStatus))
}

// initProcess is PID 1. It sets up the namespaces, starts the tests, and reaps orphans.
func initProcess(prepare func() error) int {
	if err := errors.Join(ownMounts(), prepare()); err != nil {
		fmt.Fprintln(os.Stderr, "prepare the namespaces of the tests:", err)
		return 1
	}
	signals := catch()
	tests, err := start("test", nil)
	if err != nil {
		fmt.Fprintln(os.Stderr, "start the tests:", err)
		return 1
	}
	go forward(signals, tests.Process)
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			fmt.Fprintln(os.Stderr, "wait for the tests:", err)
			return 1
		case pid == tests.Process.Pid:
			return exitStatus(status)
		}
	}
}

// ownMounts makes mounts private and mounts a /proc of the new PID namespace.
func ownMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	return nil
}

// start starts this program again, in a later stage.
func start(stage string, attr *syscall.SysProcAttr) (*exec.Cmd, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = os.Args
	cmd.Env = append(os.Environ(), stageEnv+"="+stage)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = attr
	return cmd, cmd.Start()
}

// catch returns the signals that stop tests. The tests handle those of go test's time limit (SIGQUIT)
// and of ^C themselves: they print their stacks, and their end ends everything.
func catch() <-chan os.Signal {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT)
	return signals
}

func forward(signals <-chan os.Signal, p *os.Process) {
	for sig := range signals {
		p.Signal(sig) // fails if p has ended, which is waited for
	}
}

func exitStatus(status syscall.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}
