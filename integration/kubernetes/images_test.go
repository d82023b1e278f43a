//go:build kubernetes

package kubernetes

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// The registries of critest's images; ours is the mirror of both.
var registries = []string{"registry.k8s.io", "gcr.io"}

const pause = "pause:3.10"

// pushImages uploads images that behave like those of critest.
func pushImages(t *testing.T, r *stack.Registry) {
	t.Helper()
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(filepath.Join(cache, "bin/testprogram"))
	if err != nil {
		t.Fatal(err)
	}
	base, err := testimage.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	// Debian's busybox lacks some of the programs that critest starts.
	tools, err := testimage.Programs("/usr/bin/ipcs", "/usr/bin/pgrep")
	if err != nil {
		t.Fatal(err)
	}
	passwd := []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
	tools = append(tools, testimage.File("etc/passwd", 0o644, passwd))
	server := []testimage.Entry{
		testimage.Dir("usr/sbin", 0o755), testimage.File("usr/sbin/nginx", 0o755, program),
		testimage.Dir("var", 0o755), testimage.Symlink("var/run", "../run"),
	}
	setuid := []testimage.Entry{testimage.File("bin/uid", 0o4755, program)}
	serve := func(port string) v1.Config {
		return v1.Config{Entrypoint: []string{"/usr/sbin/nginx", "master process", port}}
	}
	users := []testimage.Entry{
		testimage.File("etc/passwd", 0o644,
			[]byte("root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/tmp:/bin/sh\n")),
		testimage.File("etc/group", 0o644,
			[]byte("root:x:0:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")),
	}
	shell := v1.Config{Cmd: []string{"sh"}}
	user := func(name string) v1.Config { return v1.Config{Cmd: []string{"sh"}, User: name} }
	const e2e, staging = "e2e-test-images/", "k8s-staging-cri-tools/"
	for _, i := range []struct {
		repository, tag string
		more            []testimage.Entry
		config          v1.Config
	}{
		{"pause", "3.10", server, v1.Config{Entrypoint: []string{"/usr/sbin/nginx", "pause"}}},
		{e2e + "busybox", "1.29-2", tools, shell},
		{e2e + "nginx", "1.14-2", server, serve("80")},
		{e2e + "httpd", "2.4.39-4", server, serve("80")},
		{e2e + "nonewprivs", "1.3", setuid, v1.Config{Entrypoint: []string{"/bin/uid", "uid"}}},
		{staging + "hostnet-nginx-amd64", "latest", server, serve("12003")},
		{staging + "test-image-user-uid", "latest", nil, user("1002")},
		{staging + "test-image-user-username", "latest", nil, user("www-data")},
		{staging + "test-image-user-uid-group", "latest", nil, user("1003:users")},
		{staging + "test-image-user-username-group", "latest", nil, user("www-data:100")},
		{staging + "test-image-predefined-group", "latest", users, user("1000")},
		{staging + "test-image-latest", "latest", marked("latest"), shell},
		{staging + "test-image-tag", "test", marked("test"), shell},
		{staging + "test-image-tag", "all", marked("all"), shell},
		{staging + "test-image-1", "latest", marked("1"), shell},
		{staging + "test-image-2", "latest", marked("2"), shell},
		{staging + "test-image-3", "latest", marked("3"), shell},
		{staging + "test-image-tags", "1", marked("tags"), shell},
		{staging + "test-image-tags", "2", marked("tags"), shell},
		{staging + "test-image-tags", "3", marked("tags"), shell},
	} {
		layers := [][]testimage.Entry{base}
		if i.more != nil {
			layers = append(layers, i.more)
		}
		img, err := testimage.Image(layers...)
		if err == nil {
			img, err = mutate.Config(img, i.config)
		}
		if err == nil {
			_, err = r.PushTag(i.repository, i.tag, img)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func marked(name string) []testimage.Entry {
	return []testimage.Entry{testimage.File("name", 0o644, []byte(name))}
}

// mirrors writes a hosts.toml for each registry.
func mirrors(t *testing.T, dir string, r *stack.Registry) {
	t.Helper()
	for _, host := range registries {
		if err := os.MkdirAll(filepath.Join(dir, host), 0o755); err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprintf("server = %q\n[host.%[1]q]\n  capabilities = [\"pull\", \"resolve\"]\n", "http://"+r.Addr())
		if err := os.WriteFile(filepath.Join(dir, host, "hosts.toml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
