package integration

import (
	"fmt"
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/listing"
	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// After a reboot every container starts again with its own files, and every image shows the same tree,
// with the registry off. This holds also if the pool was lost with the memory, or if the image was
// removed while its container stayed.
func TestReboot(t *testing.T) {
	modes(t, func(t *testing.T, m stack.Mode) {
		for _, kind := range []string{"file", "tmpfs"} {
			t.Run(kind, func(t *testing.T) {
				config := ""
				if kind == "tmpfs" {
					// Run is on its own tmpfs, which the reboot wipes; the path must outlive that.
					config = fmt.Sprintf("[pool]\nkind = %q\npath = %q\nsize = \"1GiB\"\n", kind,
						"/run/daxfs-test.pool")
				}
				s := stack.New(t, stack.Options{Mode: m, Config: config})
				t.Cleanup(func() { removeIfThere(t, "/run/daxfs-test.pool") })
				names := []string{"special", "layers", "python"}
				refs := map[string]string{}
				trees := map[string][]string{}
				for _, name := range names {
					refs[name] = push(t, s, name)
					s.Pull(refs[name], "daxfs")
					trees[name] = s.ImageTree(refs[name], "daxfs")
					s.Ctr("run", "--detach", "--snapshotter", "daxfs", refs[name], name, "sh", "-c",
						"echo mine > /own; sleep 1000000")
				}
				s.Must(s.Registry.Off())
				s.Ctr("image", "rm", "--sync", refs["layers"])
				s.Must(s.Collect())

				s.Must(s.Reboot(func() { removeIfThere(t, "/run/daxfs-test.pool") }))
				for _, name := range names {
					s.Ctr("task", "start", "--detach", name)
					out, err := s.Exec(name, "cat", "/own", "/etc/hostname")
					if err != nil || out != "mine\ntiny\n" {
						t.Errorf("%s after the reboot: %q, %v", name, out, err)
					}
					if name == "layers" {
						continue // its image is gone; only the container must work
					}
					if err := listing.Diff(trees[name], s.ImageTree(refs[name], "daxfs")); err != nil {
						t.Errorf("%s after the reboot: %v", name, err)
					}
				}
				if out, err := s.Exec("layers", "sh", "-c", "cat /l/top; ls /l/shared | wc -l"); err != nil ||
					out != "layer 69\n1\n" {
					t.Errorf("container of the removed image: %q, %v", out, err)
				}
				if out := s.Run(refs["python"], "daxfs", "new", "/usr/bin/python3",
					"/app/main.py"); out != `{"app": "one", "prefix": "/usr"}`+"\n" {
					t.Errorf("a new container after the reboot printed %q", out)
				}
				s.Must(s.Registry.On())
			})
		}
	})
}
