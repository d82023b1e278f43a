package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
	"github.com/daxfs/daxfs-snapshotter/integration/testimage"
)

// A container runs, writes, and sees the image's tree.
func TestRun(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := stack.New(t, stack.Options{Mode: m})
		tiny := push(t, s, "tiny")
		s.Pull(tiny, "daxfs")
		if out := s.Run(tiny, "daxfs", "a", "cat", "/etc/hostname"); out != "tiny\n" {
			t.Errorf("the container printed %q", out)
		}
		if out := s.Run(tiny, "daxfs", "b", "sh", "-c",
			"echo new > /etc/hostname; rm /etc/group; cat /etc/hostname; ls /etc"); out != "new\nhostname\npasswd\n" {
			t.Errorf("the container printed %q", out)
		}
		if out := s.Run(tiny, "daxfs", "a", "cat", "/etc/hostname"); out != "tiny\n" {
			t.Errorf("after another container wrote, the container printed %q", out)
		}
		python := push(t, s, "python")
		s.Pull(python, "daxfs")
		if out := s.Run(python, "daxfs", "p", "/usr/bin/python3",
			"/app/main.py"); out != `{"app": "one", "prefix": "/usr"}`+"\n" {
			t.Errorf("python printed %q", out)
		}

		// The root of a running container contains only the image and the runtime's additions.
		special := push(t, s, "special")
		s.Pull(special, "overlayfs")
		s.Pull(special, "daxfs")
		trees := map[string][]string{}
		for _, sn := range []string{"overlayfs", "daxfs"} {
			s.Ctr("run", "--detach", "--snapshotter", sn, special, "see-"+sn, "sleep", "1000000")
			lines, err := listing.Tree(filepath.Join(s.Rootfs("see-"+sn), "s"), stack.Comparable)
			if err != nil {
				t.Fatal(err)
			}
			trees[sn] = lines
		}
		if err := listing.Diff(trees["overlayfs"], trees["daxfs"]); err != nil {
			t.Error(err)
		}
	})
}

// nerdctl works with images and containers: run, exec, cp, diff, commit, save and run of the new image.
func TestNerdctl(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := stack.New(t, stack.Options{Mode: m})
		ref := push(t, s, "special")
		s.Nerdctl("pull", ref)
		if out := s.Nerdctl("run", "--rm", "--net=none", ref, "cat",
			"/s/size-1"); out != string(testimage.Noise(2, 1)) {
			t.Errorf("nerdctl run printed %q", out)
		}
		s.Nerdctl("run", "--detach", "--net=none", "--name", "box", ref, "sleep", "1000000")
		if out := s.Nerdctl("exec", "box", "sh", "-c",
			"echo changed > /s/owned; rm /s/attrs; stat -c %u:%g /s/bigid"); out != "2147483653:2147483654\n" {
			t.Errorf("nerdctl exec printed %q", out)
		}
		file := filepath.Join(s.Dir, "copied")
		if err := os.WriteFile(file, []byte("from outside"), 0o644); err != nil {
			t.Fatal(err)
		}
		s.Nerdctl("cp", file, "box:/s/copied")
		s.Nerdctl("cp", "box:/s/copied", file+"-back")
		if b, err := os.ReadFile(file + "-back"); err != nil || string(b) != "from outside" {
			t.Errorf("nerdctl cp there and back: %q, %v", b, err)
		}
		diff := s.Nerdctl("diff", "box")
		for _, want := range []string{"C /s/owned", "D /s/attrs", "A /s/copied"} {
			if !strings.Contains(diff, want) {
				t.Errorf("nerdctl diff has no %q:\n%s", want, diff)
			}
		}
		s.Nerdctl("commit", "box", "committed:1")
		script := "cat /s/owned /s/copied; test ! -e /s/attrs && cat /s/hidden/new"
		if out := s.Nerdctl("run", "--rm", "--net=none", "committed:1", "sh", "-c",
			script); out != "changed\nfrom outsidenew" {
			t.Errorf("the committed image printed %q", out)
		}
		if out := s.Nerdctl("run", "--rm", "--net=none", "--read-only", ref, "sh", "-c",
			"touch /s/x 2>/dev/null || echo refused"); out != "refused\n" {
			t.Errorf("a read-only container printed %q", out)
		}
		s.Nerdctl("rm", "--force", "box")
	})
}

// Fifty containers of one image run at once, over one mount.
func TestManyContainers(t *testing.T) {
	s := stack.New(t, stack.Options{Mode: stack.Streaming})
	ref := push(t, s, "tiny")
	s.Pull(ref, "daxfs")
	const containers = 50
	concurrently(t, containers, 8, func(i int) error {
		_, err := s.Try("ctr", "run", "--detach", "--snapshotter", "daxfs", ref, fmt.Sprintf("many-%d", i),
			"sh", "-c", fmt.Sprintf("echo %d > /etc/hostname; sleep 1000000", i))
		return err
	})
	if n := len(s.ImageMounts()); n != 1 {
		t.Errorf("%d mounts of images for %d containers of one image, want 1", n, containers)
	}
	concurrently(t, containers, 8, func(i int) error {
		_, err := s.Try("ctr", "task", "exec", "--exec-id", "look", fmt.Sprintf("many-%d", i),
			"sh", "-c", wants("cat /etc/hostname", fmt.Sprint(i)))
		return err
	})
}

// Twenty images are pulled and run at once.
func TestManyImages(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		s := stack.New(t, stack.Options{Mode: m, ParallelUnpacks: 2})
		const count = 20
		refs := make([]string, count)
		for i := range refs {
			img, err := testimage.Small(100, uint64(i%5))
			if err != nil {
				t.Fatal(err)
			}
			refs[i] = s.Push(fmt.Sprintf("many-%d", i), img)
		}
		concurrently(t, count, 5, func(i int) error {
			if _, err := s.Try("ctr", "image", "pull", "--plain-http", "--snapshotter", "daxfs", refs[i]); err != nil {
				return err
			}
			const file = "node_modules/package-0001/lib/file-50.js"
			_, err := s.Try("ctr", "run", "--rm", "--snapshotter", "daxfs", refs[i], fmt.Sprintf("many-%d", i),
				"sh", "-c", wants("sha256sum < /"+file, sumOf(testimage.SmallFiles(100, uint64(i%5)), file)+"  -"))
			return err
		})
	})
}

// wants is a script that fails unless a command prints want. On a busy machine ctr may exit with
// status 0 without the container's output: it stops opening the output pipe when the container has ended.
func wants(command, want string) string {
	return fmt.Sprintf(`got=$(%s) && [ "$got" = %q ] || { echo "got $got, want %s" >&2; exit 1; }`, command, want, want)
}

// concurrently calls f for 0 to n-1, at most limit at a time.
func concurrently(t testing.TB, n, limit int, f func(int) error) {
	t.Helper()
	var wg sync.WaitGroup
	slots := make(chan struct{}, limit)
	for i := range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			slots <- struct{}{}
			defer func() { <-slots }()
			if err := f(i); err != nil {
				t.Errorf("%d: %v", i, err)
			}
		}()
	}
	wg.Wait()
}
