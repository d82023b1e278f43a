package daemon

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/daxfs/daxfs-snapshotter/config"
	"github.com/daxfs/daxfs-snapshotter/internal/testns"
	"github.com/daxfs/daxfs-snapshotter/mount"
	"github.com/daxfs/daxfs-snapshotter/mount/fusefs"
	"github.com/daxfs/daxfs-snapshotter/pool"
	"github.com/daxfs/daxfs-snapshotter/pool/region"
	"github.com/daxfs/daxfs-snapshotter/snapshotter"
	"github.com/daxfs/daxfs-snapshotter/store"
)

func TestMain(m *testing.M) {
	if args, ok := helperArgs(os.Args); ok {
		if err := fusefs.ServeArgs(args); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if text := os.Getenv(jobEnv); text != "" {
		if err := runJob(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	flag.Parse()
	if os.Geteuid() == 0 {
		flag.Set("test.root", "true") // containerd's suite requires it
	}
	os.Exit(testns.Main(m))
}

// helperArgs returns the arguments if this process was started as the program daxfs to serve a FUSE mount.
func helperArgs(args []string) ([]string, bool) {
	head := []string{"mount", "--driver", "fuse", "--foreground"}
	if len(args) <= len(head) || !slices.Equal(args[1:1+len(head)], head) {
		return nil, false
	}
	return args[1+len(head):], true
}

type flavour struct {
	name   string
	kind   string // of the pool
	driver string
}

var flavours = []flavour{
	{"erofs-file", "file", "erofs-file"},
	{"erofs-loop", "tmpfs", "erofs-loop"},
	{"fuse", "tmpfs", "fuse"},
}

// fewFlavours returns the first n flavours, for slow tests; with -short, used with the race detector,
// only one. The daemon's code is the same in all flavours, and the drivers have tests of their own.
func fewFlavours(n int) []flavour {
	if testing.Short() {
		n = 1
	}
	return flavours[:n]
}

func (f flavour) config(root string) *config.Config {
	c := config.Default()
	c.Root = filepath.Join(root, "root")
	c.Address = filepath.Join(root, "s.sock")
	c.Pool.Kind, c.Pool.Size = f.kind, 1<<30
	c.Mount.Driver = f.driver
	if self, err := os.Executable(); err == nil {
		c.Mount.FUSEHelper = self
	}
	if f.kind == "tmpfs" {
		c.Pool.Path = filepath.Join("/dev/shm", filepath.Base(filepath.Dir(root))+"-"+filepath.Base(root)+".pool")
	}
	return c
}

// need skips the test, with the reason, if the flavour cannot run here.
func (f flavour) need(t *testing.T) {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	c := f.config(dir)
	path := c.Pool.Path
	if path == "" {
		path = filepath.Join(dir, "pool")
	}
	r, err := region.Open(region.Config{Kind: f.kind, Path: path, Size: 16 << 20, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(path)
	defer r.Close()
	drivers, err := mount.Select(allDrivers(c), f.driver)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range drivers {
		if err := d.Probe(t.Context(), r.Info()); err != nil {
			t.Skipf("driver %s: %v", d.Name(), err)
		}
	}
}

type client struct {
	*Daemon
	remote  snapshots.Snapshotter // through the socket
	applier diff.Applier          // through the socket

	conn   *grpc.ClientConn
	stop   context.CancelFunc
	served chan error
}

// start opens a daemon whose differ reads from blobs, and serves it on its socket.
func start(ctx context.Context, c *config.Config, blobs content.Provider) (*client, error) {
	s, err := Open(ctx, c)
	if err != nil {
		return nil, err
	}
	l, err := listen(c.Address)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	conn, err := grpc.NewClient("unix://"+c.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, errors.Join(err, s.Close(), l.Close())
	}
	cl := &client{
		Daemon: s, conn: conn, served: make(chan error, 1),
		remote:  proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "daxfs"),
		applier: diffproxy.NewDiffApplier(diffapi.NewDiffClient(conn)).(diff.Applier),
	}
	ctx, cl.stop = context.WithCancel(context.WithoutCancel(ctx))
	go func() { cl.served <- serveGRPC(ctx, l, s.grpcServer(snapshotter.NewDiffer(s.Snapshotter(), blobs))) }()
	return cl, nil
}

// end stops the daemon like SIGTERM.
func (c *client) end() error {
	c.conn.Close()
	c.stop()
	return errors.Join(<-c.served, c.Daemon.Close())
}

// purge removes every snapshot and checks that nothing is left.
func (c *client) purge(ctx context.Context) error {
	for {
		var names []string
		err := c.sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			names = append(names, info.Name)
			return nil
		})
		if err != nil {
			return err
		}
		if len(names) == 0 {
			break
		}
		removed := false
		for _, name := range names {
			if err := c.sn.Remove(ctx, name); err == nil {
				removed = true
			} else if !errdefs.IsFailedPrecondition(err) {
				return err
			}
		}
		if !removed {
			return fmt.Errorf("none of %q can be removed", names)
		}
	}
	if err := c.settle(ctx); err != nil {
		return err
	}
	if n := len(c.pool().Images()) + len(c.pool().Layers()) + len(c.store.Mounted()); n > 0 {
		return fmt.Errorf("%d images, layers and mounts are left over", n)
	}
	if u := c.pool().Usage(); u.Extents != 0 || u.Segments != 0 || u.Dead != 0 {
		return fmt.Errorf("pool is not empty: %+v", u)
	}
	return nil
}

func (c *client) pool() *pool.Pool { return c.store.Pool() }

// patience is how long other processes may hold a mount. On a busy machine each start of a container
// briefly copies all mounts, and space below a live mount is rightly not freed.
const patience = 2 * time.Minute

// settle waits for background work, cleans up, and checks that everything is consistent.
func (c *client) settle(ctx context.Context) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		if err := errors.Join(c.sn.Flush(ctx), c.sn.Cleanup(ctx)); err != nil {
			return err
		}
		var errs []error
		err := c.Check(ctx, func(msg string) { errs = append(errs, errors.New(msg)) })
		if err != nil || len(errs) == 0 || time.Now().After(deadline) {
			return errors.Join(append(errs, err)...)
		}
	}
}

// loseMemory removes what a reboot removes: the mounts and the pool. The daemon must not run.
func loseMemory(c *config.Config) error {
	for _, kind := range []string{"images", "live"} { // an image is a bind mount of the pool
		dirs, err := filepath.Glob(filepath.Join(c.Root, kind, "*/mnt"))
		if err != nil {
			return err
		}
		for _, d := range dirs {
			if err := cmount.UnmountAll(d, 0); err != nil {
				return err
			}
		}
	}
	return removePool(c)
}

func openPool(t *testing.T, c *config.Config) (p *pool.Pool, done func()) {
	t.Helper()
	index, err := filepath.Glob(filepath.Join(c.Root, "pool/*.db"))
	if err != nil || len(index) != 1 {
		t.Fatalf("indexes %q, %v", index, err)
	}
	path := store.Pool{Kind: c.Pool.Kind, Path: c.Pool.Path}.File(c.Root)
	r, err := region.Open(region.Config{Kind: c.Pool.Kind, Path: path})
	if err != nil {
		t.Fatal(err)
	}
	if p, err = pool.Open(r, index[0], pool.Options{}); err != nil {
		t.Fatal(err)
	}
	return p, func() {
		if err := errors.Join(p.Close(), r.Close()); err != nil {
			t.Error(err)
		}
	}
}

// needRoot skips a test that mounts unless it runs as root.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts file systems, which needs root")
	}
}
