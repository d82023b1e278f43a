package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// doctorOn runs daxfs doctor for a stack, with a configuration of the daemon, and returns its status and output.
func doctorOn(t *testing.T, s *stack.Stack, daemonConfig string, args ...string) (status int, text string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "daxfs.toml")
	if err := os.WriteFile(file, []byte(daemonConfig), 0o644); err != nil {
		t.Fatal(err)
	}
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	args = append([]string{
		"doctor", "--containerd", s.Run + "/containerd.sock", "--containerd-config", s.ContainerdConfig(),
		"--config", file,
	}, args...)
	cmd := exec.Command(filepath.Join(cache, "own/daxfs"), append(args, s.Dir)...)
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(cache, "bin")+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if _, ran := err.(*exec.ExitError); err != nil && !ran {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// doctor names each fault between containerd and the daemon, with its remedy, and ends with status 3.
func TestDoctorCases(t *testing.T) {
	s := stack.New(t, stack.Options{Mode: stack.Streaming})
	config := fmt.Sprintf("root = %q\naddress = %q\n[containerd]\naddress = %q\n", s.DaemonRoot(),
		s.Stack.Run+"/daxfs.sock", s.Stack.Run+"/containerd.sock")
	check := func(name, daemonConfig, what, cure string) {
		t.Helper()
		status, text := doctorOn(t, s.Stack, daemonConfig)
		line := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(what) + `.* +no +.*` +
			regexp.QuoteMeta(cure)).FindString(text)
		lines := strings.Split(strings.TrimSpace(text), "\n")
		last := lines[len(lines)-1]
		if status != 3 || line == "" || !strings.HasPrefix(last, "verdict: ") || !strings.Contains(last, what) {
			t.Errorf("%s: status %d, expected 3 and a line %q with %q; the verdict is %q:\n%s", name, status, what,
				cure, last, text)
		}
	}
	sound := func(name string) {
		t.Helper()
		if status, text := doctorOn(t, s.Stack, config); status != 0 ||
			!strings.HasSuffix(text, "\nverdict: nothing is wrong\n") {
			t.Errorf("%s: status %d:\n%s", name, status, text)
		}
	}
	sound("at first")

	// Faults in the daemon's configuration.
	check("wrong containerd.address", strings.Replace(config, "containerd.sock", "none.sock", 1),
		"containerd.address", "correct it")
	check("wrong kind", config+"[pool]\nkind = \"what\"\n", "configuration", "pool.kind")
	check("wrong root", strings.Replace(config, "/root", "/other", 1), "root agrees", "make them the same")
	check("overlay options", config+"[mount]\noverlay_options = [\"volatil\"]\n", "mount.overlay_options", "volatil")

	// Faults in containerd's configuration.
	replace := func(old, now string, n int) func(string) string {
		return func(text string) string {
			if !strings.Contains(text, old) {
				t.Fatalf("containerd's configuration lacks %q:\n%s", old, text)
			}
			return strings.Replace(text, old, now, n)
		}
	}
	after := func(begin string, edit func(string) string) func(string) string {
		return func(text string) string {
			i := strings.Index(text, begin)
			if i < 0 {
				t.Fatalf("containerd's configuration lacks %q:\n%s", begin, text)
			}
			return text[:i] + edit(text[i:])
		}
	}
	add := func(more string) func(string) string { return func(text string) string { return text + more } }
	for _, tc := range []struct {
		name, what, cure string
		edit             func(string) string
	}{
		{
			"differ socket", "differ daxfs-diff socket", "make them the same",
			after("[proxy_plugins.daxfs-diff]", replace("daxfs.sock", "x.sock", 1)),
		},
		{
			"platform", "unpack_config platform", `make it "linux"`,
			after(`unpack_config`, replace(`"linux"`, `"windows"`, -1)),
		},
		{
			"our differ for overlayfs", "differ of overlayfs", `make it "walking"`,
			replace(`"walking"`, `"daxfs-diff"`, 1),
		},
		{
			"diff service", "differs of the diff service", "take it out",
			add("\n[plugins.\"io.containerd.service.v1.diff-service\"]\n  default = [\"walking\", \"daxfs-diff\"]\n"),
		},
		{
			"CRI", "CRI images", `is "daxfs" meant?`,
			add("\n[plugins.\"io.containerd.cri.v1.images\"]\n  snapshotter = \"daxf\"\n"),
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s.Must(s.RestartContainerd(tc.edit))
			check(tc.name, config, tc.what, tc.cure)
		})
	}

	// The missing parts are written to their place, after asking.
	conf := filepath.Join(s.Dir, "conf.d")
	bare := func(text string) string {
		head, _, _ := strings.Cut(text, "[proxy_plugins.daxfs]")
		return strings.Replace(head, "imports = []", fmt.Sprintf("imports = [%q]", conf+"/*.toml"), 1)
	}
	s.Must(s.RestartContainerd(func(text string) string {
		return strings.Replace(bare(text), conf,
			conf+"/none/of", 1)
	}))
	if status, text := doctorOn(t, s.Stack, config, "--fix", "--yes"); status != 3 ||
		!strings.Contains(text, "is written") {
		t.Errorf("doctor --fix into a directory that is not there: status %d:\n%s", status, text)
	}
	s.Must(os.RemoveAll(filepath.Join(conf, "none")))
	s.Must(s.RestartContainerd(func(text string) string { return strings.Replace(bare(text), conf, "/nowhere", 1) }))
	if status, text := doctorOn(t, s.Stack, config, "--fix", "--yes"); status != 1 ||
		!strings.Contains(text, "imports no directory") {
		t.Errorf("doctor --fix without a directory to write to: status %d:\n%s", status, text)
	}
	s.Must(s.RestartContainerd(bare))
	check("nothing of ours", config, "snapshotter daxfs registered", "no [proxy_plugins.daxfs]")
	fix := func(answer, want string) {
		t.Helper()
		status, text := doctorOn(t, s.Stack, config, "--fix", answer)
		if status != 3 || !strings.Contains(text, want) {
			t.Errorf("doctor --fix %s: status %d, expected 3 and %q:\n%s", answer, status, want, text)
		}
	}
	file := filepath.Join(conf, "daxfs.toml")
	fix("--yes=false", "nothing was written") // nobody can answer
	if _, err := os.Stat(file); err == nil {
		t.Error("a file was written without leave")
	}
	s.Must(os.MkdirAll(conf, 0o755))
	s.Must(os.WriteFile(file, []byte("# mine\n"), 0o644))
	fix("--yes", "is written")
	if kept, err := filepath.Glob(file + ".*.bak"); err != nil || len(kept) != 1 {
		t.Errorf("copies of the file that was there: %q, %v", kept, err)
	}
	s.Must(s.RestartContainerd(bare))
	sound("after doctor --fix")

	// Faults of the processes: their user and their mount namespace.
	s.Must(s.RestartContainerd(nil))
	sound("with the first configuration again")
	pool, err := os.OpenFile(s.PoolFile(), os.O_RDWR, 0)
	s.Must(err)
	mapped, err := unix.Mmap(int(pool.Fd()), 0, 4096, unix.PROT_WRITE, unix.MAP_SHARED)
	s.Must(err)
	check("a monitor that can write", config, "nobody else can write to the pool", "daxfs vm args")
	s.Must(errors.Join(unix.Munmap(mapped), pool.Close()))
	sound("after the monitor has ended")
	s.Must(s.StopDaemon(syscall.SIGTERM))
	check("no daemon", config, "daxfs-snapshotter runs", "start it")
	check("no driver", config+"[pool]\nkind = \"file\"\n[mount]\ndriver = \"erofs-dax\"\n",
		"driver for the daemon's pool", "erofs-dax")
	s.Must(s.StartDaemon())
	s.Must(s.StopContainerd(syscall.SIGTERM))
	check("no containerd", config, "containerd answers", "is it running")
	s.Must(s.StartContainerdApart())
	check("containerd elsewhere", config, "one mount namespace", "take away what separates them")
	s.Must(s.RestartContainerd(nil))
	sound("at the end")
}
