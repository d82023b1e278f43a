package integration

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// privateRegistry leads to the registry of TestPartialRegistry. It has the default port, because
// containerd records no other port with blobs, and nothing else tells from where nerdctl pulls.
const privateRegistry = "registry.test"

// criImages makes containerd's CRI image service pull for a snapshotter, with the stack's hosts.toml.
const criImages = `
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "daxfs"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "{{dir}}/hosts"
[plugins."io.containerd.cri.v1.runtime"]
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{{bin}}"]
    conf_dir = "{{dir}}/cni.d"
`

// An image in a common registry program, with TLS and a login, is made zstd:chunked by us, and each
// client pulls it like any other image. An update sends only what the pool lacks, and gives the tree of a full pull.
func TestPartialRegistry(t *testing.T) {
	etc(t, map[string]string{"hosts": "127.0.0.1 localhost registry.test\n"})
	s := stack.New(t, stack.Options{
		Mode: stack.Streaming, ParallelUnpacks: 3, Kubernetes: true, Containerd: criImages,
		Config: "[registries]\nhosts_dirs = [\"{{dir}}/hosts\"]\n",
	})
	d, err := s.StartDistribution(privateRegistry)
	s.Must(err)
	login := stack.DistributionUser + ":" + stack.DistributionPassword
	// The file of docker login. The daemon, nerdctl and daxfs convert get no other credentials.
	config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, privateRegistry,
		base64.StdEncoding.EncodeToString([]byte(login)))
	s.Must(os.Mkdir(filepath.Join(s.Dir, ".docker"), 0o700))
	s.Must(os.WriteFile(filepath.Join(s.Dir, ".docker/config.json"), []byte(config), 0o600))
	clients := []struct {
		name, namespace string
		pull            func(ref, snapshotter string)
		passOn          func(ref string) // copies the part of it that is not on this machine
	}{
		{"ctr", stack.Namespace, func(ref, snapshotter string) {
			s.Ctr("image", "pull", "--hosts-dir", s.HostsDir(), "--user", login, "--snapshotter", snapshotter, ref)
		}, func(ref string) { pushByCtr(t, s, ref, login) }},
		{"nerdctl", stack.Namespace, func(ref, snapshotter string) {
			s.Nerdctl("--insecure-registry=false", "--snapshotter", snapshotter, "pull", "--quiet", ref)
		}, func(ref string) { commitByNerdctl(s, ref) }},
		{"cri", "k8s.io", func(ref, snapshotter string) {
			if snapshotter == "daxfs" {
				criPull(t, s, ref)
				return
			}
			s.Ctr("--namespace", "k8s.io", "image", "pull", "--hosts-dir", s.HostsDir(), "--user", login,
				"--snapshotter", snapshotter, ref)
		}, nil},
	}
	for i, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			first, second := versions(t, 300, uint64(10*i))
			larger(first)
			larger(second)
			var whole int64
			refs := map[string]string{}
			for tag, layers := range map[string][][]testimage.Entry{"v1": first, "v2": second} {
				img, err := testimage.Image(layers...)
				s.Must(err)
				if tag == "v2" {
					whole = layersSize(t, img)
				}
				gzip, err := d.Push(c.name, tag+"-gzip", img)
				s.Must(err)
				refs[tag] = strings.TrimSuffix(gzip, "-gzip")
				_, err = s.Try("daxfs", "convert", "--quiet", "--hosts-dir", s.HostsDir(), "docker://"+gzip, "--to",
					"docker://"+refs[tag])
				s.Must(err)
			}
			img, err := testimage.Chunked(second...) // the output of convert
			s.Must(err)
			least := needed(t, first, second, img)

			c.pull(refs["v1"], "daxfs")
			before := d.Sent()
			c.pull(refs["v2"], "daxfs")
			sent := d.Sent() - before
			t.Logf("%d bytes were sent: %.2f of the layers with gzip, %.2f of what is missing and the tables",
				sent, float64(sent)/float64(whole), float64(sent)/float64(least))
			if sent > whole*30/100 || sent > least*115/100 {
				t.Errorf("%d bytes were sent; the layers have %d with gzip, and %d are needed", sent, whole, least)
			}
			id := "run-" + c.name
			s.Ctr("--namespace", c.namespace, "run", "--rm", "--snapshotter", "daxfs", refs["v2"], id, "/bin/true")
			if c.passOn != nil {
				c.passOn(refs["v2"])
			}
			c.pull(refs["v2"], "overlayfs")
			s.Compare(refs["v2"], "--namespace", c.namespace)
		})
	}
}

// larger makes the files of the layers above the base four times as long, about 12 KB: the test counts
// bytes on the wire, and TLS and HTTP add half a kilobyte to each request.
func larger(layers [][]testimage.Entry) {
	for _, layer := range layers[1:] {
		for i, e := range layer {
			if len(e.Body) > 0 {
				layer[i] = testimage.File(e.Name, e.Mode,
					testimage.Noise(binary.LittleEndian.Uint64(e.Body), 4*len(e.Body)))
			}
		}
	}
}

// criPull pulls like a kubelet for a pod with imagePullSecrets.
func criPull(t *testing.T, s *stack.T, ref string) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+s.Stack.Run+"/containerd.sock",
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	s.Must(err)
	defer conn.Close()
	_, err = cri.NewImageServiceClient(conn).PullImage(t.Context(), &cri.PullImageRequest{
		Image: &cri.ImageSpec{Image: ref},
		Auth:  &cri.AuthConfig{Username: stack.DistributionUser, Password: stack.DistributionPassword},
	})
	s.Must(err)
}

// pushByCtr pushes an image whose blobs containerd has only in part. It works for the registry with
// the other blobs, into any repository. Elsewhere ctr reports the missing blobs, and pushing works after a fetch.
func pushByCtr(t *testing.T, s *stack.T, ref, login string) {
	t.Helper()
	registry := []string{"--hosts-dir", s.HostsDir(), "--user", login}
	push := func(to string, flags ...string) error {
		s.Ctr("image", "tag", "--force", ref, to)
		_, err := s.Try("ctr", slices.Concat([]string{"image", "push"}, flags, []string{to})...)
		return err
	}
	s.Must(push(ref+"-again", registry...))
	s.Must(push(privateRegistry+"/another:v2", registry...))
	other := s.Registry.Addr() + "/elsewhere:v2"
	if err := push(other, "--plain-http"); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("a push to another registry: %v, expected an error that says what is missing", err)
	}
	s.Ctr(slices.Concat([]string{"content", "fetch"}, registry, []string{ref})...)
	s.Must(push(other, "--plain-http"))
}

// commitByNerdctl makes an image from a container, and pushes it. nerdctl fetches missing blobs.
func commitByNerdctl(s *stack.T, ref string) {
	const own = privateRegistry + "/committed:v1"
	nerdctl := func(args ...string) string {
		return s.Nerdctl(append([]string{"--insecure-registry=false"}, args...)...)
	}
	nerdctl("run", "--detach", "--name", "box", "--net=none", ref, "sleep", "1000000")
	nerdctl("exec", "box", "touch", "/own")
	nerdctl("commit", "box", own)
	nerdctl("rm", "--force", "box")
	nerdctl("run", "--rm", "--net=none", own, "test", "-e", "/own")
	nerdctl("push", own)
}
