package integration

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/opencontainers/image-spec/identity"
	"google.golang.org/grpc"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

const (
	benchImages = 100
	benchRounds = 25
	benchNew    = 20 // snapshots that each round makes and removes
)

// proxied is containerd's overlayfs snapshotter behind a socket, like daxfs: its additional time over
// overlayfs in containerd is the cost of a proxy.
const proxied = "proxied"

const proxiedConfig = `
[proxy_plugins.proxied]
  type = "snapshot"
  address = "{{run}}/proxied.sock"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "proxied"
  differ = "walking"
`

// BenchmarkSnapshots measures containerd's calls to a snapshotter with 100 images and 1,000 snapshots:
// daxfs, overlayfs, and overlayfs as a proxy, one after the other in every round. It prints medians,
// also for 400 snapshots: except for listing, the time of a call must not grow with their number.
func BenchmarkSnapshots(b *testing.B) {
	s := stack.New(b, stack.Options{Mode: stack.Streaming, Containerd: proxiedConfig})
	serveOverlay(b, s)
	client, err := s.Client()
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	ctx := namespaces.WithNamespace(b.Context(), stack.Namespace)

	names := []string{"overlayfs", proxied, "daxfs"}
	var images []string // the chains of their layers
	base := testimage.SmallFiles(200, 1)
	for i := range benchImages {
		img, err := testimage.Image(base, testimage.SmallFiles(20, uint64(2+i)))
		if err != nil {
			b.Fatal(err)
		}
		ref := s.Push(fmt.Sprintf("image-%d", i), img)
		for _, name := range names {
			s.Pull(ref, name)
		}
		images = append(images, chainOf(ctx, b, client, ref))
	}
	samples := map[string][]float64{}
	timed := func(name, op string, times int, f func() error) {
		began := time.Now()
		if err := f(); err != nil {
			b.Fatalf("%s with %s: %v", op, name, err)
		}
		key := name + "-" + op
		samples[key] = append(samples[key], float64(time.Since(began).Microseconds())/1000/float64(times))
	}
	round := 0
	for _, total := range []int{400, 1000} {
		for _, name := range names {
			fill(ctx, b, client.SnapshotService(name), images, total)
		}
		clear(samples)
		for range benchRounds {
			// Rotate the order in each round.
			for i := range names {
				name := names[(i+round)%len(names)]
				measureCalls(ctx, client, name, images, total, round, timed)
				timed(name, "collect", 1, s.Collect)
			}
			round++
		}
		for _, op := range []string{"ls", "usage", "prepare", "commit", "rm", "collect"} {
			own, over, proxy := medianOf(samples["daxfs-"+op]), medianOf(samples["overlayfs-"+op]),
				medianOf(samples[proxied+"-"+op])
			b.ReportMetric(own/over, fmt.Sprintf("%s-ratio/%d", op, total))
			// A benchmark's log is cut after ten lines.
			fmt.Printf("%4d snapshots  %-8s overlayfs %8.3f ms  proxied %8.3f ms  daxfs %8.3f ms  "+
				"daxfs/overlayfs %5.2f  daxfs/proxied %5.2f\n",
				total, op, over, proxy, own, own/over, own/proxy)
		}
	}
}

// fill makes active snapshots until there are total snapshots.
func fill(ctx context.Context, b *testing.B, sn snapshots.Snapshotter, images []string, total int) {
	n, err := count(ctx, sn)
	if err != nil {
		b.Fatal(err)
	}
	for ; n < total; n++ {
		if _, err := sn.Prepare(ctx, fmt.Sprintf("stays-%d", n), images[n%len(images)], keep); err != nil {
			b.Fatal(err)
		}
	}
}

// measureCalls times the calls of one round on one snapshotter.
func measureCalls(ctx context.Context, client *containerd.Client, name string, images []string, total, round int,
	timed func(name, op string, times int, f func() error),
) {
	sn := client.SnapshotService(name)
	timed(name, "ls", 1, func() error {
		n, err := count(ctx, sn)
		if err == nil && n < total {
			err = fmt.Errorf("%d snapshots, expected %d", n, total)
		}
		return err
	})
	timed(name, "usage", 2*benchImages, func() error {
		for i, chain := range images {
			for _, key := range []string{chain, fmt.Sprintf("stays-%d", total-1-i)} {
				if _, err := sn.Usage(ctx, key); err != nil {
					return err
				}
			}
		}
		return nil
	})
	key := func(i int) string { return fmt.Sprintf("new-%d-%d", round, i) }
	each := func(op string, f func(i int) error) {
		timed(name, op, benchNew, func() error {
			for i := range benchNew {
				if err := f(i); err != nil {
					return err
				}
			}
			return nil
		})
	}
	each("prepare",
		func(i int) error { _, err := sn.Prepare(ctx, key(i), images[(round+i)%len(images)], keep); return err })
	each("commit", func(i int) error { return sn.Commit(ctx, key(i)+"-committed", key(i), keep) })
	each("rm", func(i int) error { return sn.Remove(ctx, key(i)+"-committed") })
}

// keep protects from containerd's garbage collection.
var keep = snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "bench"})

// proxiedAt is the environment variable that makes a process of this program serve containerd's
// overlayfs snapshotter: its socket and its root directory, with a colon between them.
const proxiedAt = "DAXFS_TEST_PROXIED"

// serveOverlay serves containerd's overlayfs snapshotter at the address in proxiedConfig, in a process
// of its own, as a proxy plugin is.
func serveOverlay(b *testing.B, s *stack.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(),
		fmt.Sprintf("%s=%s/proxied.sock:%s", proxiedAt, s.Stack.Run, filepath.Join(s.Dir, proxied)))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
}

// overlayServer is the process that serveOverlay starts.
func overlayServer(at string) error {
	socket, root, _ := strings.Cut(at, ":")
	sn, err := overlay.NewSnapshotter(root)
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	return server.Serve(l)
}

func chainOf(ctx context.Context, b *testing.B, client *containerd.Client, ref string) string {
	img, err := client.GetImage(ctx, ref)
	if err != nil {
		b.Fatal(err)
	}
	ids, err := img.RootFS(ctx)
	if err != nil {
		b.Fatal(err)
	}
	return identity.ChainID(ids).String()
}

func count(ctx context.Context, sn snapshots.Snapshotter) (n int, err error) {
	err = sn.Walk(ctx, func(context.Context, snapshots.Info) error { n++; return nil })
	return n, err
}

func medianOf(list []float64) float64 {
	if len(list) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(list))
	return sorted[len(sorted)/2]
}
