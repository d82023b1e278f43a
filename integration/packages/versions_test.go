//go:build dist && versions

package packages

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// version is a release of containerd to test.
type version struct {
	module, number string
	snippet        string   // prints the configuration for conf.d
	pulls          []string // flags of ctr image pull that choose the puller
}

// bothPulls let containerd's transfer service pull, then ctr itself.
var bothPulls = []string{"--local=false", "--local"}

// versions are the newest releases of each line in operations.md, without the one of the other tests.
var versions = []version{
	{
		"github.com/containerd/containerd", "v1.7.35",
		"sed 's/^version = 3/version = 2/' /usr/share/daxfs/containerd/v3.toml",
		[]string{"--local"}, // its transfer service does not get --plain-http from ctr
	},
	{"github.com/containerd/containerd/v2", "v2.0.14", "cat /usr/share/daxfs/containerd/v3.toml", bothPulls},
	{"github.com/containerd/containerd/v2", "v2.1.9", "cat /usr/share/daxfs/containerd/v3.toml", bothPulls},
	{"github.com/containerd/containerd/v2", "v2.3.7", "cat /usr/share/daxfs/containerd/v3.toml", bothPulls},
	{"github.com/containerd/containerd/v2", "v2.4.2", "cat /usr/share/daxfs/containerd/v4.toml", bothPulls},
}

func init() { builds = append(builds, makeContainerds) }

func (v version) dir(cache string) string { return filepath.Join(cache, "containerd", v.number) }

// makeContainerds builds the versions that the cache lacks.
func makeContainerds(cache string) error {
	for _, v := range versions {
		if _, err := os.Stat(filepath.Join(v.dir(cache), "containerd")); err == nil {
			continue
		}
		if err := v.build(v.dir(cache)); err != nil {
			return fmt.Errorf("build containerd %s: %w", v.number, err)
		}
	}
	return nil
}

// build builds the programs from a copy of the module. "go install" refuses modules with exclude directives.
func (v version) build(to string) (err error) {
	tree, err := os.MkdirTemp("", "containerd-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tree)
	download := exec.Command("go", "mod", "download", "-json", v.module+"@"+v.number)
	download.Dir = tree
	download.Env = append(os.Environ(), "GOFLAGS=")
	out, err := download.Output()
	if err != nil {
		return fmt.Errorf("go mod download: %w\n%s", err, out)
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		return err
	}
	if out, err := exec.Command("sh", "-e", "-c", `cp -r "$0/." "$1"; chmod -R u+w "$1"`, module.Dir,
		tree).CombinedOutput(); err != nil {
		return fmt.Errorf("copy %s: %w\n%s", module.Dir, err, out)
	}
	temp := to + ".new"
	if err := os.MkdirAll(temp, 0o755); err != nil {
		return err
	}
	build := exec.Command("go", "build", "-mod=mod", "-ldflags",
		"-s -w -X "+v.module+"/version.Version="+v.number, "-o", temp+"/",
		"./cmd/containerd", "./cmd/containerd-shim-runc-v2", "./cmd/ctr")
	build.Dir = tree
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	return os.Rename(temp, to)
}

// An operator's actions work with each version of containerd, with its default configuration and our snippet.
func TestVersions(t *testing.T) {
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range versions {
		t.Run(v.number, func(t *testing.T) {
			r := newRoot(t, "bookworm")
			for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
				r.give(filepath.Join(v.dir(cache), name), "/usr/local/bin/"+name)
			}
			r.give(dist(t, oldVersion, "*.deb"), "/root/daxfs.deb")
			r.sh(`dpkg --install /root/daxfs.deb
				mkdir -p /etc/containerd/conf.d; containerd config default >/etc/containerd/config.toml
				grep -q '^imports' /etc/containerd/config.toml &&
				sed -i 's|^imports.*|imports = ["/etc/containerd/conf.d/*.toml"]|' /etc/containerd/config.toml ||
					sed -i '1i imports = ["/etc/containerd/conf.d/*.toml"]' /etc/containerd/config.toml
				` + v.snippet + ` >/etc/containerd/conf.d/daxfs.toml`)
			serveRegistry(r)
			r.start(false)
			r.giveRunc()
			r.sh(startDaemon)
			r.sh(startContainerd)
			if out := r.sh("ctr version"); strings.Count(out, v.number[1:]) != 2 {
				t.Fatalf("ctr version prints\n%s", out)
			}
			ref := registryName + "/web:latest"
			for _, how := range v.pulls {
				r.sh("ctr image pull --plain-http " + how + " --snapshotter daxfs " + ref)
				if out := r.sh("ctr run --rm --snapshotter daxfs " + ref + " c echo hello"); out != "hello\n" {
					t.Errorf("pull %s: the container printed %q", how, out)
				}
				r.sh("ctr image rm --sync " + ref)
			}
			r.sh("ctr image pull --plain-http " + v.pulls[0] + " --snapshotter daxfs " + ref +
				"; ctr run --detach --snapshotter daxfs " + ref + " stays sleep 1000000")
			r.sh(stop("daxfs-snapshotter") + startDaemon + stop("containerd") + startContainerd)
			if out := r.sh("ctr task exec --exec-id e stays cat /etc/hostname; ctr run --rm --snapshotter daxfs " +
				ref + " c echo hello"); out != "tiny\nhello\n" {
				t.Errorf("after the restart the containers printed %q", out)
			}
			if out := r.sh("daxfs doctor || true"); !strings.Contains(out, "daxfs") {
				t.Error(out)
			} else {
				t.Log(out)
			}
			r.sh("ctr task rm --force stays; ctr container rm stays; ctr image rm --sync " + ref)
			if out := r.sh("ctr snapshot --snapshotter daxfs ls; mount"); strings.Contains(out, "sha256:") ||
				strings.Contains(out, "/images/") {
				t.Errorf("after all was removed there is left:\n%s", out)
			}
		})
	}
}

func stop(name string) string {
	return fmt.Sprintf("p=$(cat /run/%s.pid); kill $p\n"+
		"for i in $(seq 600); do kill -0 $p 2>/dev/null || break; sleep 0.1; done\n", name)
}
