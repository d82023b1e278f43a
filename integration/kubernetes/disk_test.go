//go:build kubernetes

package kubernetes

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

const (
	shellImage = "e2e-test-images/busybox:1.29-2"
	disk       = 1 << 30
	bulky      = 48 << 20 // bytes that only one image has
)

var weights = testimage.Noise(7, 3<<20)

// pushBulky uploads images whose removal is measurable, and one for volumes.
func (n *node) pushBulky() {
	n.t.Helper()
	base, err := testimage.Busybox()
	if err != nil {
		n.t.Fatal(err)
	}
	images := map[string][][]testimage.Entry{"models": {{
		testimage.Dir("llama", 0o755), testimage.File("llama/weights", 0o644, weights),
		testimage.Dir("other", 0o755), testimage.File("other/name", 0o644, []byte("other")),
		testimage.Symlink("inner", "llama"), testimage.Symlink("outer", "/etc"), testimage.Symlink("above", "../../.."),
	}}}
	for i := range 3 {
		noise := testimage.File("bulk", 0o644, testimage.Noise(uint64(100+i), bulky))
		images[fmt.Sprint("bulky-", i)] = [][]testimage.Entry{base, {noise}}
	}
	for name, layers := range images {
		img, err := testimage.Image(layers...)
		if err == nil {
			_, err = n.Registry.PushTag(name, "1", img)
		}
		if err != nil {
			n.t.Fatal(err)
		}
	}
}

// A node with a small disk behaves with daxfs as with overlayfs: image volumes, statistics, the
// removal of images when the disk gets full, and of a pod that fills it.
func TestNode(t *testing.T) {
	outcomes := map[string]map[string]string{}
	for _, snapshotter := range []string{"overlayfs", "daxfs"} {
		t.Run(snapshotter, func(t *testing.T) {
			n := startNode(t, snapshotter, disk)
			n.pushBulky()
			outcomes[snapshotter] = n.volumes()
			n.statistics(snapshotter)
			n.collect()
			n.pressure()
		})
	}
	for name, want := range outcomes["overlayfs"] {
		if got := outcomes["daxfs"][name]; got != want {
			t.Errorf("image volume %s: %q with daxfs, %q with overlayfs", name, got, want)
		}
	}
}

// volumes mounts directories of an image into pods, and returns the outcome of each.
func (n *node) volumes() map[string]string {
	n.t.Helper()
	outcomes := map[string]string{}
	for name, v := range map[string]struct{ subPath, script string }{
		"whole":  {"", "sum /v/llama/weights && grep other /v/other/name && ! touch /v/x && readlink /v/outer"},
		"part":   {"llama", "sum /v/weights && test $(ls /v) = weights && ! touch /v/x"},
		"link":   {"inner", "sum /v/weights"},
		"file":   {"llama/weights", "true"},
		"none":   {"nothing", "true"},
		"escape": {"outer", "true"},
		"above":  {"above", "true"},
	} {
		sum := fmt.Sprintf("sum() { test $(sha256sum < $1 | cut -c 1-64) = %x; }; ", sha256.Sum256(weights))
		p := n.pod("volume-"+name, sum+v.script)
		n.withModels(p, v.subPath)
		n.create(p)
		n.until("the volume is used or refused", func() error {
			var p corev1.Pod
			if err := n.api.object("/api/v1/namespaces/default/pods/volume-"+name, &p); err != nil {
				return err
			}
			s := p.Status.ContainerStatuses
			switch {
			case len(s) == 1 && s[0].State.Terminated != nil:
				outcomes[name] = fmt.Sprint("exit ", s[0].State.Terminated.ExitCode)
			case len(s) == 1 && s[0].State.Waiting != nil && strings.Contains(s[0].State.Waiting.Reason, "Error"),
				len(s) == 1 && s[0].State.Waiting != nil && strings.Contains(s[0].State.Waiting.Reason, "Failed"):
				outcomes[name] = s[0].State.Waiting.Reason
			default:
				return fmt.Errorf("its status is %+v", p.Status)
			}
			return nil
		})
		n.remove(p.Name)
	}
	for name, outcome := range outcomes {
		n.t.Logf("image volume %s: %s", name, outcome)
		works := name == "whole" || name == "part" || name == "link"
		if works != (outcome == "exit 0") {
			n.t.Errorf("image volume %s: %s", name, outcome)
		}
	}
	return outcomes
}

// withModels mounts a directory of pushBulky's image into a pod at /v.
func (n *node) withModels(p *corev1.Pod, subPath string) {
	p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{
		Image: &corev1.ImageVolumeSource{Reference: "registry.k8s.io/models:1", PullPolicy: corev1.PullIfNotPresent},
	}}}
	p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "v", MountPath: "/v", SubPath: subPath}}
}

type fsStats struct{ CapacityBytes, AvailableBytes, UsedBytes uint64 }

type summary struct {
	Node struct{ Runtime struct{ ImageFs fsStats } }
	Pods []struct {
		PodRef     struct{ Name string }
		Containers []struct{ Rootfs fsStats }
	}
}

// rootfs returns the space of the root of a pod's only container.
func (s *summary) rootfs(name string) fsStats {
	for _, p := range s.Pods {
		if p.PodRef.Name == name && len(p.Containers) == 1 {
			return p.Containers[0].Rootfs
		}
	}
	return fsStats{}
}

// statistics compares the kubelet's statistics with the disk.
func (n *node) statistics(snapshotter string) {
	n.t.Helper()
	const written = 24 << 20
	const own = 12 << 20 // for the snapshotter's indexes
	n.create(n.pod("writer", "dd if=/dev/zero of=/written bs=1M count=24 && sleep 1000000"))
	n.reach("writer", corev1.PodRunning)
	root := filepath.Join(n.Dir, "containerd/root/io.containerd.snapshotter.v1.overlayfs")
	if snapshotter == "daxfs" {
		root = n.DaemonRoot()
	}
	size, _, err := n.Disk()
	if err != nil {
		n.t.Fatal(err)
	}
	// The kubelet and containerd measure at intervals, independently.
	n.until("the statistics agree with the disk", func() error {
		var s summary
		if err := n.get("/stats/summary", &s); err != nil {
			return err
		}
		_, free, err := n.Disk()
		takes := allocated(n.t, root)
		images, rootfs := s.Node.Runtime.ImageFs, s.rootfs("writer")
		if images.CapacityBytes != size || rootfs.CapacityBytes != size ||
			!near(images.AvailableBytes, free, 1<<20) || !near(rootfs.UsedBytes, written, 1<<20) ||
			images.UsedBytes > takes || takes-images.UsedBytes > own {
			err = errors.Join(err, fmt.Errorf("imageFs %+v, root %+v; the disk has %d, %d free, %s takes %d",
				images, rootfs, size, free, snapshotter, takes))
			return err
		}
		n.t.Logf("imageFs %+v, root %+v; the disk has %d, %d free, %s takes %d", images, rootfs, size, free,
			snapshotter, takes)
		return err
	})
	n.remove("writer")
}

func near(a, b, by uint64) bool { return max(a, b)-min(a, b) <= by }

// allocated returns the disk space of the files below a directory, in bytes.
func allocated(t *testing.T, root string) (sum uint64) {
	t.Helper()
	seen := map[uint64]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil // removed meanwhile
		}
		if err != nil {
			return err
		}
		var top, st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return nil
		}
		if err := syscall.Lstat(root, &top); err != nil {
			return err
		}
		if st.Dev != top.Dev { // a mount
			return filepath.SkipDir
		}
		if !seen[st.Ino] {
			seen[st.Ino] = true
			sum += uint64(st.Blocks) * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// collect makes the kubelet remove unused images, because the disk is above its threshold.
func (n *node) collect() {
	n.t.Helper()
	n.create(n.pod("stays", "sleep 1000000"))
	n.reach("stays", corev1.PodRunning)
	for i := range 3 {
		p := n.pod(fmt.Sprint("bulky-", i), "true")
		p.Spec.Containers[0].Image = fmt.Sprintf("registry.k8s.io/bulky-%d:1", i)
		n.run(p)
		n.remove(p.Name)
	}
	// Images of ended containers are in use until the kubelet removes the containers, once a minute.
	n.until("only the containers of one pod are left", func() error {
		ids, err := n.Try("ctr", "--namespace", "k8s.io", "container", "ls", "-q")
		if err == nil && len(strings.Fields(ids)) != 2 {
			err = fmt.Errorf("containers: %q", ids)
		}
		return err
	})
	size, before, err := n.Disk()
	if err != nil {
		n.t.Fatal(err)
	}
	used := int((size - before) * 100 / size)
	n.t.Logf("%d %% of the disk are used, %d bytes are free", used, before)
	removed := func() error {
		images, err := n.Try("ctr", "--namespace", "k8s.io", "image", "ls", "-q")
		if err == nil && strings.Contains(images, "bulky") {
			err = fmt.Errorf("there are\n%s", images)
		}
		return err
	}
	// The kubelet collects at its start, perhaps before it knows the disk, and then after five minutes. So
	// restart it until it has collected. An age below zero allows the removal of images that it has just seen.
	for i := 0; i < 100 && removed() != nil; i++ {
		if i%20 == 0 {
			n.restart(fmt.Sprintf("imageGCHighThresholdPercent: %d\nimageGCLowThresholdPercent: 1\n"+
				"imageMinimumGCAge: -1s\n"+
				"evictionHard: {imagefs.available: \"1%%\", nodefs.available: \"1%%\", memory.available: \"10Mi\"}\n",
				used-2))
		}
		time.Sleep(time.Second)
	}
	if err := removed(); err != nil {
		n.t.Fatalf("the kubelet removes no images: %v", err)
	}
	const want = 3 * bulky * 9 / 10
	n.until("the space of images is free", func() error {
		_, after, err := n.Disk()
		if err == nil && after < before+want {
			err = fmt.Errorf("%d bytes were free, now %d; expected %d more", before, after, want)
		}
		return err
	})
	_, after, _ := n.Disk()
	n.t.Logf("image GC gave back %d bytes of %d", after-before, 3*bulky)
	n.reach("stays", corev1.PodRunning)
	n.remove("stays")
}

// pressure lets a pod fill the disk: the pod is evicted, its space is freed, the others stay, and the next one runs.
func (n *node) pressure() {
	n.t.Helper()
	n.restart("evictionHard: {imagefs.available: \"10%\", nodefs.available: \"10%\", memory.available: \"10Mi\"}\n" +
		"evictionPressureTransitionPeriod: 3s\nnodeStatusUpdateFrequency: 1s\nimageGCHighThresholdPercent: 100\n")
	n.create(n.pod("bystander", "sleep 1000000"))
	n.reach("bystander", corev1.PodRunning)
	_, before, err := n.Disk()
	if err != nil {
		n.t.Fatal(err)
	}
	n.create(n.pod("hog", "dd if=/dev/zero of=/fill bs=1M; sleep 1000000"))
	n.until("the disk is too full", func() error { return n.condition(corev1.NodeDiskPressure, corev1.ConditionTrue) })
	p := n.reach("hog", corev1.PodFailed)
	if p.Status.Reason != "Evicted" {
		n.t.Errorf("the pod that filled the disk ended with %q: %s", p.Status.Reason, p.Status.Message)
	}
	n.until("the disk is no longer too full", func() error {
		return n.condition(corev1.NodeDiskPressure, corev1.ConditionFalse)
	})
	n.until("the space of the pod is free", func() error {
		_, after, err := n.Disk()
		if err == nil && after+8<<20 < before {
			err = fmt.Errorf("%d bytes were free, now %d", before, after)
		}
		return err
	})
	n.run(n.pod("next", "true"))
	p = n.reach("bystander", corev1.PodRunning)
	if p.Status.ContainerStatuses[0].RestartCount != 0 {
		n.t.Error("the bystander restarted")
	}
	n.remove("hog", "next", "bystander")
}
