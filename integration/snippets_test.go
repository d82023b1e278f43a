package integration

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// containerd itself accepts every file of config/containerd, alone and with each addition for
// Kubernetes, and knows every key in them.
func TestSnippets(t *testing.T) {
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	containerd := filepath.Join(cache, "bin/containerd")
	if _, err := os.Stat(containerd); err != nil {
		t.Skip("no containerd: it is built for root, and not with -short")
	}
	read := func(name string) string {
		t.Helper()
		b, err := os.ReadFile("../config/containerd/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for _, version := range []string{"v3.toml", "v4.toml"} {
		for _, cri := range []string{"", "cri.toml", "cri-runtimeclass.toml", "cri-gvisor.toml"} {
			t.Run(version+"+"+cri, func(t *testing.T) {
				text := read(version)
				if cri != "" {
					text += read(cri)
				}
				file := filepath.Join(t.TempDir(), "config.toml")
				if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
				cmd := exec.Command(containerd, "--config", file, "config", "dump")
				var stderr bytes.Buffer
				cmd.Stderr = &stderr
				out, err := cmd.Output()
				if err != nil {
					t.Fatalf("%v\n%s", err, stderr.String())
				}
				// It only warns about unknown keys.
				if strings.Contains(strings.ToLower(stderr.String()), "unknown") {
					t.Errorf("containerd says:\n%s", stderr.String())
				}
				var got struct {
					Proxy   map[string]struct{ Type string } `toml:"proxy_plugins"`
					Plugins map[string]struct {
						Unpack      []struct{ Snapshotter, Differ string } `toml:"unpack_config"`
						Snapshotter string
						Platforms   map[string]struct{ Snapshotter string } `toml:"runtime_platforms"`
						Containerd  struct {
							Runtimes map[string]struct{ Snapshotter string }
						}
					}
				}
				if err := toml.Unmarshal(out, &got); err != nil {
					t.Fatal(err)
				}
				if got.Proxy["daxfs"].Type != "snapshot" || got.Proxy["daxfs-diff"].Type != "diff" {
					t.Errorf("proxy plugins: %+v", got.Proxy)
				}
				if u := got.Plugins["io.containerd.transfer.v1.local"].Unpack; len(u) != 2 ||
					u[1].Snapshotter != "daxfs" || u[1].Differ != "daxfs-diff" {
					t.Errorf("unpack_config: %+v", u)
				}
				images, runtime := got.Plugins["io.containerd.cri.v1.images"],
					got.Plugins["io.containerd.cri.v1.runtime"]
				if s := images.Snapshotter; (s == "daxfs") != (cri == "cri.toml") {
					t.Errorf("the snapshotter of all pods is %q", s)
				}
				for file, class := range map[string]string{
					"cri-runtimeclass.toml": "runc-daxfs",
					"cri-gvisor.toml":       "runsc",
				} {
					if s := images.Platforms[class].Snapshotter; (s == "daxfs") != (cri == file) {
						t.Errorf("the snapshotter of images for the runtime class %q is %q", class, s)
					}
					if s := runtime.Containerd.Runtimes[class].Snapshotter; (s == "daxfs") != (cri == file) {
						t.Errorf("the snapshotter of the runtime class %q is %q", class, s)
					}
				}
			})
		}
	}
}

// In conf.d, the snippet works beside containerd's default configuration, which has the same tables.
func TestSnippetBesideDefault(t *testing.T) {
	cache, err := stack.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	containerd := filepath.Join(cache, "bin/containerd")
	if _, err := os.Stat(containerd); err != nil {
		t.Skip("no containerd: it is built for root, and not with -short")
	}
	text, err := exec.Command(containerd, "config", "default").Output()
	if err != nil {
		t.Fatal(err)
	}
	const imports = "imports = ['/etc/containerd/conf.d/*.toml']"
	if !bytes.Contains(text, []byte(imports)) {
		t.Fatalf("containerd's default configuration lacks %q", imports)
	}
	for _, version := range []string{"v3.toml", "v4.toml"} {
		dir := t.TempDir()
		snippet, err := os.ReadFile("../config/containerd/" + version)
		if err != nil {
			t.Fatal(err)
		}
		main := filepath.Join(dir, "config.toml")
		here := bytes.Replace(text, []byte(imports), []byte("imports = ['"+dir+"/conf.d/*.toml']"), 1)
		for name, content := range map[string][]byte{"config.toml": here, "conf.d/daxfs.toml": snippet} {
			if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		var stderr bytes.Buffer
		cmd := exec.Command(containerd, "--config", main, "config", "dump")
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v\n%s", version, err, &stderr)
		}
		var got struct {
			Proxy   map[string]struct{ Address string } `toml:"proxy_plugins"`
			Plugins map[string]struct {
				Unpack  []struct{ Snapshotter, Differ string } `toml:"unpack_config"`
				Unpacks int                                    `toml:"max_concurrent_unpacks"`
			}
		}
		if err := toml.Unmarshal(out, &got); err != nil {
			t.Fatal(err)
		}
		if u := got.Plugins["io.containerd.transfer.v1.local"]; len(u.Unpack) != 2 ||
			u.Unpack[1].Differ != "daxfs-diff" || u.Unpacks != 3 ||
			got.Proxy["daxfs"].Address == "" {
			t.Errorf("%s: containerd understands %+v, %+v", version, u, got.Proxy)
		}
	}
}
