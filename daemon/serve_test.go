package daemon

import (
	"context"
	"errors"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/daxfs/daxfs-snapshotter/internal/overlay"
)

// A daemon that is told to stop unmounts an image whose last container ended after containerd's last cleanup.
func TestStopUnmountsUnused(t *testing.T) {
	f := flavours[0]
	f.need(t)
	m := &machine{t: t, dir: t.TempDir()}
	m.cfg = f.config(m.dir)
	d, err := Open(t.Context(), m.cfg)
	m.must(err)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ready, served := make(chan struct{}), make(chan error, 1)
	go func() { served <- d.Serve(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-served:
		t.Fatal(errors.Join(err, d.Close()))
	}
	conn, err := grpc.NewClient("unix://"+m.cfg.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	m.must(err)
	m.sn = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "daxfs")

	calls := namespaces.WithNamespace(t.Context(), "default")
	top, err := m.pull(calls, false, []file{{"a", []byte("a")}})
	m.must(err)
	mounts, err := m.sn.Prepare(calls, "default/90/container", top)
	m.must(err)
	root, empty := t.TempDir(), t.TempDir()
	m.must(mount.All(mounts, root))
	m.must(errors.Join(m.sn.Remove(calls, "default/90/container"), m.sn.Remove(calls, top), d.sn.Cleanup(calls)))
	if n := len(d.store.Mounted()); n != 1 {
		t.Errorf("below a running container %d images are mounted, expected 1", n)
	}
	m.must(unix.Unmount(root, 0))
	// Another test may have copied the mount into a namespace of its own. Until that has gone, the kernel
	// refuses a second overlay over the upper directory.
	upper := upperOf(mounts)
	second := []string{"lowerdir=" + empty, "upperdir=" + upper, "workdir=" + upper + "/../work", "index=on"}
	for deadline := time.Now().Add(patience); errors.Is(overlay.Try(second), unix.EBUSY); {
		if time.Now().After(deadline) {
			t.Fatalf("the overlay over %q is still in use", upper)
		}
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	m.must(errors.Join(conn.Close(), <-served))
	if mounted := d.store.Mounted(); len(mounted) != 0 {
		t.Errorf("after the end images are mounted: %+v", mounted)
	}
	m.must(d.Close())
}
