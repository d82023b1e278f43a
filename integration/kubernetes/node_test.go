//go:build kubernetes

package kubernetes

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

const (
	nodeAddress = "192.0.2.1" // a kubelet refuses 127.0.0.1
	kubeconfig  = `apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "` + serverURL + `", insecure-skip-tls-verify: true}}]
users: [{name: test, user: {token: ` + token + `}}]
contexts: [{name: test, context: {cluster: test, user: test}}]
current-context: test
`
	account = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: default, namespace: default}\n"
)

// node is a cluster of one node, whose containerd, daemon and kubelet have a disk of their own.
type node struct {
	*stack.T
	*kubelet
	api *client
	t   *testing.T
}

func startNode(t *testing.T, snapshotter string, disk int64, with ...func(*stack.Options)) *node {
	t.Helper()
	addAddress(t)
	n := &node{t: t, T: startCRI(t, snapshotter, append(with, func(o *stack.Options) { o.Disk = disk })...)}
	n.api = startAPIServer(t)
	if _, status, answer := n.api.create([]byte(account), false); status != http.StatusCreated {
		t.Fatalf("service account: status %d: %s", status, answer)
	}
	config := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(config, []byte(kubeconfig), 0o600); err != nil {
		t.Fatal(err)
	}
	n.kubelet = startKubelet(t, n.T, "--kubeconfig", config, "--node-ip", nodeAddress)
	n.until("the node is ready", func() error { return n.condition(corev1.NodeReady, corev1.ConditionTrue) })
	return n
}

// addAddress gives the network namespace of the tests an address for the node.
func addAddress(t *testing.T) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo:node")
	if err == nil {
		err = ifr.SetInet4Addr(net.ParseIP(nodeAddress).To4())
	}
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.SIOCSIFADDR, ifr)
	}
	if err != nil {
		t.Fatalf("give this network namespace the address %s: %v", nodeAddress, err)
	}
}

// object reads an object from the API server.
func (c *client) object(path string, into any) error {
	status, answer, err := c.do(http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return fmt.Errorf("%s: status %d: %s", path, status, answer)
	}
	return json.Unmarshal([]byte(answer), into)
}

// condition fails unless the node has a condition.
func (n *node) condition(kind corev1.NodeConditionType, want corev1.ConditionStatus) error {
	var node corev1.Node
	if err := n.api.object("/api/v1/nodes/node", &node); err != nil {
		return err
	}
	for _, c := range node.Status.Conditions {
		if c.Type == kind && c.Status == want {
			return nil
		}
	}
	return fmt.Errorf("condition %s is not %s: %+v", kind, want, node.Status.Conditions)
}

// pod returns a pod of this node that runs a script in the image with a shell.
func (n *node) pod(name, script string) *corev1.Pod {
	no, second := false, int64(1)
	return &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"},
		Spec: corev1.PodSpec{
			NodeName: "node", RestartPolicy: corev1.RestartPolicyNever, AutomountServiceAccountToken: &no,
			TerminationGracePeriodSeconds: &second,
			Containers: []corev1.Container{{
				Name: "main", Image: "registry.k8s.io/" + shellImage, Command: []string{"sh", "-c", script},
				ImagePullPolicy: corev1.PullIfNotPresent,
			}},
		},
	}
}

// create creates a pod. It retries, because a reference to a new object may be refused a few times.
func (n *node) create(p *corev1.Pod) {
	n.t.Helper()
	text, err := json.Marshal(p)
	if err != nil {
		n.t.Fatal(err)
	}
	n.until("pod "+p.Name+" is taken", func() error {
		if _, status, answer := n.api.create(text, false); status != http.StatusCreated {
			return fmt.Errorf("status %d: %s", status, answer)
		}
		return nil
	})
}

// reach waits until a pod is in a phase.
func (n *node) reach(name string, phase corev1.PodPhase) (p corev1.Pod) {
	n.t.Helper()
	n.until(fmt.Sprintf("pod %s is %s", name, phase), func() error {
		if err := n.api.object("/api/v1/namespaces/default/pods/"+name, &p); err != nil {
			return err
		}
		if p.Status.Phase != phase {
			return fmt.Errorf("its status is %+v", p.Status)
		}
		return nil
	})
	return p
}

// run runs a pod until it ends successfully.
func (n *node) run(p *corev1.Pod) {
	n.t.Helper()
	n.create(p)
	n.reach(p.Name, corev1.PodSucceeded)
}

// remove removes pods and waits until their containers are gone.
func (n *node) remove(names ...string) {
	n.t.Helper()
	for _, name := range names {
		path := "/api/v1/namespaces/default/pods/" + name
		if status, answer, err := n.api.do(http.MethodDelete, path, nil); err != nil || status != http.StatusOK {
			n.t.Fatalf("remove pod %s: status %d, %v: %s", name, status, err, answer)
		}
		n.until("pod "+name+" is gone", func() error {
			status, answer, err := n.api.do(http.MethodGet, path, nil)
			if err == nil && status != http.StatusNotFound {
				err = fmt.Errorf("status %d: %s", status, answer)
			}
			return err
		})
	}
}
