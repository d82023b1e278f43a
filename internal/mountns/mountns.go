// Package mountns runs tests in a mount namespace of their own.
//
// No mount of a test can be left behind, and no mount is copied into namespaces that other programs on
// the machine make meanwhile, where it would stay in use as long as those programs run.
package mountns

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// env marks the process in the new namespace and its children.
const env = "DAXFS_TEST_MOUNTNS"

// Main is the body of a TestMain and returns the exit status. As root it starts the test binary again
// in a new namespace; otherwise it runs the tests in place.
func Main(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run()
	}
	if !Inside() {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), env+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		err := cmd.Run()
		if cmd.ProcessState == nil {
			fmt.Fprintln(os.Stderr, "new mount namespace:", err)
			return 1
		}
		return cmd.ProcessState.ExitCode()
	}
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		fmt.Fprintln(os.Stderr, "make / private:", err)
		return 1
	}
	return m.Run()
}

// Inside tells whether this process is in a namespace that Main made.
func Inside() bool { return os.Getenv(env) != "" }
