package integration

import (
	"testing"

	"github.com/daxfs/daxfs-snapshotter/integration/stack"
)

// In a user namespace the image's files belong to the namespace's users, without a copy of the image:
// it has the same mount as for any other container.
func TestUserNamespace(t *testing.T) {
	for _, driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			s := stack.New(t, stack.Options{Mode: stack.Streaming, Config: driverConfig(driver)})
			ref := push(t, s, "special")
			s.Pull(ref, "daxfs")
			const script = "stat -c %u:%g /etc/passwd /s/owned; cat /proc/self/uid_map; " +
				"touch /s/new && stat -c %u /s/new; cat /s/size-1 | wc -c"
			out := s.Ctr("run", "--rm", "--snapshotter", "daxfs", "--uidmap", "0:100000:65536", "--gidmap",
				"0:200000:65536",
				"--remap-labels", ref, "mapped", "sh", "-c", script)
			want := "0:0\n1000:1000\n         0     100000      65536\n0\n1\n"
			if out != want {
				t.Errorf("the container printed\n%s\nwant\n%s", out, want)
			}
			if out := s.Run(ref, "daxfs", "plain", "stat", "-c", "%u:%g", "/s/owned"); out != "1000:1000\n" {
				t.Errorf("a container without a user namespace printed %q", out)
			}
			if n := len(s.ImageMounts()); n != 1 {
				t.Errorf("%d mounts of images, want 1", n)
			}
		})
	}
}
