//go:build kubernetes

package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// runtime is containerd's CRI service, used without a kubelet.
type runtime struct {
	cri.RuntimeServiceClient
	images cri.ImageServiceClient
}

// connect waits until containerd has found its pods again.
func connect(t *testing.T, s *stack.T) *runtime {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+s.Stack.Run+"/containerd.sock",
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	r := &runtime{cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn)}
	for range 600 {
		if _, err = r.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{}); err == nil {
			return r
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("containerd does not serve pods: %v", err)
	return nil
}

// pull pulls an image of a mirrored registry.
func (r *runtime) pull(ctx context.Context, image string) error {
	_, err := r.images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: image}})
	return err
}

// run starts a pod with one waiting container, in the network of the node. sandbox, unless empty,
// exists even if the container does not.
func (r *runtime) run(ctx context.Context, name, image string) (sandbox, container string, err error) {
	config := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: "default"},
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE},
		}},
	}
	box, err := r.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		return "", "", err
	}
	made, err := r.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: box.PodSandboxId, SandboxConfig: config, Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "main"}, Image: &cri.ImageSpec{Image: image},
			Command: []string{"sleep", "1000000"},
		},
	})
	if err != nil {
		return box.PodSandboxId, "", err
	}
	_, err = r.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: made.ContainerId})
	return box.PodSandboxId, made.ContainerId, err
}

// prints runs a command in a container and compares its output.
func (r *runtime) prints(ctx context.Context, container, want string, command ...string) error {
	out, err := r.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: container, Cmd: command, Timeout: 60})
	if err != nil {
		return err
	}
	if string(out.Stdout) != want || out.ExitCode != 0 {
		return fmt.Errorf("%q in %s: exit %d, %q, %q; expected %q", command, container, out.ExitCode, out.Stdout,
			out.Stderr, want)
	}
	return nil
}

func (r *runtime) remove(ctx context.Context, sandbox string) error {
	if _, err := r.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: sandbox}); err != nil {
		return err
	}
	_, err := r.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: sandbox})
	return err
}

func (r *runtime) removeAll(ctx context.Context) error {
	list, err := r.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range list.Items {
		errs = append(errs, r.remove(ctx, p.Id))
	}
	return errors.Join(errs...)
}

// idle checks that nothing of any pod is left: no writable snapshot, no other mounts than those of images.
func idle(t *testing.T, s *stack.T) {
	t.Helper()
	for line := range strings.Lines(s.Ctr("--namespace", "k8s.io", "leases", "ls", "-q")) {
		s.Ctr("--namespace", "k8s.io", "leases", "rm", strings.TrimSpace(line)) // of interrupted calls
	}
	s.Ctr("--namespace", "k8s.io", "content", "prune", "references")
	snapshots := s.Ctr("--namespace", "k8s.io", "snapshot", "--snapshotter", "daxfs", "ls")
	if strings.Contains(snapshots, "Active") || strings.Contains(snapshots, "View") {
		t.Errorf("snapshots that no pod has:\n%s", snapshots)
	}
	mounts, err := s.Mounts()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if !strings.HasPrefix(m, s.DaemonRoot()) {
			t.Errorf("left behind: mount %q", m)
		}
	}
}
