package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// ownerSpace is the namespace of the owner of the shared pool.
const ownerSpace = "owner"

// ownerConfig configures containerd for a second daemon, which owns a pool. Content is not shared
// between namespaces, as if each were a separate machine.
const ownerConfig = `
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "owner"
  differ = "owner-diff"
[plugins."io.containerd.metadata.v1.bolt"]
  content_sharing_policy = "isolated"
[proxy_plugins.owner]
  type = "snapshot"
  address = "` + stack.PeerSocket + `"
  [proxy_plugins.owner.exports]
    enable_remote_snapshot_annotations = "true"
[proxy_plugins.owner-diff]
  type = "diff"
  address = "` + stack.PeerSocket + `"
`

// sharing is a stack with two daemons. One owns a pool, the other uses it.
type sharing struct {
	*stack.T
	t *testing.T
}

// newSharing starts the stack, with an addition to the configuration of the reading daemon, and with changed options.
func newSharing(t *testing.T, m stack.Mode, config string, change ...func(*stack.Options)) sharing {
	t.Helper()
	owner := `printf '[pool]\nreaders = "leases"\nleases = ["%s/reader.lease"]\n' "$1" > "$1/owner.toml"
test -e "$1/reader.lease" || head -c 65536 /dev/zero > "$1/reader.lease"
exec daxfs-snapshotter --config "$1/owner.toml" --address "$0" --root "$1" \
	--containerd-address "$XDG_RUNTIME_DIR/containerd.sock"`
	const pool = "{{dir}}/peer/pool/live"
	o := stack.Options{
		Mode: m, Containerd: ownerConfig, Peer: []string{"sh", "-c", owner},
		Config: fmt.Sprintf("[shared]\npools = [%q]\nleases = { %q = \"{{dir}}/peer/reader.lease\" }\n%s",
			pool, pool, config),
	}
	for _, c := range change {
		c(&o)
	}
	return sharing{stack.New(t, o), t}
}

// publish makes the owner pull an image, and waits until the other daemon can attach it.
func (s sharing) publish(ref string) {
	s.t.Helper()
	s.Ctr("--namespace", ownerSpace, "image", "pull", "--plain-http", "--snapshotter", "owner", ref)
	await(s.t, ref+" is in the pool", func() bool {
		return slices.ContainsFunc(s.state().Images, func(i sharedImage) bool { return i.Name == ref })
	})
}

// put makes the owner put an image from the registry by hand, and waits until the other daemon can attach it.
func (s sharing) put(ref string) {
	s.t.Helper()
	control := filepath.Join(filepath.Dir(stack.PeerSocket), "control.sock")
	live := filepath.Join(s.PeerRoot(), "pool/live")
	_, err := s.Try("daxfs", "pool", "put", "--plain-http", "--control", control, live, "docker://"+ref)
	s.Must(err)
	await(s.t, ref+" is in the pool", func() bool {
		return slices.ContainsFunc(s.state().Images,
			func(i sharedImage) bool { return i.Name == ref && i.Namespace == "daxfs.put" })
	})
}

type sharedImage struct{ Name, Namespace, Target, Chain, Pool string }

type sharedState struct {
	Pools []struct {
		Name                     string
		Images, Claimed, Mounted int
		Error                    string
	}
	Images []sharedImage
}

func (s sharing) daxfs(args ...string) string {
	s.t.Helper()
	args = append(args[:1:1], append([]string{"--control", s.Stack.Run + "/control.sock"}, args[1:]...)...)
	out, err := s.Try("daxfs", args...)
	s.Must(err)
	return out
}

func (s sharing) attach(names ...string) {
	s.t.Helper()
	s.daxfs(append([]string{"attach", "--namespace", stack.Namespace}, names...)...)
}

func (s sharing) state() (state sharedState) {
	s.t.Helper()
	s.Must(json.Unmarshal([]byte(s.daxfs("attach", "--json")), &state))
	return state
}

// apps are three images on one base with different top layers.
func apps(t *testing.T) (one, two, three v1.Image) {
	t.Helper()
	base, err := testimage.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	middle := []testimage.Entry{
		testimage.Dir("m", 0o755), testimage.File("m/kept", 0o640, testimage.Noise(1, 100_000)),
		testimage.File("m/hidden", 0o644, []byte("hidden")),
	}
	made := func(name string) v1.Image {
		img, err := testimage.Image(base, middle, []testimage.Entry{
			testimage.Dir("m", 0o711), testimage.Whiteout("m/hidden"), testimage.File("m/name", 0o644, []byte(name)),
		})
		if err != nil {
			t.Fatal(err)
		}
		return img
	}
	return made("one"), made("two"), made("three")
}

// The second daemon starts containers from the pool of the first without a registry, pulls only layers
// that the pool lacks, and releases what it no longer needs.
func TestShared(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := newSharing(t, m, "")
		img1, img2, img3 := apps(t)
		one, two, three := s.Push("one", img1), s.Push("two", img2), s.Push("three", img3)
		s.publish(one)
		s.Must(s.Registry.Off())
		s.attach("--all")
		const look = "cat /m/name; test ! -e /m/hidden && stat -c ' %a' /m"
		if out := s.Run(one, "daxfs", "a", "sh", "-c", look); out != "one 711\n" {
			t.Errorf("the container printed %q", out)
		}
		s.Ctr("run", "--detach", "--snapshotter", "daxfs", one, "stays", "sleep", "1000000")

		// The base is claimed, and the layers above are fetched.
		s.Must(s.Registry.On())
		s.Registry.Fetched()
		s.Pull(two, "daxfs")
		var want []string
		layers, err := img2.Layers()
		s.Must(err)
		for _, h := range []func() (v1.Hash, error){img2.ConfigName, layers[len(layers)-1].Digest} {
			id, err := h()
			s.Must(err)
			want = append(want, id.String())
		}
		got := s.Registry.Fetched()
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("fetched %q, expected %q", got, want)
		}
		if out := s.Run(two, "daxfs", "b", "sh", "-c", look); out != "two 711\n" {
			t.Errorf("a container on a claimed base printed %q", out)
		}
		for _, ref := range []string{one, two} {
			s.Ctr("--namespace", "compare", "image", "pull", "--plain-http", "--snapshotter", "overlayfs", ref)
			if err := listing.Diff(s.treeIn("compare", ref, "overlayfs"),
				s.treeIn(stack.Namespace, ref, "daxfs")); err != nil {
				t.Errorf("%s is not what it is with overlayfs: %v", ref, err)
			}
		}

		// First kill the daemon that uses the pool. Then kill the owner, which adds an image after its restart.
		s.Must(s.StopDaemon(syscall.SIGKILL))
		s.Must(s.StartDaemon())
		if out, err := s.Exec("stays", "cat", "/m/name"); err != nil || out != "one" {
			t.Errorf("a container that runs: %q, %v", out, err)
		}
		if out := s.Run(one, "daxfs", "c", "sh", "-c", look); out != "one 711\n" {
			t.Errorf("after a kill the container printed %q", out)
		}
		s.Must(s.StopPeer(syscall.SIGKILL))
		s.Must(s.StartPeer())
		s.publish(three)
		s.attach(three)
		if out := s.Run(three, "daxfs", "d", "sh", "-c", look); out != "three 711\n" {
			t.Errorf("an image that was added later printed %q", out)
		}

		// An image put by hand has its name and its manifest, too.
		four := s.Push("four", img3)
		s.put(four)
		s.Must(s.Registry.Off())
		s.attach(four)
		if out := s.Run(four, "daxfs", "e", "sh", "-c", look); out != "three 711\n" {
			t.Errorf("an image that was put by hand printed %q", out)
		}
		s.Must(s.Registry.On())

		// Images are removed; running containers stay.
		s.daxfs("detach", "--namespace", stack.Namespace, "--all")
		s.Ctr("image", "rm", "--sync", two)
		s.Must(s.Collect())
		if out, err := s.Exec("stays", "cat", "/m/name"); err != nil || out != "one" {
			t.Errorf("a container of a detached image: %q, %v", out, err)
		}
		s.Ctr("task", "rm", "--force", "stays")
		s.Ctr("container", "rm", "stays")
		s.Must(s.Collect())
		await(t, "all claims have ended", func() bool {
			p := s.state().Pools[0]
			return p.Claimed == 0 && p.Mounted == 0
		})
		nothingLeft(t, s.T)
	})
}

func (s sharing) treeIn(namespace, ref, snapshotter string) []string {
	s.t.Helper()
	dir, err := os.MkdirTemp(s.Stack.Run, "tree-")
	s.Must(err)
	defer os.Remove(dir)
	s.Ctr("--namespace", namespace, "image", "mount", "--snapshotter", snapshotter, ref, dir)
	defer s.Ctr("--namespace", namespace, "image", "unmount", "--rm", "--snapshotter", snapshotter, dir)
	lines, err := listing.Tree(dir, stack.Comparable)
	s.Must(err)
	return lines
}

// With shared.attach the daemon attaches new images by itself, once.
func TestSharedAttach(t *testing.T) {
	s := newSharing(t, stack.Streaming, "attach = [\""+stack.Namespace+"\"]\n")
	img, _, _ := apps(t)
	ref := s.Push("one", img)
	s.publish(ref)
	has := func() bool { return strings.Contains(s.Ctr("image", "ls", "-q"), ref) }
	await(t, "the image is attached", has)
	s.Must(s.Registry.Off())
	if out := s.Run(ref, "daxfs", "a", "cat", "/m/name"); out != "one" {
		t.Errorf("the container printed %q", out)
	}
	if out := s.Ctr("image", "ls", "name=="+ref); !strings.Contains(out, "io.cri-containerd.image=managed") {
		t.Errorf("Kubernetes does not see the image:\n%s", out)
	}
	s.Ctr("image", "rm", "--sync", ref)
	s.Must(s.StopDaemon(syscall.SIGTERM))
	s.Must(s.StartDaemon())
	if has() {
		t.Error("an image that was removed was attached again")
	}
}

// A reader that is killed while it attaches continues after its restart, and leaves no partial attachment.
func TestSharedAttachKilled(t *testing.T) {
	s := newSharing(t, stack.Streaming, "")
	img1, img2, _ := apps(t)
	one, two := s.Push("one", img1), s.Push("two", img2)
	s.publish(one)
	s.publish(two)
	s.Must(s.Registry.Off())
	c, err := containerd.New(s.Stack.Run+"/containerd.sock", containerd.WithDefaultNamespace(stack.Namespace))
	s.Must(err)
	defer c.Close()
	kept := func() []leases.Lease {
		t.Helper()
		list, err := c.LeasesService().List(t.Context(), `labels."daxfs.attach"`)
		s.Must(err)
		return list
	}
	attach := func() error {
		_, err := s.Try("daxfs", "attach", "--control", s.Stack.Run+"/control.sock", "--namespace",
			stack.Namespace, "--all")
		return err
	}
	for range 6 {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			attach() // fails if it was killed meanwhile
		}()
		for busy := true; busy && len(kept()) == 0; {
			select {
			case <-ended: // too fast for us
				busy = false
			default:
			}
		}
		s.Must(s.StopDaemon(syscall.SIGKILL))
		<-ended
		s.Must(s.StartDaemon())
		s.Must(attach())
		s.daxfs("detach", "--namespace", stack.Namespace, "--all")
	}
	s.attach("--all")
	for _, ref := range []string{one, two} {
		if out := s.Run(ref, "daxfs", "run", "cat", "/m/name"); !strings.Contains(ref, "/"+out+":") {
			t.Errorf("%s printed %q", ref, out)
		}
	}

	// The leftover of a kill during an attachment.
	killed, err := c.LeasesService().Create(t.Context(), leases.WithRandomID(), leases.WithExpiration(time.Hour),
		leases.WithLabel("daxfs.attach", digest.FromString(s.DaemonRoot()).Encoded()[:32]+".1"))
	s.Must(err)
	other, err := c.LeasesService().Create(t.Context(), leases.WithRandomID(),
		leases.WithLabel("daxfs.attach", "another daemon.1"))
	s.Must(err)
	for _, i := range s.state().Images {
		s.Must(c.LeasesService().AddResource(t.Context(), killed,
			leases.Resource{ID: i.Chain, Type: "snapshots/daxfs"}))
	}
	s.daxfs("detach", "--namespace", stack.Namespace, "--all")
	s.Must(s.Collect())
	if p := s.state().Pools[0]; p.Claimed == 0 {
		t.Errorf("%+v: the lease keeps nothing", p)
	}
	s.Must(s.StopDaemon(syscall.SIGKILL))
	s.Must(s.StartDaemon())
	await(t, "all claims have ended", func() bool {
		// If a garbage collection could not reach the daemon, the next one that removes a snapshot does its work.
		if _, err := s.Try("ctr", "snapshots", "--snapshotter", "daxfs", "prepare", "any"); err == nil {
			s.Ctr("snapshots", "--snapshotter", "daxfs", "rm", "any")
		}
		s.Must(s.Collect())
		p := s.state().Pools[0]
		return p.Claimed == 0 && p.Mounted == 0
	})
	if list := kept(); len(list) != 1 || list[0].ID != other.ID {
		t.Errorf("leases %+v, expected that of the other daemon", list)
	}
}
