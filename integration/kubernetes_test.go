package integration

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	"sigs.k8s.io/yaml"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// The files for Kubernetes have only fields of its API types, and the same paths as the daemon's defaults.
func TestKubernetes(t *testing.T) {
	dir := "../docs/kubernetes/"
	daemonSet := &appsv1.DaemonSet{}
	for file, object := range map[string]any{
		"daemonset.yaml": daemonSet, "namespace.yaml": &corev1.Namespace{},
		"runtimeclass.yaml": &nodev1.RuntimeClass{}, "runtimeclass-gvisor.yaml": &nodev1.RuntimeClass{},
	} {
		text, err := os.ReadFile(dir + file)
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.UnmarshalStrict(text, object); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
	pod := daemonSet.Spec.Template.Spec
	c := pod.Containers[0]
	if c.SecurityContext == nil || c.SecurityContext.Privileged == nil || !*c.SecurityContext.Privileged {
		t.Error("the container is not privileged: it cannot mount")
	}
	def := config.Default()
	paths := map[string]string{}
	for _, v := range pod.Volumes {
		if v.HostPath != nil {
			paths[v.Name] = v.HostPath.Path
		}
	}
	propagated := false
	for _, m := range c.VolumeMounts {
		if host, ok := paths[m.Name]; ok && host != m.MountPath {
			t.Errorf("volume %q is %q on the node and %q in the container", m.Name, host, m.MountPath)
		}
		if m.MountPath == def.Root && m.MountPropagation != nil &&
			*m.MountPropagation == corev1.MountPropagationBidirectional {
			propagated = true
		}
	}
	if !propagated {
		t.Errorf("no volume at %q whose mounts appear on the node", def.Root)
	}
	for _, want := range []string{def.Root, filepath.Dir(def.Address), filepath.Dir(def.Containerd.Address), "/dev"} {
		found := false
		for _, p := range paths {
			found = found || p == want
		}
		if !found {
			t.Errorf("no volume for %q of the node", want)
		}
	}
	conf, err := config.Load(dir + "config.toml")
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Ports) != 1 || c.StartupProbe == nil || c.ReadinessProbe == nil {
		t.Fatalf("ports %v, startup probe %v, readiness probe %v", c.Ports, c.StartupProbe, c.ReadinessProbe)
	}
	for _, p := range []*corev1.Probe{c.StartupProbe, c.ReadinessProbe} {
		get := p.HTTPGet
		address := fmt.Sprintf("%s:%d", get.Host, c.Ports[0].ContainerPort)
		if address != conf.Metrics.Address || get.Port.StrVal != c.Ports[0].Name || get.Path != "/healthz" {
			t.Errorf("a probe asks %q for %q, the daemon listens at %q", address, get.Path, conf.Metrics.Address)
		}
	}
}

// kustomize finds the program on the path, or where the Makefile puts tools.
func kustomize(cache string) string {
	if path, err := exec.LookPath("kustomize"); err == nil {
		return path
	}
	path := filepath.Join(cache, "tools/kustomize")
	if _, err := os.Stat(path); err != nil {
		return ""
	}
	return path
}

// The kustomization builds, and the DaemonSet uses the generated configuration. With the line for k3s,
// the pod has the directory of k3s's containerd, which its configuration names.
func TestKustomize(t *testing.T) {
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	program := kustomize(cache)
	if program == "" {
		t.Skip("no kustomize: make test-integration installs it")
	}
	out, err := exec.Command(program, "build", "../docs/kubernetes").Output()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, part := range bytes.Split(out, []byte("\n---\n")) {
		var object struct {
			Kind     string
			Metadata struct{ Name, Namespace string }
		}
		if err := yaml.Unmarshal(part, &object); err != nil {
			t.Fatal(err)
		}
		if object.Kind == "ConfigMap" {
			names = append(names, object.Metadata.Name)
		}
		if object.Kind == "DaemonSet" && object.Metadata.Namespace != "daxfs-system" {
			t.Errorf("the DaemonSet is in namespace %q", object.Metadata.Namespace)
		}
	}
	if len(names) != 1 || strings.Count(string(out), names[0]) < 2 {
		t.Errorf("config maps %q; one is expected, with a user:\n%s", names, out)
	}

	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("../docs/kubernetes")); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "kustomization.yaml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text = bytes.Replace(text, []byte("# components: [k3s]"), []byte("components: [k3s]"), 1)
	if err := os.WriteFile(file, text, 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err = exec.Command(program, "build", dir).Output(); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(filepath.Join(dir, "k3s/config.toml"))
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Dir(c.Containerd.Address)
	for _, want := range []string{
		"address = \"" + c.Containerd.Address, "mountPath: " + socket + "\n", "path: " + socket + "\n",
	} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("no %q for k3s in\n%s", want, out)
		}
	}
	if def := filepath.Dir(config.Default().Containerd.Address); bytes.Contains(out, []byte("ath: "+def+"\n")) {
		t.Errorf("%q is still there for k3s:\n%s", def, out)
	}
}
