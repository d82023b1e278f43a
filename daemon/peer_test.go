package daemon

import (
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/daxfs/daxfs-snapshotter/config"
)

// prepareFrom prepares a container on a snapshot, "<key> <parent>", like a client of the daemon.
func prepareFrom(ctx context.Context, address, what string) error {
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	key, parent, _ := strings.Cut(what, " ")
	ctx = namespaces.WithNamespace(ctx, "default")
	_, err = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "daxfs").Prepare(ctx, key, parent)
	return err
}

// A caller that does not see the images' mounts, and would start containers with an empty root, gets an error.
func TestCallerSeesNoImages(t *testing.T) {
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		t.Skip("enters a mount namespace: ", err)
	}
	cl, m := inside(t, flavours[0], func(*config.Config) {})
	other := sleepInNamespace(t) // before anything is mounted
	defer func() {
		m.must(other.Kill())
		_, err := other.Wait()
		m.must(err)
	}()
	ctx := namespaces.WithNamespace(t.Context(), "default")
	a := file{"a", random(1, 5000)}
	top, err := m.pull(ctx, true, []file{a})
	m.must(err)
	ask := func(args ...string) (string, error) {
		cmd, err := m.command(fmt.Sprintf("prepare default/200/c %s", top))
		m.must(err)
		if len(args) > 0 {
			cmd.Args = append(args, cmd.Path)
			cmd.Path = args[0]
		}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	out, err := ask(nsenter, "-t", strconv.Itoa(other.Pid), "-m", "--")
	if err == nil || !strings.Contains(out, "not in the mount namespace of the caller") ||
		!strings.Contains(out, m.cfg.Root) {
		t.Errorf("from another mount namespace: %v\n%s", err, out)
	}
	if _, err := m.sn.Stat(ctx, "default/200/c"); !errdefs.IsNotFound(err) {
		t.Errorf("the snapshot that was refused: %v", err)
	}
	if out, err := ask(); err != nil {
		t.Errorf("from this one: %v\n%s", err, out)
	}
	if n := len(cl.store.Mounted()); n != 1 {
		t.Errorf("%d images are mounted", n)
	}
}
