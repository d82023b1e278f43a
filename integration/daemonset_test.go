package integration

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// The pod of the DaemonSet, with its mounts, propagation, namespaces and configuration, serves its
// node's containerd. It can be replaced below running containers, and a daemon on the node can take over from it.
func TestDaemonSet(t *testing.T) {
	s := stack.New(t, stack.Options{Mode: stack.Streaming})
	s.Must(s.StopDaemon(syscall.SIGTERM))
	// Like / of a node: mounts made in the pod must appear here.
	if err := unix.Mount(s.DaemonRoot(), s.DaemonRoot(), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", s.DaemonRoot(), "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	pod := podImage(t, s)
	flags, args := podFlags(t, s)
	start := func(id string) {
		t.Helper()
		// ctr cannot set the propagation of the root, which the volume's propagation needs.
		_, err := s.Try("nerdctl", append(append(append([]string{
			"--snapshotter", "overlayfs", "run", "--detach",
			"--name", id,
		}, flags...), pod), args...)...)
		s.Must(err)
		for range 200 { // after a failure containerd reconnects only seconds later
			// containerd asks nobody about an empty list of snapshots.
			var c net.Conn
			if c, err = net.Dial("unix", s.Stack.Run+"/daxfs.sock"); err == nil {
				c.Close()
				_, err = s.Try("ctr", "snapshot", "--snapshotter", "daxfs", "ls")
			}
			if err == nil {
				err = healthy()
			}
			if err == nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Fatalf("the daemon in pod %q does not answer: %v", id, err)
	}
	stop := func(id string) {
		t.Helper()
		s.Nerdctl("rm", "--force", id)
	}
	prints := func(id string) {
		t.Helper()
		if out, err := s.Exec(id, "cat", "/etc/hostname"); err != nil || out != "tiny\n" {
			t.Errorf("container %q: %q, %v", id, out, err)
		}
	}

	start("pod-1")
	ref := push(t, s, "tiny")
	s.Pull(ref, "daxfs")
	s.Ctr("run", "--detach", "--snapshotter", "daxfs", ref, "before", "sleep", "1000000")
	prints("before")
	mounts := s.ImageMounts()
	if len(mounts) != 1 || !strings.Contains(mounts[0], s.DaemonRoot()) {
		t.Errorf("on the node there are the mounts %q, expected the one of the image", mounts)
	}
	stop("pod-1")
	prints("before")
	start("pod-2")
	s.Ctr("run", "--detach", "--snapshotter", "daxfs", ref, "after", "sleep", "1000000")
	prints("after")
	stop("pod-2")
	s.Must(s.StartDaemon())
	prints("before")
	if out := s.Run(ref, "daxfs", "last", "cat", "/etc/hostname"); out != "tiny\n" {
		t.Errorf("with a daemon on the node the container printed %q", out)
	}
	if now := s.ImageMounts(); len(now) != 1 || len(mounts) != 1 || now[0] != mounts[0] {
		t.Errorf("mounts of the image: %q at first, %q in the end, expected the same one", mounts, now)
	}
}

// healthy sends the request of the DaemonSet's probes; TestKubernetes compares the address with theirs.
func healthy() error {
	resp, err := http.Get("http://127.0.0.1:9760/healthz")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("/healthz answers %s", resp.Status)
	}
	return nil
}

// podImage pushes the image of a release with the programs under test.
func podImage(t *testing.T, s *stack.T) string {
	t.Helper()
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	out, err := exec.Command("sh", "-e", "-c", `go run ../packaging/image -output "$0/image.tar" "$2=$1"
			tar --extract --file "$0/image.tar" --directory "$0"`,
		dir, filepath.Join(cache, "own"), runtime.GOARCH).CombinedOutput()
	if err != nil {
		t.Fatalf("make the image: %v\n%s", err, out)
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	images, err := platformImages(index)
	if err != nil || len(images) != 1 {
		t.Fatalf("%d images in the archive, expected 1: %v", len(images), err)
	}
	return s.Push("daxfs-snapshotter", images[0])
}

// platformImages returns the images of the only index in an index.
func platformImages(index v1.ImageIndex) ([]v1.Image, error) {
	inner, err := partial.FindIndexes(index, func(v1.Descriptor) bool { return true })
	if err != nil || len(inner) != 1 {
		return nil, fmt.Errorf("%d indexes, expected 1: %w", len(inner), err)
	}
	return partial.FindImages(inner[0], func(v1.Descriptor) bool { return true })
}

// podFlags translates the pod of the DaemonSet to flags of nerdctl, as containerd's CRI plugin would.
// Paths on the node become those of the stack.
func podFlags(t *testing.T, s *stack.T) (flags, args []string) {
	t.Helper()
	text, err := os.ReadFile("../docs/kubernetes/daemonset.yaml")
	if err != nil {
		t.Fatal(err)
	}
	set := &appsv1.DaemonSet{}
	if err := yaml.UnmarshalStrict(text, set); err != nil {
		t.Fatal(err)
	}
	spec := set.Spec.Template.Spec
	c := spec.Containers[0]
	if spec.HostPID {
		flags = append(flags, "--pid", "host")
	}
	if spec.HostNetwork {
		flags = append(flags, "--net", "host")
	}
	if p := c.SecurityContext.Privileged; p != nil && *p {
		flags = append(flags, "--privileged")
	}
	etc := t.TempDir()
	text, err = os.ReadFile("../docs/kubernetes/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(etc, "config.toml"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	def := config.Default()
	node := strings.NewReplacer(def.Root, s.DaemonRoot(), filepath.Dir(def.Address), s.Stack.Run,
		filepath.Dir(def.Containerd.Address), s.Stack.Run)
	host := map[string]string{}
	for _, v := range spec.Volumes {
		switch {
		case v.HostPath != nil:
			host[v.Name] = node.Replace(v.HostPath.Path)
		case v.ConfigMap != nil:
			host[v.Name] = etc
		}
	}
	for _, m := range c.VolumeMounts {
		options := "rprivate"
		if p := m.MountPropagation; p != nil && *p == corev1.MountPropagationBidirectional {
			options = "rshared"
		}
		if m.ReadOnly {
			options += ",ro"
		}
		flags = append(flags, "-v", fmt.Sprintf("%s:%s:%s", host[m.Name], node.Replace(m.MountPath), options))
	}
	flags = append(flags, "--entrypoint", c.Command[0])
	args = append(append(args, c.Command[1:]...), c.Args...)
	return flags,
		append(args, "--root", s.DaemonRoot(), "--address", s.Stack.Run+"/daxfs.sock", "--containerd-address",
			s.Stack.Run+"/containerd.sock")
}
