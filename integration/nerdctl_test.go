package integration

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// Images are exported, imported and removed: tag, save, load, export, import, prune.
func TestNerdctlImages(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := stack.New(t, stack.Options{Mode: m})
		ref := push(t, s, "special")
		s.Nerdctl("pull", ref)
		size := string(testimage.Noise(2, 1)) // the contents of /s/size-1
		show := func(image string) {
			t.Helper()
			if out := s.Nerdctl("run", "--rm", "--net=none", image, "cat", "/s/size-1", "/s/hidden/new"); out != size+
				"new" {
				t.Errorf("a container of %s printed %q", image, out)
			}
		}
		s.Nerdctl("tag", ref, "tagged:1")
		show("tagged:1")
		archive := filepath.Join(s.Dir, "saved.tar")
		s.Nerdctl("save", "--output", archive, "tagged:1")
		s.Nerdctl("rmi", ref, "tagged:1")
		s.Must(s.Collect())
		await(t, "the image is unmounted", func() bool { return len(s.ImageMounts()) == 0 })
		s.Nerdctl("load", "--input", archive)
		show("tagged:1")

		s.Nerdctl("run", "--name", "box", "--net=none", "tagged:1", "sh", "-c", "echo mine > /own; rm /s/attrs")
		flat := filepath.Join(s.Dir, "flat.tar")
		s.Nerdctl("export", "--output", flat, "box")
		s.Nerdctl("import", flat, "imported:1")
		show("imported:1")
		if out := s.Nerdctl("run", "--rm", "--net=none", "imported:1", "sh", "-c",
			"cat /own; test ! -e /s/attrs"); out != "mine\n" {
			t.Errorf("what was exported shows %q", out)
		}
		s.Nerdctl("rm", "box")
		s.Nerdctl("image", "prune", "--all", "--force")
		if out := s.Nerdctl("images", "--quiet"); out != "" {
			t.Errorf("images after pruning: %q", out)
		}
		nothingLeft(t, s)
	})
}

// A container is stopped, changed from outside, started again, and serves on a port of the host.
func TestNerdctlStopped(t *testing.T) {
	// Only one stack: nerdctl keeps its bridge, and a second stack with other files would take it for a foreign one.
	s := stack.New(t, stack.Options{Mode: stack.Streaming})
	ref := push(t, s, "special")
	s.Nerdctl("pull", ref)
	s.Nerdctl("run", "--detach", "--name", "web", "--publish", "127.0.0.1:18080:80", ref, "httpd", "-f", "-p",
		"80", "-h", "/s")
	get := func(path string) string {
		resp, err := http.Get("http://127.0.0.1:18080" + path)
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return fmt.Sprintf("%d %s %v", resp.StatusCode, b, err)
	}
	await(t, "the container serves a file of the image", func() bool { return get("/hidden/new") == "200 new <nil>" })
	s.Nerdctl("stop", "--time", "1", "web")
	file := filepath.Join(s.Dir, "page")
	if err := os.WriteFile(file, []byte("from outside"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.Nerdctl("cp", file, "web:/s/page")
	s.Nerdctl("cp", "web:/s/page", file+"-back")
	s.Nerdctl("cp", "web:/s/size-4097", file+"-image")
	for name, want := range map[string]string{
		file + "-back":  "from outside",
		file + "-image": string(testimage.Noise(4098, 4097)),
	} {
		if b, err := os.ReadFile(name); err != nil || string(b) != want {
			t.Errorf("%s: %d bytes, %v", filepath.Base(name), len(b), err)
		}
	}
	s.Nerdctl("start", "web")
	await(t, "the container serves again", func() bool { return get("/page") == "200 from outside <nil>" })
	if out := s.Nerdctl("exec", "web", "cat", "/s/page", "/s/hidden/new"); out != "from outsidenew" {
		t.Errorf("after the start the container shows %q", out)
	}
	s.Nerdctl("rm", "--force", "web")
}

// The container daemon's configuration maps all containers to one user's ids: a line in /etc/subuid, and one flag.
func TestNerdctlUserns(t *testing.T) {
	etc(t, map[string]string{"subuid": "daemon:100000:65536\n", "subgid": "daemon:200000:65536\n"})
	s := stack.New(t, stack.Options{Mode: stack.Streaming})
	ref := push(t, s, "special")
	s.Nerdctl("pull", ref)
	const script = "stat -c %u:%g /etc/passwd /s/owned; cat /proc/self/uid_map /proc/self/gid_map; " +
		"touch /s/new && stat -c %u /s/new"
	out := s.Nerdctl("--userns-remap", "daemon", "run", "--rm", "--net=none", ref, "sh", "-c", script)
	want := "0:0\n1000:1000\n         0     100000      65536\n         0     200000      65536\n0\n"
	if out != want {
		t.Errorf("the container printed\n%s\nwant\n%s", out, want)
	}
	if n := len(s.ImageMounts()); n != 1 {
		t.Errorf("%d mounts of images, want 1", n)
	}
}

// etc replaces files in /etc until the test ends, for the processes of the tests only.
func etc(t *testing.T, files map[string]string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounts over /etc, which needs root")
	}
	upper, work := t.TempDir(), t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(upper, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("overlay", "/etc", "overlay", 0,
		"lowerdir=/etc,upperdir="+upper+",workdir="+work); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/etc", unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// An image is a volume in a container of another image, mounted through a view like in Kubernetes.
func TestImageVolume(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := stack.New(t, stack.Options{Mode: m})
		tiny, volume := push(t, s, "tiny"), push(t, s, "special")
		s.Pull(tiny, "daxfs")
		s.Pull(volume, "daxfs")
		dir := filepath.Join(s.Stack.Run, "volume")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		s.Ctr("image", "mount", "--snapshotter", "daxfs", volume, dir)
		s.Ctr("run", "--detach", "--snapshotter", "daxfs", "--mount",
			"type=bind,src="+dir+",dst=/volume,options=rbind:ro", tiny, "user", "sleep", "1000000")
		// Remove the image while its volume is in use.
		s.Ctr("image", "rm", "--sync", volume)
		s.Must(s.Collect())
		out, err := s.Exec("user", "sh", "-c",
			"cat /volume/s/hidden/new; stat -c %u:%g /volume/s/owned; touch /volume/x 2>/dev/null || echo refused")
		if err != nil || out != "new1000:1000\nrefused\n" {
			t.Errorf("the volume shows %q, %v", out, err)
		}
		s.Ctr("task", "rm", "--force", "user")
		s.Ctr("container", "rm", "user")
		s.Ctr("image", "unmount", "--rm", "--snapshotter", "daxfs", dir)
		s.Ctr("image", "rm", "--sync", tiny)
		nothingLeft(t, s)
	})
}
