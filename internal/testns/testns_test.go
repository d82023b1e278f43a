package testns

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// roleEnv makes this program a test run, whose only test is a role.
const roleEnv = "DAXFS_TESTNS_ROLE"

type role func() error

// Run is the run of a test binary.
func (r role) Run() int {
	if err := r(); err != nil {
		fmt.Println(err)
		return 7
	}
	return 0
}

var roles = map[string]role{"wait": wait, "end": serve, "fail": fail, "crash": crash, "reap": reap}

func TestMain(m *testing.M) {
	if r, ok := roles[os.Getenv(roleEnv)]; ok {
		os.Exit(Main(r))
	}
	os.Exit(m.Run())
}

// serve starts a daemon, which holds the standard output until the standard input ends.
func serve() error {
	cmd := exec.Command("sh", "-c", "exec 3<&0; setsid cat <&3 &")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	fmt.Println("served")
	return err
}

// wait waits as the daemon does, so that a failed test leaves neither.
func wait() error {
	if err := serve(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

func fail() error {
	if err := serve(); err != nil {
		return err
	}
	return fmt.Errorf("failed")
}

func crash() error {
	if err := serve(); err != nil {
		return err
	}
	return unix.Kill(os.Getpid(), unix.SIGKILL)
}

// reap waits until an orphan is gone, while children end.
func reap() error {
	out, err := exec.Command("sh", "-c", "sleep 0.1 >&- & echo $!").Output()
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		return err
	}
	for unix.Kill(pid, 0) == nil {
		if err := exec.Command("sh", "-c", "exit 3").Run(); fmt.Sprint(err) != "exit status 3" {
			return fmt.Errorf("a child that exits with 3: %w", err)
		}
	}
	return serve()
}

// TestEnds ends test runs in every way: nothing that they started is left, the status and the signal
// pass through all stages, and orphans are reaped.
func TestEnds(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("new namespaces need root")
	}
	for _, tc := range []struct {
		role   string
		signal unix.Signal // sent to the process that "go test" knows
		status int
		output string
	}{
		{"end", 0, 0, ""},
		{"fail", 0, 7, "failed"},
		{"crash", 0, 128 + 9, ""},
		{"reap", 0, 0, ""},
		{"wait", unix.SIGKILL, -1, ""},
		{"wait", unix.SIGINT, 128 + 2, ""},
		{"wait", unix.SIGTERM, 128 + 15, ""},
		{"wait", unix.SIGQUIT, 2, "internal/testns.wait("}, // in a stack
	} {
		t.Run(strings.TrimSpace(fmt.Sprintln(tc.role, tc.signal)), func(t *testing.T) {
			t.Parallel()
			status, output := testRun(t, tc.role, tc.signal)
			if status != tc.status || !strings.Contains(output, tc.output) {
				t.Errorf("status %d, expected %d; output %q, expected %q in it", status, tc.status, output, tc.output)
			}
		})
	}
}

// testRun starts this program as a test run, sends a signal when its server runs, and returns the exit
// status and the output, which ends when no process holds it.
func testRun(t *testing.T, role string, signal unix.Signal) (status int, output string) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	cmd.Stdout, cmd.Stderr = w, w
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	// The output of a server that stays would never end.
	if err := r.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	out := bufio.NewReader(r)
	line, err := out.ReadString('\n')
	if err != nil || line != "served\n" {
		t.Errorf("output %q, %v, expected that a server runs", line, err)
		signal = unix.SIGKILL
	}
	if signal != 0 {
		if err := cmd.Process.Signal(signal); err != nil {
			t.Error(err)
		}
	}
	rest, err := io.ReadAll(out)
	if err != nil {
		t.Errorf("the server is still there: %v", err)
	}
	_ = cmd.Wait() // the status tells more
	return cmd.ProcessState.ExitCode(), string(rest)
}
