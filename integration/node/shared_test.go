package node

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
	"github.com/daxfs/daxfs-snapshotter/internal/vmm"
)

const (
	poolSize  = 128 << 20
	leaseSize = 2 << 20
	diskSize  = 256 << 20
	ownSize   = 2 << 20 // of contents unique to an image
)

// hostConfig makes a pool in memory that nodes mount with DAX. A node's lease region counts while its launcher lives.
const hostConfig = `[pool]
kind = "tmpfs"
path = "{{run}}/pool"
size = "128MiB"
dax = "yes"
readers = "leases"
leases = ["flock:{{run}}/leases"]
`

// readerConfig makes a node use the host's pool beside its own.
const readerConfig = `[pool]
kind = "tmpfs"
path = "/run/pool"
size = "64MiB"

[shared]
pools = ["/dev/pmem1"]
leases = { "/dev/pmem1" = "/dev/pmem2" }
`

// launcher follows docs/virtual-machines.md: the monitor inherits a lock on the lease region, and never releases it.
var launcher = []string{"sh", "-euc", `exec 9<>"$0"; flock --nonblock 9; exec "$@"`}

// onBase makes an image of busybox, a layer common to images of the same base, and a layer of its own:
// the file /own/NAME contains text, and a larger file is unique.
func onBase(t *testing.T, base, name, text string) v1.Image {
	t.Helper()
	busybox, err := testimage.Busybox()
	if err != nil {
		t.Skip(err)
	}
	var seed uint64
	for _, c := range text {
		seed = seed*31 + uint64(c)
	}
	img, err := testimage.Image(busybox,
		[]testimage.Entry{
			testimage.Dir("base", 0o755),
			testimage.File("base/"+base, 0o644, testimage.Noise(uint64(len(base)), 3<<20)),
		},
		[]testimage.Entry{
			testimage.Dir("own", 0o755), testimage.File("own/"+name, 0o644, []byte(text+"\n")),
			testimage.File("own/large", 0o644, testimage.Noise(seed, ownSize)),
		})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// sharing is a host that owns a pool, and a node that reads it.
type sharing struct {
	*stack.T
	*node // the running machine, if there is one
	t     *testing.T
	b     *bed
	disk  string // of the node; survives its machines
	runs  int
}

func newSharing(t *testing.T) *sharing {
	t.Helper()
	kernels(t)
	s := &sharing{T: stack.New(t, stack.Options{Mode: stack.Streaming, Config: hostConfig}), t: t, b: newBed(t)}
	s.disk = filepath.Join(s.b.dir, "disk")
	s.Must(errors.Join(os.WriteFile(s.disk, nil, 0o600), os.Truncate(s.disk, diskSize)))
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", s.disk).CombinedOutput(); err != nil {
		t.Fatalf("make a disk for the node: %v\n%s", err, out)
	}
	return s
}

func (s *sharing) pool() string { return filepath.Join(s.Stack.Run, "pool") }

// boot starts the node on its disk, with the current pool and lease region. A launcher creates the region as zeros.
func (s *sharing) boot() {
	s.t.Helper()
	lease := filepath.Join(s.Stack.Run, "leases", "node.lease")
	s.Must(os.MkdirAll(filepath.Dir(lease), 0o700))
	f, err := os.OpenFile(lease, os.O_CREATE|os.O_RDWR, 0o600)
	s.Must(err)
	s.Must(errors.Join(f.Truncate(leaseSize), f.Close()))
	s.node = s.b.start(Options{
		Kernel: kernels(s.t)[0], Config: readerConfig, Network: true, UUID: "6b1f4c1e-6d0e-4d0c-8f55-0a2f0d6f7a11",
		Disk: s.disk, Launcher: append(launcher[:len(launcher):len(launcher)], lease), Devices: []vmm.Device{
			{ID: "pool", Path: s.pool(), Size: poolSize, ReadOnly: true}, {ID: "lease", Path: lease, Size: leaseSize},
		},
	})
}

// upload makes an image, uploads it, and returns its reference and the digest of its manifest.
func (s *sharing) upload(name, text string) (ref, digest string) {
	s.t.Helper()
	img := onBase(s.t, "shared", name, text)
	h, err := img.Digest()
	s.Must(err)
	return s.Push(name, img), h.String()
}

// attach attaches an image of the host by name, once the host has published it, some time after the pull.
func (s *sharing) attach(ref, digest string) {
	s.t.Helper()
	s.t.Log(s.sh(`i=0; until daxfs attach %s 2>&1 | tee /tmp/attach | grep %s; do
		i=$((i+1)); [ $i -lt 120 ] || { cat /tmp/attach; exit 1; }; sleep 0.5
	done`, ref, digest))
}

// reads runs a container of an image on the node, which prints its file, and compares the output.
func (s *sharing) reads(what, ref, file, want string) {
	s.t.Helper()
	s.runs++
	s.prints(what, s.sh("ctr run --rm --snapshotter daxfs %s run-%d /bin/cat /own/%s", ref, s.runs, file), want)
}

func (s *sharing) prints(what, out, want string) {
	s.t.Helper()
	if !strings.HasSuffix(strings.TrimSpace(out), want) {
		s.t.Errorf("%s: printed %q, want %q", what, out, want)
	}
}

// contents returns the bytes of contents in the host's pool after a sweep.
func (s *sharing) contents() int64 {
	s.t.Helper()
	s.Must(s.Collect())
	n, err := s.CollectPool(s.pool())
	s.Must(err)
	return n
}

// await waits until the host's pool holds at most most bytes.
func (s *sharing) await(what string, most int64) {
	s.t.Helper()
	var n int64
	for range 240 {
		if n = s.contents(); n <= most {
			return
		}
		time.Sleep(250 * time.Millisecond)
	}
	s.t.Errorf("%s: the pool has %d bytes of contents, want at most %d:\n%s", what, n, most, s.users())
}

// users returns the host's report of its images' users.
func (s *sharing) users() string {
	s.t.Helper()
	out, err := s.Try("daxfs", "pool", "ls", "--control", s.Stack.Run+"/control.sock", s.pool())
	s.Must(err)
	return out
}

// A second kernel starts containers from the host's pool: its containerd has the images without
// pulling them, pulls only layers that the pool lacks, and survives failures on either side.
func TestShared(t *testing.T) {
	s := newSharing(t)
	app, first := s.upload("app", "app")
	late, lateDigest := s.upload("late", "late")
	s.upload("other", "other")
	s.Pull(app, "daxfs")
	s.Must(s.Registry.Off())
	s.boot()
	s.attach(app, first)
	s.reads("attached image", app, "app", "app")
	s.prints("its mount",
		s.sh(`mkdir /tmp/m; ctr image mount --snapshotter daxfs %s /tmp/m; cat /tmp/m/own/app`, app), "app")
	s.sh("ctr image unmount --rm --snapshotter daxfs /tmp/m")

	s.Must(s.KillDaemon())
	s.Must(s.node.StartDaemon())
	s.awaitDaemon()
	s.reads("after the node's daemon was killed", app, "app", "app")

	// The host continues, after a crash too.
	s.Must(s.StopDaemon(syscall.SIGKILL))
	s.Must(s.T.StartDaemon())
	s.Must(s.Registry.On())
	s.Pull(late, "daxfs")
	s.attach(late, lateDigest)
	s.reads("image that the host added", late, "late", "late")

	// Layers not in the pool are pulled: here the configuration and the image's own layer.
	other := s.fromNode("other")
	s.Registry.Fetched()
	s.sh("ctr image pull --plain-http --snapshotter daxfs %s", other)
	s.reads("image on a base of the pool", other, "other", "other")
	if fetched := s.Registry.Fetched(); len(fetched) != 2 {
		t.Errorf("blobs that were fetched for an image whose base is there: %q, want 2", fetched)
	}

	s.replace(app)

	// The guest reboots. Everything on its disk is still valid.
	s.Must(s.Stop())
	s.Must(s.Registry.Off())
	s.boot()
	s.reads("after a reboot", late, "late", "late")
	s.reads("after a reboot, on a base of the pool", other, "other", "other")

	s.kill(late)
	s.rebootHost(late, other)
	s.Must(s.Stop())
}

// fromNode returns a reference by which the node reaches an uploaded image.
func (s *sharing) fromNode(name string) string {
	_, port, _ := strings.Cut(s.Registry.Addr(), ":")
	return "10.0.2.2:" + port + "/" + name + ":latest"
}

// replace makes the host replace an image, and then remove it, while a container on the node runs from the old one.
func (s *sharing) replace(app string) {
	s.t.Helper()
	s.sh("ctr run --detach --snapshotter daxfs %s stays /bin/sleep 1000000", app)
	sum := s.sh("ctr task exec --exec-id sum-1 stays md5sum /own/large")
	one := s.contents()
	_, second := s.upload("app", "another")
	s.Pull(app, "daxfs")
	s.attach(app, second)
	s.reads("image that the host replaced", app, "app", "another")
	stays := func(when, id string) {
		s.t.Helper()
		s.prints("container of the image before, "+when,
			s.sh("ctr task exec --exec-id cat-%s stays cat /own/app", id), "app")
		if now := s.sh("ctr task exec --exec-id sum-%s stays md5sum /own/large", id); now != sum {
			s.t.Errorf("container of the image before, %s: its file was %s and is %s", when, sum, now)
		}
	}
	stays("replaced", "2")
	two := s.contents()
	if two < one+ownSize {
		s.t.Errorf("the pool has %d bytes of contents, and %d with another image: what is in use is gone", one, two)
	}

	s.Ctr("image", "rm", "--sync", app)
	if n := s.contents(); n != two {
		s.t.Errorf("the pool has %d bytes of contents, want %d: the node uses both images\n%s", n, two, s.users())
	}
	s.sh("ctr image rm --sync %s", app)
	s.await("the node has no image but a container", two-ownSize)
	stays("removed", "3")
	if n := s.contents(); n < two-2*ownSize+1 {
		s.t.Errorf("the pool has %d bytes of contents: those of a container that runs are gone\n%s", n, s.users())
	}
	s.sh("ctr task rm --force stays; ctr container rm stays; ctr content prune references")
	s.await("the container has ended", two-2*ownSize)
}

// kill ends the machine like a crash of the monitor. This releases its launcher's lock, and its images are free.
func (s *sharing) kill(late string) {
	s.t.Helper()
	s.sh("ctr run --detach --snapshotter daxfs %s killed /bin/sleep 1000000; sync", late)
	before := s.contents()
	s.Ctr("image", "rm", "--sync", late)
	if n := s.contents(); n != before {
		s.t.Errorf("the pool has %d bytes of contents, want %d: a machine uses the image\n%s", n, before, s.users())
	}
	s.Must(s.Kill())
	s.await("the machine is dead", before-ownSize)
}

// rebootHost loses the host's memory: the pool and the lease regions. The node boots, finds nothing in
// the new pool, reports that, and pulls as usual once no snapshot stands for an image of the old pool.
func (s *sharing) rebootHost(late, other string) {
	s.t.Helper()
	s.Must(s.Reboot(nil))
	s.boot()
	if out := s.sh("daxfs attach 2>/dev/null"); strings.Contains(out, late) || !strings.Contains(out, "/dev/pmem1") {
		s.t.Errorf("images to attach: %s\nwant none of the pool /dev/pmem1", out)
	}
	for _, ref := range []string{late, other} {
		out := s.sh("! ctr run --rm --snapshotter daxfs %s lost /bin/true 2>&1", ref)
		if !strings.Contains(out, "in no shared pool: not found; remove the OCI image and pull it") {
			s.t.Errorf("an image whose pool is gone: %s", out)
		}
	}
	const lost = "no container starts from"
	for _, command := range []string{"status", "attach"} {
		if out := s.sh("daxfs %s 2>&1", command); !strings.Contains(out, lost) || !strings.Contains(out, late) {
			s.t.Errorf("daxfs %s says nothing of the pool that is gone, and of %s:\n%s", command, late, out)
		}
	}
	s.Must(s.Registry.On())
	s.Registry.Fetched()
	pulled := s.fromNode("late")
	s.sh("ctr container rm killed; ctr image rm --sync %s %s; ctr image pull --plain-http --snapshotter daxfs %s",
		late, other, pulled)
	s.reads("image that was pulled again", pulled, "late", "late")
	s.sh("i=0; while daxfs status | grep %q; do i=$((i+1)); [ $i -lt 120 ] || exit 1; sleep 0.5; done", lost)
	if fetched := s.Registry.Fetched(); len(fetched) != 4 {
		s.t.Errorf("blobs that were fetched: %q, want 4: a configuration and three layers", fetched)
	}
}
