package packages

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// registryName is the registry's name in documents.
const registryName = "registry.example.com"

// section is a part of docs/operations.md that the operator follows.
type section struct {
	title string
	// only selects the blocks whose commands contain it; the section has others for other ways. Empty: all.
	only string
}

// The operator of docs/operations.md gets from a clean system to running containers and back, with the
// commands as printed: for each way to install, with systemd and without. "make test" plays those in
// Debian 12, "make test-dist" also the package in Debian 13.
func TestOperator(t *testing.T) {
	if testing.Short() || os.Getuid() != 0 {
		t.Skip("starts Debian systems, which needs root, and not with -short")
	}
	for _, way := range []struct {
		name, suite string
		systemd     bool
		prepare     func(*root)
		sections    []section
	}{
		{
			"package", "trixie", true,
			func(r *root) {
				r.give(dist(r.T, oldVersion, "*.deb"), "/root/"+filepath.Base(dist(r.T, oldVersion, "*.deb")))
			},
			[]section{
				{"### From a package", "dpkg"},
				{"### Start with systemd", ""},
				{"### Tell containerd", "/usr/share/daxfs"},
				{"### Tell containerd", "systemctl"},
				{"### Try it", ""},
				{"## Remove", "prune"},
				{"## Remove", "dpkg"},
				{"## Remove", "rm -r /var/lib/daxfs-snapshotter"},
			},
		},
		{
			"source", "bookworm", true, giveSource,
			[]section{
				{"### From source", ""},
				{"### Start with systemd", ""},
				{"### Tell containerd", "/usr/local/share/daxfs"},
				{"### Tell containerd", "systemctl"},
				{"### Try it", ""},
				{"## Upgrade, restart", ""},
				{"### Try it", "doctor"},
				{"## Remove", "prune"},
				{"## Remove", "make uninstall"},
				{"## Remove", "rm -r /var/lib/daxfs-snapshotter"},
			},
		},
		{
			"archive without systemd", "bookworm", false,
			func(r *root) {
				r.give(dist(r.T, oldVersion, "*.tar.gz"), "/root/"+filepath.Base(dist(r.T, oldVersion, "*.tar.gz")))
			},
			[]section{
				{"### From an archive", ""},
				{"### Start without systemd", ""},
				{"### Tell containerd", "/usr/local/share/daxfs"},
				{"", ""},
				{"### Try it", ""},
				{"## Remove", "prune"},
			},
		},
	} {
		if !slices.Contains(suites, way.suite) {
			continue
		}
		t.Run(way.name, func(t *testing.T) {
			text, err := os.ReadFile("../../docs/operations.md")
			if err != nil {
				t.Fatal(err)
			}
			r := newRoot(t, way.suite)
			giveContainerd(r)
			serveRegistry(r)
			way.prepare(r)
			r.start(way.systemd)
			r.giveRunc()
			if way.systemd {
				r.sh("systemctl enable --now containerd")
			}
			for _, s := range way.sections {
				if s.title == "" { // stands in for "systemctl restart containerd"
					r.sh(startContainerd)
					continue
				}
				scripts := blocks(string(text), s)
				if len(scripts) == 0 {
					t.Errorf("operations.md has nothing to do in section %q with %q", s.title, s.only)
				}
				for _, script := range scripts {
					out := r.sh("cd /root; set -x\n" + script)
					t.Logf("%s: %s\n%s", s.title, script, out)
					if strings.Contains(script, "echo hello") && strings.Count(out, "\nhello\n") != 2 {
						t.Errorf("the containers did not print hello:\n%s", out)
					}
				}
			}
			if out := r.sh("mount | grep daxfs || true; ls /var/lib | grep daxfs || true"); way.systemd && out != "" {
				t.Errorf("the operator has removed all, and there is left:\n%s", out)
			}
		})
	}
}

// blocks returns the commands of each console block of a section, as printed.
func blocks(text string, s section) (scripts []string) {
	_, text, _ = strings.Cut(text, "\n"+s.title+"\n")
	if end := regexp.MustCompile(`(?m)^#{2,3} `).FindStringIndex(text); end != nil {
		text = text[:end[0]]
	}
	for _, block := range strings.Split(text, "```console\n")[1:] {
		block, _, _ = strings.Cut(block, "\n```")
		var commands []string
		for line := range strings.Lines(block) {
			if c, ok := strings.CutPrefix(line, "# "); ok || strings.HasPrefix(line, "$ ") {
				commands = append(commands, strings.TrimPrefix(strings.TrimSuffix(c, "\n"), "$ "))
			}
		}
		if script := strings.Join(commands, "\n"); strings.Contains(script, s.only) {
			scripts = append(scripts, script)
		}
	}
	return scripts
}

// giveContainerd installs containerd as its documents say: the programs, the unit and the default configuration.
func giveContainerd(r *root) {
	r.Helper()
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr", "nerdctl"} {
		path, err := stack.Program(name)
		if err != nil {
			r.Fatal(err)
		}
		r.give(path, "/usr/local/bin/"+name)
	}
	module := strings.TrimSpace(r.host("go", "list", "-m", "-f", "{{.Dir}}", "github.com/containerd/containerd/v2"))
	r.host("install", "-D", "-m", "0644", filepath.Join(module, "containerd.service"),
		filepath.Join(r.dir, "etc/systemd/system/containerd.service"))
	r.sh("mkdir -p /etc/containerd && containerd config default >/etc/containerd/config.toml")
}

// giveSource copies the sources to the operator's directory, and this machine's Go with its modules.
func giveSource(r *root) {
	r.Helper()
	r.host("sh", "-c", `git -C ../.. ls-files -z --cached --others --exclude-standard |
		tar -C ../.. --null --files-from - --create | tar -x -C "$0"`,
		filepath.Join(r.dir, "root"))
	for variable, to := range map[string]string{
		"GOROOT": "usr/local/go", "GOMODCACHE": "root/go/pkg/mod",
		"GOCACHE": "root/.cache/go-build",
	} {
		from := strings.TrimSpace(r.host("go", "env", variable))
		r.host("mkdir", "-p", filepath.Join(r.dir, to))
		r.host("mount", "--bind", from, filepath.Join(r.dir, to))
		r.Cleanup(func() { r.host("umount", filepath.Join(r.dir, to)) })
	}
}

// serveRegistry serves an image under the name in the documents.
func serveRegistry(r *root) {
	r.Helper()
	registry, err := stack.NewRegistry()
	if err != nil {
		r.Fatal(err)
	}
	img, err := testimage.Tiny()
	if err != nil {
		r.Fatal(err)
	}
	if _, err := registry.Push("web", img); err != nil {
		r.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:80")
	if err != nil {
		r.Fatal(err)
	}
	proxy := &http.Server{Handler: httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: registry.Addr()})}
	go proxy.Serve(l)
	r.Cleanup(func() { proxy.Close(); registry.Off() })
	hosts, err := os.OpenFile(filepath.Join(r.dir, "etc/hosts"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		r.Fatal(err)
	}
	defer hosts.Close()
	if _, err := fmt.Fprintf(hosts, "127.0.0.1 localhost %s\n", registryName); err != nil {
		r.Fatal(err)
	}
}
