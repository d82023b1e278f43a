//go:build kubernetes

package kubernetes

import (
	"net/http"
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// On a node whose pods use overlayfs, pods of a class of docs/kubernetes stand on daxfs, in runc and in gVisor.
func TestRuntimeClasses(t *testing.T) {
	n := startNode(t, "overlayfs", 0, func(o *stack.Options) {
		for _, name := range []string{"cri-runtimeclass.toml", "cri-gvisor.toml"} {
			text, err := os.ReadFile("../../config/containerd/" + name)
			if err != nil {
				t.Fatal(err)
			}
			o.Containerd += "\n" + string(text)
		}
	})
	for _, name := range []string{"runtimeclass.yaml", "runtimeclass-gvisor.yaml"} {
		text, err := os.ReadFile("../../docs/kubernetes/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if _, status, answer := n.api.create(text, false); status != http.StatusCreated {
			t.Fatalf("%s: status %d: %s", name, status, answer)
		}
	}
	for _, c := range []struct{ class, snapshotter, script string }{
		{"", "overlayfs", "! dmesg | grep -q gVisor"},
		{"runc-daxfs", "daxfs", "! dmesg | grep -q gVisor"},
		{"gvisor", "daxfs", "dmesg | grep -q gVisor"},
	} {
		name := "class-" + c.class
		if c.class == "" {
			name = "no-class"
		}
		p := n.pod(name, c.script+" && echo changed > /etc/passwd && sleep 1000000")
		p.Spec.Containers[0].ReadinessProbe = &corev1.Probe{
			ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{
				"grep", "changed",
				"/etc/passwd",
			}}},
			PeriodSeconds: 1,
		}
		if c.class != "" {
			p.Spec.RuntimeClassName = &c.class
		}
		n.create(p)
		status := n.await(name)
		id := strings.TrimPrefix(status.ContainerID, "containerd://")
		if keys := n.Ctr("--namespace", "k8s.io", "snapshot", "--snapshotter", c.snapshotter,
			"ls"); !strings.Contains(keys, id) {
			t.Errorf("class %q: container %s has no snapshot of %s:\n%s", c.class, id, c.snapshotter, keys)
		}
		n.remove(name)
	}
}

// In a user namespace a pod's root and image volume belong to its own users, with daxfs as with overlayfs.
func TestUserNamespacePods(t *testing.T) {
	for _, snapshotter := range []string{"overlayfs", "daxfs"} {
		t.Run(snapshotter, func(t *testing.T) {
			n := startNode(t, snapshotter, 0, newRunc(t))
			n.showKernelSettings() // the kernel mounts /proc in a user namespace only if no part of it is hidden
			n.pushBulky()
			no := false
			p := n.pod("mapped", "set -e; test $(awk '{print $2}' /proc/self/uid_map) != 0; "+
				"test $(stat -c %u:%g /etc/passwd) = 0:0; test $(stat -c %u:%g /v/weights) = 0:0; "+
				"touch /new; test $(stat -c %u /new) = 0; ! touch /v/new")
			p.Spec.HostUsers = &no
			n.withModels(p, "llama")
			n.run(p)
			n.remove("mapped")
		})
	}
}
