package integration

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// criConfig makes containerd serve Kubernetes with our snapshotter, and names the image of sandboxes.
const criConfig = `
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "daxfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = %q
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
`

// Kubernetes sees attached images of a shared pool in its namespace, and runs a pod from them without a registry.
func TestSharedCRI(t *testing.T) {
	r, err := stack.NewRegistry()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Off() })
	app, sandbox, other := apps(t)
	if sandbox, err = mutate.Config(sandbox, v1.Config{Entrypoint: []string{"/bin/sleep", "1000000"}}); err != nil {
		t.Fatal(err)
	}
	push := func(name string, img v1.Image) string {
		ref, err := r.Push(name, img)
		if err != nil {
			t.Fatal(err)
		}
		return ref
	}
	one, pause := push("one", app), push("pause", sandbox)
	second, err := r.PushTag("one", "second", app)
	if err != nil {
		t.Fatal(err)
	}
	s := newSharing(t, stack.Streaming, "", func(o *stack.Options) {
		o.Registry, o.Kubernetes = r, true
		o.Containerd += fmt.Sprintf(criConfig, pause)
	})
	s.publish(one)
	s.publish(pause)
	s.publish(second)
	s.Must(r.Off())
	s.daxfs("attach", "--namespace", "k8s.io", one, pause)

	conn, err := grpc.NewClient("unix://"+s.Stack.Run+"/containerd.sock",
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	s.Must(err)
	defer conn.Close()
	images, runtime := cri.NewImageServiceClient(conn), cri.NewRuntimeServiceClient(conn)
	spec := &cri.ImageSpec{Image: one}
	var image *cri.Image
	await(t, "Kubernetes has the image", func() bool {
		status, err := images.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: spec})
		s.Must(err)
		image = status.Image
		return image != nil
	})
	config, err := app.ConfigName()
	s.Must(err)
	if image.Id != config.String() || !slices.Contains(image.RepoTags, one) {
		t.Errorf("image %+v, expected %s, named %s", image, config, one)
	}
	manifest, err := app.Digest()
	s.Must(err)
	repo, _, _ := strings.Cut(one, ":latest")
	byDigest := repo + "@" + manifest.String()
	if !slices.Equal(image.RepoDigests, []string{byDigest}) {
		t.Errorf("image %+v, expected the digest %s", image, byDigest)
	}
	list, err := images.ListImages(t.Context(), &cri.ListImagesRequest{})
	s.Must(err)
	for _, ref := range []string{one, pause} {
		if !slices.ContainsFunc(list.Images, func(i *cri.Image) bool { return slices.Contains(i.RepoTags, ref) }) {
			t.Errorf("images %+v, expected %s among them", list.Images, ref)
		}
	}

	// Detaching removes both names of an image, attaching adds them. Another name keeps the digest.
	status := func(name string) *cri.Image {
		t.Helper()
		answer, err := images.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: name}})
		s.Must(err)
		return answer.Image
	}
	names := func() string {
		t.Helper()
		return s.Ctr("--namespace", "k8s.io", "image", "ls", "-q", fmt.Sprintf("name~=%q", "^"+repo+"[@:]"))
	}
	s.daxfs("attach", "--namespace", "k8s.io", second)
	s.daxfs("detach", "--namespace", "k8s.io", one)
	if got, want := names(), second+"\n"+byDigest+"\n"; got != want {
		t.Errorf("after the first of two names was detached there are %q, expected %q", got, want)
	}
	s.daxfs("detach", "--namespace", "k8s.io", second)
	if got := names(); got != "" {
		t.Errorf("after all was detached there are %q", got)
	}
	await(t, "the image is gone", func() bool { return status(byDigest) == nil })
	s.daxfs("attach", "--namespace", "k8s.io", one)
	await(t, "the image is back", func() bool { return status(byDigest) != nil })
	spec.Image = byDigest // a pod may give the digest

	// The network is the host's, so that no plugin has to make one.
	host := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}
	pod := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: "pod", Uid: "pod-1", Namespace: "default"},
		Linux:    &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: host}},
	}
	box, err := runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: pod})
	s.Must(err)
	made, err := runtime.CreateContainer(t.Context(), &cri.CreateContainerRequest{
		PodSandboxId: box.PodSandboxId, SandboxConfig: pod, Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "app"}, Image: spec, Command: []string{"/bin/sleep", "1000000"},
			Linux: &cri.LinuxContainerConfig{
				SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: host},
			},
		},
	})
	s.Must(err)
	_, err = runtime.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: made.ContainerId})
	s.Must(err)
	out, err := runtime.ExecSync(t.Context(),
		&cri.ExecSyncRequest{ContainerId: made.ContainerId, Cmd: []string{"cat", "/m/name"}})
	s.Must(err)
	if string(out.Stdout) != "one" || out.ExitCode != 0 {
		t.Errorf("the container printed %q %q and ended with %d", out.Stdout, out.Stderr, out.ExitCode)
	}
	_, err = runtime.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: box.PodSandboxId})
	s.Must(err)
	_, err = runtime.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: box.PodSandboxId})
	s.Must(err)

	// The owner has another image under that name: the earlier one keeps no name.
	s.Must(r.On())
	push("one", other)
	another, err := other.Digest()
	s.Must(err)
	s.Ctr("--namespace", ownerSpace, "image", "pull", "--plain-http", "--snapshotter", "owner", one)
	await(t, "the pool has another image of the name", func() bool {
		return slices.ContainsFunc(s.state().Images, func(i sharedImage) bool {
			return i.Name == one && i.Target == another.String()
		})
	})
	s.Must(r.Off())
	s.daxfs("attach", "--namespace", "k8s.io", one)
	if got, want := names(), one+"\n"+repo+"@"+another.String()+"\n"; got != want {
		t.Errorf("after the owner had another image there are %q, expected %q", got, want)
	}
	await(t, "Kubernetes sees another image", func() bool {
		return slices.Contains(status(one).GetRepoDigests(), repo+"@"+another.String())
	})

	// Kubernetes' garbage collection of images ends the claims.
	for _, ref := range []string{one, pause} {
		_, err := images.RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}})
		s.Must(err)
	}
	await(t, "all claims have ended", func() bool {
		p := s.state().Pools[0]
		return p.Claimed == 0 && p.Mounted == 0
	})
}
