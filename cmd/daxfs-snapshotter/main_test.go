package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/internal/testns"
)

// runEnv makes the test program run as the daemon.
const runEnv = "DAXFS_TEST_RUN"

func TestMain(m *testing.M) {
	if os.Getenv(runEnv) != "" {
		main()
	}
	os.Exit(testns.Main(m))
}

func call(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), append([]string{"daxfs-snapshotter"}, args...), &out, &errs)
	return code, out.String(), errs.String()
}

func TestVersion(t *testing.T) {
	code, out, errs := call(t, "--version")
	if code != 0 || !strings.HasPrefix(out, "daxfs-snapshotter ") || errs != "" {
		t.Errorf("%d %q %q", code, out, errs)
	}
}

func TestConfigDefault(t *testing.T) {
	if code, out, errs := call(t, "config", "default"); code != 0 || out != string(config.Sample) || errs != "" {
		t.Errorf("%d %q %q", code, out, errs)
	}
}

func TestWrongCalls(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.toml")
	if err := os.WriteFile(bad, []byte("[pool]\nsice = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--nonsense"}, 2, "nonsense"},
		{[]string{"nonsense"}, 2, `"nonsense"`},
		{[]string{"config"}, 2, "config default"},
		{[]string{"--config", bad}, 1, `line 2: unknown key "pool.sice"`},
		{[]string{"--config", bad, "config", "check"}, 1, `unknown key "pool.sice"`},
		{[]string{"--config", filepath.Join(dir, "none.toml")}, 1, "none.toml"},
		{[]string{"--driver", "tape"}, 1, `key "mount.driver": "tape"`},
		{[]string{"--root", "relative"}, 1, `key "root"`},
		{[]string{"--log-level", "loud", "config", "check"}, 1, `key "log.level"`},
	} {
		code, out, errs := call(t, tc.args...)
		if code != tc.code || !strings.Contains(errs, tc.want) ||
			!strings.HasPrefix(errs, "daxfs-snapshotter: ") || out != "" {
			t.Errorf("%q: code %d, expected %d; stdout %q; stderr %q, expected %q in it", tc.args, code, tc.code,
				out, errs, tc.want)
		}
	}
}

func TestFlagsWin(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.toml")
	if err := os.WriteFile(file, []byte("root = \"relative\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Report an error in the file even if a flag hides it, because the flag may be missing at the next start.
	if code, _, errs := call(t, "--config", file, "--root", "/x", "config", "check"); code != 1 ||
		!strings.Contains(errs, `"relative"`) {
		t.Errorf("%d %q", code, errs)
	}
	if code, out, errs := call(t, "--root", "/x", "--driver", "fuse", "config", "check"); code != 0 || out != "ok\n" {
		t.Errorf("%d %q %q", code, out, errs)
	}
}

// The daemon tells systemd when its socket exists and when it ends, and leaves the socket's directory usable.
func TestServe(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the daemon needs root")
	}
	dir := t.TempDir()
	notify := filepath.Join(dir, "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", notify)
	file := filepath.Join(dir, "c.toml")
	if err := os.WriteFile(file, []byte("[pool]\nsize = \"64MiB\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "run/s.sock")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var out, errs bytes.Buffer
	ended := make(chan int, 1)
	go func() {
		ended <- run(ctx, []string{
			"daxfs-snapshotter", "--config", file, "--root", filepath.Join(dir, "root"),
			"--address", socket,
		}, &out, &errs)
	}()
	expect := func(want string) {
		t.Helper()
		b := make([]byte, 100)
		if err := l.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		n, err := l.Read(b)
		if err != nil || string(b[:n]) != want {
			t.Fatalf("systemd was told %q, %v; expected %q", b[:n], err, want)
		}
	}
	expect("READY=1")
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	stop()
	expect("STOPPING=1")
	if code := <-ended; code != 0 {
		t.Errorf("code %d, stderr %q", code, &errs)
	}
}

// With systemd's sockets, a call that arrives while the daemon is away is answered when it is back.
func TestSocketActivation(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the daemon needs root")
	}
	dir := t.TempDir()
	file, socket := filepath.Join(dir, "c.toml"), filepath.Join(dir, "daxfs.sock")
	text := fmt.Sprintf("root = %q\naddress = %q\n[pool]\nsize = \"64MiB\"\n", filepath.Join(dir, "root"), socket)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var sockets []*os.File
	for _, name := range []string{"daxfs.sock", "control.sock"} { // as systemd does
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		f, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		sockets = append(sockets, f)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	start := func() *exec.Cmd {
		t.Helper()
		cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, self, "--config", file)
		cmd.Env = append(os.Environ(), runEnv+"=1", "LISTEN_FDS=2")
		cmd.ExtraFiles, cmd.Stderr = sockets, t.Output()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return net.Dial("unix", filepath.Join(dir, "control.sock"))
		},
	}}
	ask := func() error {
		resp, err := client.Get("http://d/v1/pool")
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("status %s", resp.Status)
		}
		return nil
	}
	for range 2 {
		answered := make(chan error, 1)
		go func() { answered <- ask() }() // no daemon runs yet
		cmd := start()
		if err := <-answered; err != nil {
			t.Error(err)
		}
		if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
		if st, err := os.Stat(socket); err != nil || st.Mode().Type() != os.ModeSocket {
			t.Errorf("the socket after the daemon has gone: %v, %v", st, err)
		}
	}
}
