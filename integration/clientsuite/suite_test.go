package clientsuite

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m, stack.BuildClientSuite)) }

// slow are tests with much output or long waits, on ordinary snapshots. Run them once.
var slow = []string{
	"TestContainerExecLargeOutputWithTTY", "TestContainerRestartPolicyAlways",
	"TestRegressionIssue6429",
}

// fellBack matches a counter of fallbacks that is not 0.
var fellBack = regexp.MustCompile(`(?m)^daxfs_fallbacks_total\{.*\} [^0]`)

// All of containerd's tests that can run here pass with daxfs, walking and streaming. Each is a subtest.
func TestClient(t *testing.T) {
	all := readList(t)
	for _, way := range []struct {
		mode stack.Mode
		list
	}{{stack.Streaming, all}, {stack.Walking, all.without(slow...)}} {
		t.Run(string(way.mode), func(t *testing.T) {
			out, err := runSuite(t, way.mode, way.list)
			results := parseTest2JSON(out)
			for _, name := range way.run {
				t.Run(name, func(t *testing.T) {
					if err := results.check(name); err != nil {
						t.Error(err)
					}
				})
			}
			if err != nil && !t.Failed() {
				t.Errorf("containerd's tests all passed, but: %v\n%s", err, results[""].output)
			}
		})
	}
}

// runSuite runs the tests that are not excluded and returns their output. The error is that of their process.
func runSuite(t *testing.T, mode stack.Mode, listed list) (output []byte, err error) {
	t.Helper()
	const metrics = "127.0.0.1:9760"
	options := stack.Options{Mode: mode, Config: fmt.Sprintf("[metrics]\naddress = %q\n", metrics)}
	if mode == stack.Streaming {
		// These clients unpack through containerd's diff service, which needs to know our differ.
		options.Containerd = "[plugins.\"io.containerd.service.v1.diff-service\"]\n" +
			"  default = [\"daxfs-diff\", \"walking\"]\n"
	}
	before := cgroups(t)
	s := stack.New(t, options)
	t.Cleanup(func() { removeCgroups(t, before) })
	u := serveUpstream(t, "ghcr.io", "registry.k8s.io")
	pushImages(t, u)

	s.Must(s.StopContainerd(syscall.SIGTERM))
	t.Cleanup(func() { s.Must(s.StartContainerd()) })
	// Their containerd keeps its state in /var/lib/containerd-test and removes it.
	lib := filepath.Join(s.Dir, "lib")
	s.Must(os.Mkdir(lib, 0o755))
	bind(t, lib, "/var/lib")

	listed.verify(t, s)
	cmd, err := s.ClientSuite("-test.v=test2json", "-test.timeout=10m", "-test.root", "-test.run=^Test",
		"-test.skip="+listed.pattern())
	s.Must(err)
	cmd.Env = append(cmd.Env, "TEST_SNAPSHOTTER=daxfs", "SSL_CERT_FILE="+u.certificate)
	output, err = cmd.CombinedOutput()
	checkUse(t, mode, "http://"+metrics+"/metrics")
	return output, err
}

// checkUse fails the test unless the daemon's counters show the expected use: containers on images
// built from layers, and layers read in the stack's mode.
func checkUse(t *testing.T, mode stack.Mode, url string) {
	t.Helper()
	answer, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	phases := map[stack.Mode]string{stack.Walking: "ingest", stack.Streaming: "stream"}
	for _, phase := range []string{phases[mode], "build", "prepare"} {
		count := regexp.MustCompile(fmt.Sprintf("(?m)^daxfs_phase_seconds_count{phase=%q} [1-9]", phase))
		if !count.Match(text) {
			t.Errorf("the daemon counts nothing in phase %q:\n%s", phase, text)
		}
	}
	if fellBack.Match(text) {
		t.Errorf("the daemon fell back to plain directories:\n%s", text)
	}
}

// verify compares the list with containerd's tests, and fails if they differ.
func (l list) verify(t *testing.T, s *stack.T) {
	t.Helper()
	cmd, err := s.ClientSuite("-test.short", "-test.list=^Test")
	s.Must(err)
	out, err := cmd.Output()
	s.Must(err)
	program, err := os.ReadFile(cmd.Path)
	s.Must(err)
	known := slices.Clone(l.run)
	for _, name := range l.excluded {
		test, sub, isSub := strings.Cut(name, "/")
		if !isSub {
			known = append(known, test)
		} else if !slices.Contains(l.run, test) || !bytes.Contains(program, []byte(strings.ReplaceAll(sub, "_", " "))) {
			t.Errorf("%s lists %q, which containerd does not have", listFile, name)
		}
	}
	have := strings.Fields(string(out))
	for _, name := range have {
		if !slices.Contains(known, name) {
			t.Errorf("containerd has a test %q, which %s does not list", name, listFile)
		}
	}
	for _, name := range known {
		if !slices.Contains(have, name) {
			t.Errorf("%s lists %q, which containerd does not have", listFile, name)
		}
	}
}

// bind mounts a file or directory at another place, in the namespaces of the tests.
func bind(t *testing.T, from, to string) {
	t.Helper()
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		t.Fatalf("mount %q at %q: %v", from, to, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(to, 0); err != nil {
			t.Errorf("unmount %q: %v", to, err)
		}
	})
}
