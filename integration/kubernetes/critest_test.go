//go:build kubernetes

package kubernetes

import (
	"encoding/xml"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

func TestMain(m *testing.M) {
	os.Exit(stack.Main(m, stack.BuildCritest, stack.BuildKubernetes, stack.BuildGVisor, stack.BuildRunc))
}

// criConfig configures containerd's CRI plugin with a snapshotter. Where root has no CAP_SYS_RESOURCE,
// processes of containers cannot have a lower OOM score adjustment than ours.
const criConfig = `
[plugins."io.containerd.cri.v1.images"]
  snapshotter = %q
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "registry.k8s.io/` + pause + `"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "{{dir}}/certs.d"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{{bin}}"]
    conf_dir = "{{dir}}/cni.d"
`

const network = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}
]}`

// unrunnable are specs that cannot run here with any snapshotter: one needs an image whose digest only
// its registry has, and one expects the message of a shell with an external ls, which is built into Debian's busybox.
const unrunnable = "public image with digest should be pulled and removed|runtime should support MaskedPaths"

// critest runs the same specs with daxfs and overlayfs, with the same results.
func TestCritest(t *testing.T) {
	compare(t, 90, func(t *testing.T, snapshotter string) map[string]string {
		return critest(t, startCRI(t, snapshotter), snapshotter, "--ginkgo.skip", unrunnable)
	})
}

// Pods in user namespaces have the same results with daxfs as with overlayfs.
func TestCritestUserNamespaces(t *testing.T) {
	compare(t, 6, func(t *testing.T, snapshotter string) map[string]string {
		s := startCRI(t, snapshotter, newRunc(t))
		return critest(t, s, snapshotter, "--ginkgo.focus", "UserNamespaces")
	})
}

// newRunc puts a runc with support for user namespaces on containerd's path.
func newRunc(t *testing.T) func(*stack.Options) {
	return func(o *stack.Options) { o.Path = stack.RuncDir(cacheDir(t)) }
}

// compare runs specs with both snapshotters. At least atLeast must pass.
func compare(t *testing.T, atLeast int, run func(t *testing.T, snapshotter string) map[string]string) {
	t.Helper()
	results := map[string]map[string]string{}
	for _, snapshotter := range []string{"overlayfs", "daxfs"} {
		start := time.Now()
		t.Run(snapshotter, func(t *testing.T) { results[snapshotter] = run(t, snapshotter) })
		count := map[string]int{}
		for _, status := range results[snapshotter] {
			count[status]++
		}
		t.Logf("%s: %v in %v", snapshotter, count, time.Since(start).Round(time.Second))
	}
	passed := 0
	for _, spec := range slices.Sorted(maps.Keys(results["overlayfs"])) {
		want, got := results["overlayfs"][spec], results["daxfs"][spec]
		t.Logf("%-8s %-8s %s", want, got, spec)
		if got != want || got != "passed" && got != "skipped" {
			t.Errorf("%q: %s with daxfs, %s with overlayfs", spec, got, want)
		}
		if got == "passed" {
			passed++
		}
	}
	if len(results["daxfs"]) != len(results["overlayfs"]) || passed < atLeast {
		t.Errorf("%d specs with overlayfs, %d with daxfs, of which %d passed",
			len(results["overlayfs"]), len(results["daxfs"]), passed)
	}
}

// startCRI starts a stack whose containerd serves Kubernetes with a snapshotter.
func startCRI(t *testing.T, snapshotter string, with ...func(*stack.Options)) *stack.T {
	t.Helper()
	r, err := stack.NewRegistry()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Off() })
	pushImages(t, r)
	o := stack.Options{
		Mode: stack.Streaming, Registry: r, Kubernetes: true, Containerd: fmt.Sprintf(criConfig, snapshotter),
	}
	for _, f := range with {
		f(&o)
	}
	s := stack.New(t, o)
	mirrors(t, filepath.Join(s.Dir, "certs.d"), r)
	dir := filepath.Join(s.Dir, "cni.d")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "10-pods.conflist"), []byte(network), 0o644); err != nil {
		t.Fatal(err)
	}
	return s
}

// critest runs specs and returns the status of each.
func critest(t *testing.T, s *stack.T, snapshotter string, which ...string) map[string]string {
	t.Helper()
	socket := "unix://" + s.Stack.Run + "/containerd.sock"
	report := filepath.Join(s.Dir, "report.xml")
	_, failed := s.Try("critest", append([]string{
		"--runtime-endpoint", socket, "--image-endpoint", socket, "--ginkgo.junit-report", report,
		"--ginkgo.no-color", "--ginkgo.randomize-all=false", "--ginkgo.seed=1",
	}, which...)...)
	if failed != nil {
		t.Errorf("critest: %v", failed)
	}
	// Images stay, and show where they were unpacked.
	snapshots, err := s.Try("ctr", "--namespace", "k8s.io", "snapshot", "--snapshotter", snapshotter, "ls")
	if err != nil || strings.Count(snapshots, "Committed") == 0 {
		t.Errorf("snapshots of %s: %v\n%s", snapshotter, err, snapshots)
	}
	text, err := os.ReadFile(report)
	if err != nil {
		t.Fatalf("no report: %v; critest says: %v", err, failed)
	}
	var suites struct {
		Suites []struct {
			Cases []struct {
				Name   string `xml:"name,attr"`
				Status string `xml:"status,attr"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal(text, &suites); err != nil {
		t.Fatal(err)
	}
	statuses := map[string]string{}
	for _, suite := range suites.Suites {
		for _, c := range suite.Cases {
			if spec, ok := strings.CutPrefix(c.Name, "[It] [k8s.io] "); ok {
				statuses[spec] = c.Status
			}
		}
	}
	return statuses
}
