//go:build kubernetes

package kubernetes

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// kubeletConfig runs a kubelet without a cluster. containerd makes the cgroups of the pods, not the kubelet.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 127.0.0.1
readOnlyPort: 10255
healthzPort: 0
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
enableServer: true
staticPodPath: %[1]s/pods
podLogsDir: %[1]s/logs
containerRuntimeEndpoint: unix://%[2]s/containerd.sock
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
protectKernelDefaults: true
fileCheckFrequency: 1s
syncFrequency: 10s
volumeStatsAggPeriod: 10s
`

// roomy has thresholds that the disk never reaches.
const roomy = `evictionHard: {imagefs.available: "1%", nodefs.available: "1%", memory.available: "10Mi"}
imageGCHighThresholdPercent: 100
`

const pod = `apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: server
      image: registry.k8s.io/e2e-test-images/nginx:1.14-2
      imagePullPolicy: IfNotPresent
      readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1}
`

// Pods of a kubelet run on daxfs through kills of both daemons. The kubelet knows the space of images.
func TestKubelet(t *testing.T) {
	s := startCRI(t, "daxfs")
	k := startKubelet(t, s)
	k.addPod("first")
	before := k.await("first")

	var summary struct {
		Node struct {
			Runtime struct {
				ImageFs struct{ CapacityBytes, UsedBytes, AvailableBytes *uint64 }
			}
		}
		Pods []struct {
			Containers []struct {
				Name   string
				Rootfs struct{ UsedBytes, CapacityBytes *uint64 }
			}
		}
	}
	// containerd measures snapshots at intervals.
	k.until("the summary tells of the pod and of images", func() error {
		if err := k.get("/stats/summary", &summary); err != nil {
			return err
		}
		p, fs := summary.Pods, summary.Node.Runtime.ImageFs
		if len(p) != 1 || len(p[0].Containers) != 1 || p[0].Containers[0].Rootfs.UsedBytes == nil {
			return fmt.Errorf("pods: %+v", p)
		}
		if fs.CapacityBytes == nil || fs.AvailableBytes == nil || fs.UsedBytes == nil || *fs.UsedBytes == 0 {
			return fmt.Errorf("the file system of images: %+v", fs)
		}
		return nil
	})
	fs := summary.Node.Runtime.ImageFs
	var st unix.Statfs_t
	if err := unix.Statfs(s.DaemonRoot(), &st); err != nil {
		t.Fatal(err)
	}
	disk := st.Blocks * uint64(st.Bsize)
	if *fs.CapacityBytes != disk || *fs.UsedBytes > 1<<30 {
		t.Errorf("imageFs: capacity %d, used %d; the disk below the daemon has %d", *fs.CapacityBytes,
			*fs.UsedBytes, disk)
	}
	t.Logf("imageFs: capacity %d, available %d, used %d", *fs.CapacityBytes, *fs.AvailableBytes, *fs.UsedBytes)

	s.Must(s.StopContainerd(syscall.SIGKILL))
	s.Must(s.StopDaemon(syscall.SIGKILL))
	s.Must(s.StartDaemon())
	s.Must(s.StartContainerd())
	k.addPod("second") // when this one runs, the kubelet has connected to the new containerd
	k.await("second")
	after := k.await("first")
	if after.ContainerID != before.ContainerID || after.RestartCount != 0 {
		t.Errorf("container %s with %d restarts, expected %s with none",
			after.ContainerID, after.RestartCount, before.ContainerID)
	}
	for _, name := range []string{"first", "second"} {
		k.removePod(name)
	}
	k.until("the pods and their networks are gone", func() error {
		out, err := s.Try("ctr", "--namespace", "k8s.io", "task", "ls", "-q")
		if err != nil {
			return err
		}
		networks, err := filepath.Glob("/run/netns/cni-*")
		if err == nil && (out != "" || len(networks) > 0) {
			err = fmt.Errorf("tasks: %q, networks: %q", out, networks)
		}
		return err
	})
}

type kubelet struct {
	*program
	t    *testing.T
	dir  string
	base string // configuration
	args []string

	showKernelSettings func()
}

// startKubelet starts a kubelet that runs static pods.
func startKubelet(t *testing.T, s *stack.T, args ...string) *kubelet {
	t.Helper()
	k := &kubelet{t: t, dir: filepath.Join(s.Dir, "kubelet")}
	k.base = fmt.Sprintf(kubeletConfig, k.dir, s.Stack.Run)
	for _, d := range []string{"pods", "logs", "root"} {
		if err := os.MkdirAll(filepath.Join(k.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	k.showKernelSettings = keepKernelSettings(t, k.dir)
	config := filepath.Join(k.dir, "config.yaml")
	k.args = append([]string{
		"--config", config, "--root-dir", filepath.Join(k.dir, "root"),
		"--cert-dir", filepath.Join(k.dir, "certs"), "--hostname-override", "node",
	}, args...)
	k.restart(roomy)
	return k
}

// restart starts the kubelet, after stopping a running one, and adds more to its configuration.
func (k *kubelet) restart(more string) {
	k.t.Helper()
	if k.program != nil {
		k.stop()
	}
	if err := os.WriteFile(filepath.Join(k.dir, "config.yaml"), []byte(k.base+more), 0o644); err != nil {
		k.t.Fatal(err)
	}
	k.program = start(k.t, k.dir, "kubelet", k.args...)
}

// keepKernelSettings shows the kubelet the settings that it wants, because it would change those of
// the whole machine. The mounts exist only in the namespace of the tests, and until show, which the
// end of the test calls as well. The kubelet checks the settings when it starts.
func keepKernelSettings(t *testing.T, dir string) (show func()) {
	t.Helper()
	var hidden []string
	show = func() {
		for _, setting := range hidden {
			if err := unix.Unmount(setting, 0); err != nil {
				t.Error(err)
			}
		}
		hidden = nil
	}
	t.Cleanup(show)
	for name, want := range map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	} {
		file, setting := filepath.Join(dir, filepath.Base(name)), filepath.Join("/proc/sys", name)
		if err := os.WriteFile(file, []byte(want+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(file, setting, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		hidden = append(hidden, setting)
	}
	return show
}

func (k *kubelet) addPod(name string) {
	k.t.Helper()
	file := filepath.Join(k.dir, "pods", name+".yaml")
	if err := os.WriteFile(file, []byte(fmt.Sprintf(pod, name)), 0o644); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kubelet) removePod(name string) {
	k.t.Helper()
	if err := os.Remove(filepath.Join(k.dir, "pods", name+".yaml")); err != nil {
		k.t.Fatal(err)
	}
}

// await waits until the container of a pod is ready.
func (k *kubelet) await(name string) (status corev1.ContainerStatus) {
	k.t.Helper()
	k.until("pod "+name+" is ready", func() error {
		var list corev1.PodList
		if err := k.get("/pods", &list); err != nil {
			return err
		}
		for _, p := range list.Items {
			if p.Name != name && p.Name != name+"-node" { // the name of a static pod
				continue
			}
			if s := p.Status.ContainerStatuses; len(s) == 1 && s[0].Ready {
				status = s[0]
				return nil
			}
			return fmt.Errorf("its status is %+v", p.Status)
		}
		return fmt.Errorf("%d pods, and not this one", len(list.Items))
	})
	return status
}

func (k *kubelet) get(path string, answer any) error {
	resp, err := http.Get("http://127.0.0.1:10255" + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", path, resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(answer)
}

// until waits for a condition that takes a kubelet some of its rounds.
func (k *kubelet) until(what string, ready func() error) {
	k.t.Helper()
	var err error
	for range 900 {
		if err = ready(); err == nil {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
	k.t.Fatalf("not after three minutes: %s: %v", what, err)
}
