package node

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/qemu"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

func TestMain(m *testing.M) { os.Exit(stack.Main(m)) }

// kernels skips a test where nodes cannot run, and returns the kernels to test.
func kernels(t testing.TB) []qemu.Kernel {
	t.Helper()
	if unavailable := testing.Short() || os.Getuid() != 0; unavailable {
		t.Skip("needs root, and not -short")
	}
	if _, err := exec.LookPath(qemu.Program); err != nil {
		t.Skip(err)
	}
	list, err := qemu.FindKernels()
	if err != nil {
		t.Skip(err)
	}
	return list
}

// bed is a directory with the nodes' root.
type bed struct {
	testing.TB
	dir  string
	root string
}

func newBed(t testing.TB) *bed {
	t.Helper()
	dir := t.TempDir()
	root, err := MakeRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	return &bed{t, dir, root}
}

func (b *bed) start(o Options) *node {
	b.Helper()
	o.Root = b.root
	dir, err := os.MkdirTemp(b.dir, "node-")
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	n, err := Start(ctx, o, dir)
	b.Cleanup(func() {
		cancel()
		if n != nil {
			n.Wait() // it was killed, unless it ended in the test
		}
	})
	if err != nil {
		b.Fatal(err)
	}
	return &node{n, b}
}

// node fails the test instead of returning errors.
type node struct {
	*Node
	b *bed
}

func (n *node) sh(format string, args ...any) string {
	n.b.Helper()
	out, err := n.Sh(format, args...)
	if err != nil {
		n.b.Fatalf("%v\nlog of the daemon:\n%s", err, n.Log("daxfs-snapshotter"))
	}
	return out
}

// awaitDaemon waits until containerd has connected to a restarted daxfs-snapshotter.
func (n *node) awaitDaemon() {
	n.b.Helper()
	n.sh("until ctr snapshot --snapshotter daxfs ls; do sleep 0.2; done")
}

// give writes an OCI archive that the node has as /host/NAME.tar.
func (n *node) give(name string, img v1.Image) {
	n.b.Helper()
	if err := testimage.WriteArchive(filepath.Join(n.Share(), name+".tar"), img); err != nil {
		n.b.Fatal(err)
	}
}

// A node's containerd imports an image and runs containers, with containerd's own snapshotter and with
// ours, whose pool is in the node's memory.
func TestNode(t *testing.T) {
	k := kernels(t)[0]
	b := newBed(t)
	n := b.start(Options{Kernel: k, Config: "[pool]\nkind = \"tmpfs\"\npath = \"/run/pool\"\nsize = \"128MiB\"\n"})
	tiny, err := testimage.Tiny()
	if err != nil {
		t.Skip(err)
	}
	n.give("tiny", tiny)
	if root := n.sh("grep ' / ' /proc/mounts | tail -n 1"); !strings.HasPrefix(root, "/dev/pmem0 / erofs ro,") ||
		!strings.Contains(root, "dax=always") {
		t.Errorf("the root is mounted as %q, want the image with DAX", root)
	}
	for _, snapshotter := range []string{"overlayfs", "daxfs"} {
		out := n.sh(`ctr image import --snapshotter %[1]s --index-name test/%[1]s:1 /host/tiny.tar
			ctr run --rm --snapshotter %[1]s test/%[1]s:1 c-%[1]s /bin/echo ran`, snapshotter)
		t.Log(out)
		if !strings.HasSuffix(out, "\nran\n") {
			t.Errorf("%s: the container printed %q", snapshotter, out)
		}
	}
	if err := n.Stop(); err != nil {
		t.Error(err)
	}
}
